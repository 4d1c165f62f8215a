"""Fitting: from the moments of labelled rows to patterns, and to the readers that tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import linalg, packing
from .errors import FitError, ShapeError
from .moments import Moments

METHODS = ("difference", "whitened")
WHITENERS = ("labels", "neutral")
NOISE_LIMIT = 1e-3  # rounding noise of a float32 reader against the spread of its scores
EQUAL = 1e-12  # label means closer than this, relative to their length, are the same to rounding


@dataclass(frozen=True)
class Recipe:
    """The options of a fit; raises FitError for values without a meaning."""

    method: str = "difference"
    whiten_by: str = "labels"
    shrinkage: float = 0.3
    rank: int | None = 20
    explained: float | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("whiten_by", self.whiten_by, WHITENERS),
        ):
            if value not in known:
                raise FitError(name, expected=" or ".join(map(repr, known)), got=repr(value))
        if self.rank is not None and self.rank < 1:
            raise FitError("rank", expected="at least 1, or None for all", got=self.rank)
        if self.explained is not None and not 0 <= self.explained <= 1:
            raise FitError("explained", expected="a fraction 0 .. 1 of the variance", got=self.explained)

    def share(self, neutral: Moments | None) -> float:
        """Fraction of the neutral variance to take out: by default 0.5 for a difference, nothing where whitened."""
        if self.explained is None:
            return 0.5 if self.method == "difference" and neutral is not None else 0.0
        if self.explained > 0 and neutral is None:
            raise FitError("explained: there is no neutral variance to take out", way_out="Give neutral=.")
        return self.explained

    def record(self) -> dict[str, Any]:
        """What of the recipe was used, for the provenance."""
        whitened = self.method == "whitened"
        return {
            "method": self.method,
            "whiten_by": self.whiten_by if whitened else None,
            "shrinkage": self.shrinkage if whitened else None,
            "rank": self.rank if whitened else None,
        }


@dataclass(frozen=True)
class Fitted:
    """patterns, readers [K, D], centre [D], residual [K], and what was done to get them."""

    patterns: Tensor
    readers: Tensor
    centre: Tensor
    residual: Tensor
    record: dict[str, Any]


def derive(stories: Moments, neutral: Moments | None, scatter: Moments | None, recipe: Recipe) -> Fitted:
    """Patterns: label means less their mean, less the confounds. Readers: those, whitened if asked, at unit length."""
    _check_widths(stories, neutral=neutral, scatter=scatter)
    means = _label_means(stories)
    centre = means.mean(0)
    differences = means - centre
    share = recipe.share(neutral)
    basis, reached = _confounds(neutral, share, differences)
    patterns = linalg.project_out(differences, basis)
    lengths = differences.norm(dim=1)
    residual = patterns.norm(dim=1) / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    _check_lengths(stories.labels, (residual < 1e-6) | (lengths <= EQUAL * means.norm(dim=1).max()))
    readers = patterns
    if recipe.method == "whitened":
        spread = _whitening_covariance(stories, neutral, scatter, recipe.whiten_by)
        readers = whiten(patterns, linalg.shrink(spread, recipe.shrinkage), recipe.rank)
    noisy = next((s.covariance() for s in (scatter, stories, neutral) if s is not None and s.keeps_covariance), None)
    readers, noise = _rounded(linalg.unit(readers)[0], noisy)
    record = {
        **recipe.record(),
        "explained": share,
        "confounds": len(basis),
        "confounds_reach": reached,
        "rows": stories.count,
        "reader_noise": noise,
        "parts": None if noisy is None else packing.parts_by_dtype(readers, noisy),
    }
    return Fitted(patterns, readers, centre, residual, record)


def whiten(patterns: Tensor, covariance: Tensor, rank: int | None) -> Tensor:
    """Readers V C^-1 [K, D], the whitened patterns V C^(-1/2) kept to their `rank` leading components.

    The optimal linear reader of a pattern in noise C; reduced-rank as in linear discriminant analysis (Hastie,
    Tibshirani and Friedman, section 4.3.3).
    """
    w = linalg.whitener(covariance)
    whitened = patterns @ w
    if rank is not None and rank < min(whitened.shape):
        basis = torch.linalg.svd(whitened, full_matrices=False)[2][:rank]
        whitened = (whitened @ basis.T) @ basis
    return whitened @ w


def _check_widths(stories: Moments, **others: Moments | None) -> None:
    for name, other in others.items():
        if other is not None and other.dim != stories.dim:
            raise ShapeError(f"{name}: width", expected=f"D = {stories.dim}, like stories", got=other.dim)


def _label_means(stories: Moments) -> Tensor:
    if len(stories.labels) < 2:
        raise FitError(
            "stories: directions are differences between labels",
            expected="at least 2",
            got=len(stories.labels),
        )
    empty = [n for n, count in zip(stories.labels, stories.label_count.tolist(), strict=True) if not count]
    if empty:
        raise FitError(
            f"stories: {len(empty)} labels have no row",
            got=empty[:8],
            way_out="Give them text, or leave the labels out.",
        )
    return stories.label_mean


def _confounds(neutral: Moments | None, share: float, like: Tensor) -> tuple[Tensor, float]:
    if neutral is None or share == 0:
        return like.new_zeros(0, like.shape[1]), 0.0
    basis, reached = linalg.principal_subspace(neutral.covariance(), share)
    if not len(basis):
        raise FitError("neutral: its rows do not vary", got=f"{neutral.count} rows", way_out="Give more neutral text.")
    return basis, reached


def _check_lengths(names: Sequence[str], flat: Tensor) -> None:
    lost = [n for n, bad in zip(names, flat.tolist(), strict=True) if bad]
    if lost:
        raise FitError(
            "patterns: nothing is left of a direction once centre and confounds are taken out",
            got=lost[:8],
            way_out="Lower `explained`, or give rows that tell the labels apart.",
        )


def _whitening_covariance(stories: Moments, neutral: Moments | None, scatter: Moments | None, whiten_by: str) -> Tensor:
    source = scatter if scatter is not None else (stories if whiten_by == "labels" else neutral)
    if source is None:
        raise FitError("neutral: whiten_by='neutral' needs the neutral Moments", way_out="Give neutral=.")
    if whiten_by == "neutral":
        return source.covariance()
    if not source.labels:
        raise FitError(
            "scatter: whiten_by='labels' needs labelled Moments",
            way_out="Give labels, or whiten_by='neutral'.",
        )
    freedom = source.count - int((source.label_count > 0).sum())
    if freedom < 1:
        raise FitError(
            "whitened: one row per label leaves no scatter within labels",
            got=f"{source.count} rows, {len(source.labels)} labels",
            way_out="Give more stories per label, or method='difference'.",
        )
    return source.within_scatter() / freedom


def _rounded(readers: Tensor, c: Tensor | None) -> tuple[Tensor, float | None]:
    """Readers in float32, or in float64 where rounding would add noise sqrt(e'Ce) above 1e-3 of sqrt(v'Cv).

    C is a covariance of rows; without one the noise is not known.
    """
    single = readers.float()
    if c is None:
        return single, None
    error = readers - single.double()
    noise = ((error @ c) * error).sum(1).clamp_min(0).sqrt()
    spread = ((readers @ c) * readers).sum(1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    worst = float((noise / spread).max())
    return (readers if worst > NOISE_LIMIT else single), worst
