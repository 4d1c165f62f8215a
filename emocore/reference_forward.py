"""The forward of a capture that stays on the device, in plain PyTorch: oracle and fallback of kernels/ (docs/gpu.md).

Like the kernels it reads and writes fixed memory and never asks for a value. B sequences, N positions, R token rules, S
hook points.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .control import Fault, Header, Source, Station, Tally


def begin_ref(plan: Any, mask: Tensor | None, shown: Tensor | None, past: Tensor | int, written: int) -> None:
    """Open a forward: undo one that was left open, and lay out the positions of this one (see plans.Plan)."""
    undo_ref(plan)
    b, t = plan.sequences, plan.length
    lane = torch.arange(plan.positions, device=plan.rank.device)
    if plan.bounds is None:
        sequence, column = lane // t, lane % t
        ones = torch.ones(b, t, dtype=torch.bool, device=lane.device)
        every = ones if mask is None else mask != 0
        before = past if mask is None else 0
        rank = (before + every.cumsum(1) - 1)[:, every.shape[1] - t :].reshape(-1)
        real = every[:, every.shape[1] - t :].reshape(-1)
        if plan.stops is not None and written >= 0 and shown is not None:
            real = real & ~(torch.isin(shown, plan.stops).reshape(-1) & (column >= written))
        if mask is None and plan.pads is not None and shown is not None:
            seen_pad = torch.isin(shown, plan.pads).reshape(-1) & ((column < written) | (written < 0))
            plan.header[Header.ERRORS] |= seen_pad.any() * Fault.PADDING
    else:
        sequence = torch.bucketize(lane, plan.bounds[1:], right=True).clamp_max(b - 1)
        rank, real = lane - plan.bounds[sequence], lane < plan.bounds[-1]
    if not plan.ranked:
        sequence, rank, real = lane, torch.zeros_like(lane), torch.ones_like(lane, dtype=torch.bool)
    goes_on = plan.header[Header.GOES_ON]
    seen = plan.seen * goes_on
    plan.rank.copy_(rank)
    plan.sequence.copy_(sequence)
    plan.shown.copy_(seen)
    plan.shown.scatter_reduce_(0, sequence, torch.where(real, rank + 1, 0).to(plan.shown.dtype), "amax")
    fresh = real & (rank >= seen[sequence])
    for r in range(len(plan.skips)):
        keep = fresh & (rank >= plan.skips[r])
        if plan.spans is not None and plan.spanned[r]:
            start, stop = plan.spans[r, sequence].unbind(-1)  # [N, P]
            keep &= ((rank[:, None] >= start) & (rank[:, None] < stop)).any(1)
        plan.dest[r] = torch.where(keep, keep.cumsum(0) - 1, -1)
        plan.kept[r] = torch.zeros_like(plan.kept[r]).index_add_(0, sequence, keep.to(plan.kept.dtype))
        plan.first[r] = plan.kept[r].cumsum(0) - plan.kept[r]
        known, new, kept = real.sum(), fresh.sum(), keep.sum()
        plan.tally[r, Tally.OFFERED] = plan.positions
        plan.tally[r, Tally.KEPT] = kept
        plan.tally[r, Tally.MASKED] = plan.positions - known
        plan.tally[r, Tally.SKIPPED] = new - kept
        plan.tally[r, Tally.RESEEN] = known - new
    plan.header[Header.OPEN] = 1
    plan.header[Header.UNMASKED] = int(mask is None and plan.bounds is None)


def undo_ref(plan: Any) -> None:
    """Count what a forward that was left open has staged as rolled back."""
    lost = plan.header[Header.OPEN] * plan.stations[:, Station.FIRES] * plan.tally[plan.rules, Tally.OFFERED]
    plan.stations[:, Station.OFFERED] += lost
    plan.stations[:, Station.ROLLED_BACK] += lost
    plan.stations[:, Station.FIRES] = 0
    plan.stations[:, Station.BAD] = 0


def stage_rows_ref(
    x: Tensor,
    dest: Tensor,
    rank: Tensor,
    ranked: bool,
    cursor: Tensor,
    station: Tensor,
    rows: Tensor,
    marks: Tensor,
    norms: Tensor,
) -> None:
    """Write the kept rows of x [N, D] to the ring from the cursor on: rows [cap, D], marks [cap], norms [cap].

    A row with NaN or Inf becomes zeros, marked 0 and counted; the mark is 2 where the norm counts, 1 elsewhere.
    """
    at = torch.where(dest >= 0, (cursor[0] + dest) % len(rows), len(rows))
    finite = torch.isfinite(x).all(1)
    value = x.masked_fill(~finite.unsqueeze(1), 0.0)
    mark = torch.where(finite, torch.where((rank > 0) | (not ranked), 2, 1), 0)
    norm = value.double().norm(dim=1)
    for ring, new in ((rows, value), (marks, mark), (norms, norm)):
        padded = torch.cat([ring, ring[:1]])  # positions that are not kept go to a row that is thrown away
        padded[at] = new.to(ring.dtype)
        ring.copy_(padded[:-1])
    station[Station.FIRES] += 1
    station[Station.BAD] += ((dest >= 0) & ~finite).sum()


def place_labels_ref(
    header: Tensor, given: Tensor, source: Tensor, dest: Tensor, sequence: Tensor, cursor: Tensor, labels: Tensor
) -> None:
    """Write the kept positions' labels to the ring labels [cap]: from `given`, by sequence or by position."""
    at = torch.where(dest >= 0, (cursor[0] + dest) % len(labels), len(labels))
    lane = torch.arange(len(dest), device=dest.device)
    place = torch.where(source == Source.SEQUENCE, sequence.long(), lane)
    value = torch.where(source == Source.NONE, -1, given[place.clamp_max(len(given) - 1)])
    padded = torch.cat([labels, labels[:1]])
    padded[at] = value.to(labels.dtype)
    labels.copy_(padded[:-1])
    header[Header.ERRORS] |= (source == Source.NONE) * Fault.UNLABELLED


