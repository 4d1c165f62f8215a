"""Covariance algebra in float64: packed tiles, shrinkage, whitening, principal subspace, orthonormal span."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import FitError, ShapeError
from .precision import TILE


def tile_count(dim: int) -> int:
    """How many 128 x 128 tiles hold the lower triangle of a [dim, dim] matrix."""
    panels = -(-dim // TILE)
    return panels * (panels + 1) // 2


def unpack_tiles(tiles: Tensor, dim: int) -> Tensor:
    """Symmetric [D, D] from packed lower tiles [T, 128, 128]; i(i+1)/2 + j holds panel i by panel j."""
    if tiles.shape[0] != tile_count(dim):
        raise ShapeError("tiles", expected=f"{tile_count(dim)} tiles for D={dim}", got=f"{tiles.shape[0]}")
    panels = -(-dim // TILE)
    lower = tiles.new_zeros(panels * TILE, panels * TILE)
    for i in range(panels):
        for j in range(i + 1):
            lower[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE] = tiles[i * (i + 1) // 2 + j]
    lower = lower[:dim, :dim].tril()
    return lower + lower.tril(-1).T


def pack_tiles(matrix: Tensor) -> Tensor:
    """Packed lower tiles [T, 128, 128] of a symmetric [D, D] matrix; `unpack_tiles` reads only its lower triangle."""
    dim = matrix.shape[0]
    panels = -(-dim // TILE)
    padded = matrix.new_zeros(panels * TILE, panels * TILE)
    padded[:dim, :dim] = matrix
    return torch.stack(
        [padded[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE] for i in range(panels) for j in range(i + 1)]
    )


def tile_diagonal(tiles: Tensor, dim: int) -> Tensor:
    """Diagonal [D] of the matrix that packed lower tiles hold."""
    panels = -(-dim // TILE)
    return torch.cat([tiles[i * (i + 1) // 2 + i].diagonal() for i in range(panels)])[:dim]


def shrink(covariance: Tensor, shrinkage: float) -> Tensor:
    """(1 - l) C + l tr(C)/D I: linear shrinkage towards the scaled identity (Ledoit and Wolf 2004), free of units.

    >>> shrink(torch.diag(torch.tensor([3.0, 1.0])), 0.5)
    tensor([[2.5000, 0.0000],
            [0.0000, 1.5000]])
    """
    if not 0.0 <= shrinkage <= 1.0:
        raise FitError("shrinkage", expected="0 .. 1", got=shrinkage)
    dim = covariance.shape[0]
    eye = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    return (1.0 - shrinkage) * covariance + shrinkage * covariance.trace() / dim * eye


def whitener(covariance: Tensor) -> Tensor:
    """Symmetric inverse square root C^(-1/2) [D, D]; raises FitError where C is singular to working precision."""
    values, vectors = torch.linalg.eigh(_finite(covariance))
    floor = values[-1].clamp_min(0) * covariance.shape[0] * torch.finfo(covariance.dtype).eps
    if not bool(values[-1] > 0) or bool(values[0] <= floor):
        raise FitError(
            "covariance: singular, so it cannot whiten",
            got=f"smallest eigenvalue {values[0].item():.3g} of {values[-1].item():.3g}",
            way_out="Give shrinkage > 0, or more rows than dimensions.",
        )
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root


def _finite(covariance: Tensor) -> Tensor:
    if not bool(covariance.isfinite().all()):
        raise FitError("covariance: not finite", way_out="Some statistic overflowed, or a label had no row.")
    return covariance


def principal_subspace(covariance: Tensor, explained: float) -> tuple[Tensor, float]:
    """Orthonormal basis [k, D] of the fewest leading components that reach `explained` of the trace; what they reach.

    Each component's sign makes its largest entry positive.

    >>> basis, reached = principal_subspace(torch.diag(torch.tensor([6.0, 3.0, 1.0])), 0.5)
    >>> basis.tolist(), round(reached, 6)
    ([[1.0, 0.0, 0.0]], 0.6)
    """
    if not 0.0 <= explained <= 1.0:
        raise FitError("explained", expected="a fraction 0 .. 1 of the variance", got=explained)
    dim = covariance.shape[0]
    trace = _finite(covariance).trace()
    if explained == 0.0 or not bool(trace > 0):
        return covariance.new_zeros(0, dim), 0.0
    values, vectors = torch.linalg.eigh(covariance)
    share = values.flip(0).clamp_min(0).cumsum(0) / trace
    # the last share is 1 only to rounding: asking for all of it must not run past the end
    k = min(int((share < explained - 1e-12).sum()) + 1, dim)
    basis = vectors.flip(1)[:, :k].T
    peak = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return basis * peak.sign(), float(share[k - 1])


def project_out(vectors: Tensor, basis: Tensor) -> Tensor:
    """vectors - (vectors B') B for an orthonormal basis B [k, D]; twice, so that the rest is orthogonal to rounding."""
    for _ in range(2):
        vectors = vectors - (vectors @ basis.T) @ basis
    return vectors


def orthonormal_span(vectors: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Orthonormal basis [r, D] of the span of `vectors` [K, D], without directions below `tolerance` of the largest."""
    values: Tensor
    basis: Tensor
    _, values, basis = torch.linalg.svd(vectors, full_matrices=False)
    if not len(values) or not bool(values[0] > 0):
        return vectors.new_zeros(0, vectors.shape[1])
    return basis[values > tolerance * values[0]]


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length one, and their norms [K]; a zero row stays zero."""
    norms = vectors.norm(dim=-1)
    return vectors / norms.clamp_min(torch.finfo(vectors.dtype).tiny).unsqueeze(-1), norms
