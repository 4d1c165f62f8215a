"""Geometry of a set of directions: cosines, principal components, clusters, agreement, valence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..directions import Directions
from ..errors import ArgumentError
from .words import valence


def cosines(vectors: Directions) -> Tensor:
    """Cosine of every pair of unit patterns [K, K]."""
    return vectors.unit @ vectors.unit.T


def components(vectors: Directions, k: int = 2) -> tuple[Tensor, Tensor]:
    """Principal components of the unit patterns: scores [K, k] and each one's share of the variance [k].

    Unit, because components of unnormalised vectors mostly measure their length. The largest loading is made positive.
    """
    centred = vectors.unit - vectors.unit.mean(0)
    u, s, basis = torch.linalg.svd(centred, full_matrices=False)
    sign = basis[:k].gather(1, basis[:k].abs().argmax(1, keepdim=True)).sign().squeeze(1)
    return (u[:, :k] * s[:k]) * sign, (s**2 / (s**2).sum())[:k]


def clusters(vectors: Directions, k: int = 10, seed: int = 0, rounds: int = 100) -> Tensor:
    """Cluster of every direction [K] int64: k-means on unit patterns (Lloyd 1982), seeded by k-means++ (Arthur
    2007).
    """
    x = vectors.unit
    if not 1 <= k <= len(x):
        raise ArgumentError("k", expected=f"1 .. {len(x)}", got=k)
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    for _ in range(k - 1):
        far = torch.cdist(x, centres).amin(1) ** 2
        # fewer distinct points than clusters leave no distance to draw by
        weights = far if bool(far.sum() > 0) else torch.ones_like(far)
        centres = torch.cat([centres, x[torch.multinomial(weights, 1, generator=generator)]])
    for _ in range(rounds):
        nearest = torch.cdist(x, centres).argmin(1)
        means = torch.stack([x[nearest == j].mean(0) if bool((nearest == j).any()) else centres[j] for j in range(k)])
        if torch.equal(means, centres):
            break
        centres = means
    return nearest


def agreement(a: Directions, b: Directions) -> float:
    """Mean cosine between directions of the same name fitted on different halves of the data."""
    if a.names != b.names:
        raise ArgumentError("a, b: names differ", expected=a.names[:4], got=b.names[:4])
    return float((a.unit * b.unit).sum(1).mean())


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative, ties half: the Mann-Whitney statistic; scores, positive [N].

    >>> auroc(torch.tensor([0.9, 0.1, 0.5]), torch.tensor([True, False, False]))
    1.0
    """
    up, down = scores[positive], scores[~positive]
    if not len(up) or not len(down):
        raise ArgumentError("positive", expected="both kinds", got=f"{len(up)} of {len(scores)} positive")
    above = (up[:, None] > down[None, :]).double() + 0.5 * (up[:, None] == down[None, :]).double()
    return float(above.mean())


def valence_auroc(vectors: Directions, words: Sequence[str] | None = None) -> float:
    """How well the first component tells words of positive clusters from negative ones, either way round: 0.5 .. 1."""
    signs = torch.tensor([valence(word) for word in (words or vectors.names)])
    first = components(vectors, 1)[0][:, 0]
    found = auroc(first[signs != 0], signs[signs != 0] > 0)
    return max(found, 1 - found)