def place_rows_ref(
    header: Tensor,
    given: Tensor,
    labelled: bool,
    dest: Tensor,
    rank: Tensor,
    sequence: Tensor,
    tokens: Tensor,
    sequences: int,
    cursor: Tensor,
    places: Tensor,
) -> None:
    """Write the words (control.Place) of the kept positions to the ring places [cap, 8]: whose their rows are.

    Labels come from `given`, by sequence or by position. One that comes to stand where another row was not fetched yet
    is Fault.OVERRUN: cursor [2] is (committed, fetched).
    """
    lane = torch.arange(len(dest), device=dest.device)
    row, capacity = cursor[0] + dest, len(places)
    at = torch.where(dest >= 0, row % capacity, capacity)
    source = header[Header.LABELS]
    where = torch.where(source == Source.SEQUENCE, sequence.long(), lane)
    known = (source != Source.NONE) & (where < len(given)) & bool(labelled)
    label = torch.where(known, given[where.clamp_max(len(given) - 1)], -1)
    every = torch.ones_like(lane)
    words = [header[Header.BATCH] * every, header[Header.FORWARDS] * every, every * sequences]
    words += [sequence, rank, tokens, label]
    padded = torch.cat([places, places[:1]])
    padded[at, : len(words)] = torch.stack([w.long() for w in words], 1).to(places.dtype)
    places.copy_(padded[:-1])
    over = ((dest >= 0) & (row - cursor[1] >= capacity)).any()
    header[Header.ERRORS] |= over * Fault.OVERRUN | (source == Source.NONE) * bool(labelled) * Fault.UNLABELLED


def commit_ref(plan: Any, leaders: Tensor, cursors: Tensor) -> None:
    """Close the forward: where every hook point fired as declared, cursors [G, 2] and ledgers advance, else nothing is
    committed and Fault.MISSED is set. Group g follows the firing and the rule of hook point leaders[g]."""
    stations, tally = plan.stations, plan.tally[plan.rules]  # [S, 16], [S, 5]
    fires = stations[:, Station.FIRES]
    missed = torch.where(plan.optional > 0, fires > 1, fires != 1)
    whole = ~missed.any() & (plan.header[Header.OPEN] > 0)
    used = fires * whole
    lost = fires * ~whole * tally[:, Tally.OFFERED]
    stations[:, Station.MISSED] += missed
    stations[:, Station.OFFERED] += used * tally[:, Tally.OFFERED] + lost
    stations[:, Station.ROLLED_BACK] += lost
    stations[:, Station.SELECTED] += used * (tally[:, Tally.KEPT] - stations[:, Station.BAD])
    stations[:, Station.NONFINITE] += used * stations[:, Station.BAD]
    for word, count in (
        (Station.MASKED, Tally.MASKED),
        (Station.SKIPPED, Tally.SKIPPED),
        (Station.RESEEN, Tally.RESEEN),
    ):
        stations[:, word] += used * tally[:, count]
    stations[:, Station.SEEN] += used
    stations[:, Station.EXPECTED] += torch.where(plan.optional > 0, used, whole.to(used.dtype))
    stations[:, Station.FORWARDS] += whole
    stations[:, Station.UNMASKED] += whole * plan.header[Header.UNMASKED]
    cursors[: len(leaders), 0] += used[leaders] * tally[leaders, Tally.KEPT]
    plan.seen.copy_(torch.where(whole & (plan.header[Header.GOES_ON] > 0), plan.shown, plan.seen))
    plan.header[Header.ERRORS] |= missed.any() * Fault.MISSED
    plan.header[Header.FORWARDS] += whole
    plan.header[Header.OPEN] = 0
    stations[:, Station.FIRES] = 0
    stations[:, Station.BAD] = 0
