"""Prepared scores, pooled scores and steering by slot in plain PyTorch float64: oracle, fallback and baseline.

Shapes: rows, x [N, D]; packed readers [P, K, D], whose parts add up to the readers, and their offset [K]; slots [M]
int32, one for each N / M rows in a row. Tables have one entry a slot, and slot 0, or one past the table, is nothing.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .errors import ShapeError


def rows_per_slot(rows: int, slots: Tensor) -> int:
    """How many consecutive rows share a slot; raises ShapeError where slots [M] do not divide the rows."""
    if len(slots) == 0 or rows % len(slots):
        if rows == 0:
            return 1
        raise ShapeError("slots", expected=f"[M], M a divisor of {rows} rows", got=list(slots.shape))
    return max(rows // len(slots), 1)


def project_packed_ref(rows: Tensor, packed: Tensor, offset: Tensor, normalise: bool) -> Tensor:
    """x . v_k + offset_k [N, K], divided by |x| when `normalise`; a zero row scores 0. float64 for float64 rows."""
    y = rows.double()
    scores = y @ packed.double().sum(0).T + offset.double()
    if normalise:
        norms = y.norm(dim=1, keepdim=True)
        scores = torch.where(norms > 0, scores / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return scores.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)


def project_rows_ref(rows: Tensor, packed: Tensor, offset: Tensor, count: Tensor | None, out: Tensor) -> None:
    """The same for S hook points: rows [S, n, D], packed [S, P, K, D], offset [S, K], out [S, n, K]; rows from count[0]
    on are left out.
    """
    n = rows.shape[1] if count is None else min(int(count), rows.shape[1])
    for s in range(len(rows)):
        out[s, :n] = project_packed_ref(rows[s, :n], packed[s], offset[s], False)


def pool_scores_ref(scores: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and mean [B, K] float32 of scores [N, K] over each sequence's rows starts[b] .. starts[b + 1] - 1.

    NaN for a sequence without rows, and where the mean is.
    """
    edges = starts.tolist()
    shape = (len(edges) - 1, scores.shape[1])
    largest, mean = (torch.full(shape, torch.nan, device=scores.device) for _ in range(2))
    for b, (first, end) in enumerate(pairwise(edges)):
        if end > first:
            largest[b], mean[b] = scores[first:end].amax(0), scores[first:end].double().mean(0)
    return largest.where(mean == mean, torch.nan), mean


def _slots(x: Tensor, slots: Tensor, size: int) -> Tensor:
    """The slot [N] of every row, 0 for what is none."""
    s = slots.repeat_interleave(rows_per_slot(len(x), slots))[: len(x)]
    return torch.where((s > 0) & (s < size), s, 0).long()


def steer_rows_ref(
    x: Tensor,
    slots: Tensor,
    deltas: Tensor,
    basis: Tensor | None = None,
    dual: Tensor | None = None,
    target: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """x + delta_s + g_s (t_s - x B') B* by slot s, rounded once; the very bits of x where the slot is 0.

    deltas [S, D]; basis B, dual B* [R, D], target t, gate g [S, R].
    """
    s = _slots(x, slots, len(deltas))
    y = x.double()
    moved = y + deltas.double()[s]
    if basis is not None and dual is not None and target is not None:
        move = target.double()[s] - y @ basis.double().T
        if gate is not None:
            g = gate.double()[s]
            move = torch.where(g != 0, g * move, 0.0)
        moved = moved + move @ dual.double()
    return torch.where(s[:, None] > 0, moved.to(x.dtype), x)


def steer_slots_ref(x: Tensor, slots: Tensor, readers: Tensor, levels: Tensor) -> Tensor:
    """The slot [N] int32 of each row whose scores x . readers_w all exceed levels[slot, w], else 0."""
    s = _slots(x, slots, len(levels))
    above = (x.double() @ readers.double().T > levels.double()[s]).all(1)
    return torch.where(above, s, 0).int()


def steer_when_ref(
    x: Tensor,
    slots: Tensor,
    readers: Tensor,
    levels: Tensor,
    deltas: Tensor,
    basis: Tensor | None = None,
    dual: Tensor | None = None,
    target: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """What steer_rows makes of the rows whose scores all exceed their slot's levels; the others as they are."""
    return steer_rows_ref(x, steer_slots_ref(x, slots, readers, levels), deltas, basis, dual, target, gate)


def project_steer_ref(
    x: Tensor, packed: Tensor, offset: Tensor, slots: Tensor, deltas: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of x as it was, and x + deltas[slot]."""
    return project_packed_ref(x, packed, offset, False), steer_rows_ref(x, slots, deltas)
