"""Every op in plain PyTorch float64: the oracle of the tests, the fallback, and the benchmarks' baseline, in one.

Shapes: rows [N, D], labels [N] int32, weights [N] float64, shift [D] float64, readers [K, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import pack_tiles


def stage_ref(x: Tensor, index: Tensor | None, rows: Tensor, norms: Tensor, finite: Tensor) -> None:
    """rows = x[index] (to rows' dtype), norms = |x|; a row with NaN or Inf becomes zeros with norm 0 and finite
    False.
    """
    taken = x if index is None else x[index]
    finite.copy_(torch.isfinite(taken).all(dim=1))
    rows.copy_(taken.masked_fill(~finite.unsqueeze(1), 0.0))
    norms.copy_(rows.double().norm(dim=1))


def label_sums_ref(
    rows: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    shift: Tensor,
    sums: Tensor,
    squares: Tensor | None,
) -> None:
    """sums[k] += w (x - s), squares[k] += w (x - s)^2 for the rows of label k; label -1 is left out, no labels means
    k = 0.
    """
    y = rows.double() - shift
    w = torch.ones(len(rows), dtype=torch.float64, device=rows.device) if weights is None else weights
    k = torch.zeros(len(rows), dtype=torch.long, device=rows.device) if labels is None else labels.long()
    keep = k >= 0
    y, w, k = y[keep], w[keep].unsqueeze(1), k[keep]
    sums.index_add_(0, k, w * y)
    if squares is not None:
        squares.index_add_(0, k, w * y * y)


def gram_ref(rows: Tensor, weights: Tensor | None, shift: Tensor, tiles: Tensor) -> None:
    """Lower tiles += sum over rows of w (x - s)(x - s)'."""
    y = rows.double() - shift
    if weights is not None:
        y = y * weights.sqrt().unsqueeze(1)
    tiles += pack_tiles(y.T @ y)


def project_ref(
    rows: Tensor,
    readers: Tensor,
    centre: Tensor | None,
    normalise: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """(x - c) . v_k [N, K], over |x - c| when `normalise` (a zero row scores 0), less mean [K], over std [K]."""
    y = rows.double()
    if centre is not None:
        y = y - centre
    scores = y @ readers.double().T
    if normalise:
        norms = y.norm(dim=1, keepdim=True)
        scores = torch.where(norms > 0, scores / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    if mean is not None:
        scores = scores - mean
    if std is not None:
        scores = scores / std
    return scores.to(score_dtype(rows, readers))


def score_dtype(rows: Tensor, readers: Tensor) -> torch.dtype:
    """float64 where rows or readers are, else float32."""
    return torch.float64 if torch.float64 in (rows.dtype, readers.dtype) else torch.float32


def steer_add_ref(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta [D], rounded once to x's dtype."""
    return (x.double() + delta.double()).to(x.dtype)


def steer_set_ref(x: Tensor, basis: Tensor, dual: Tensor, target: Tensor) -> Tensor:
    """x + (target - x B') B* : moves the scores x B' of basis [R, D] to target [R] along the dual [R, D]."""
    y = x.double()
    return (y + (target.double() - y @ basis.double().T) @ dual.double()).to(x.dtype)
