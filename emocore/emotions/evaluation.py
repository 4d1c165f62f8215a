"""Evaluation: how well directions read emotions in text they were not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..directions import Directions
from ..errors import ArgumentError, FitError
from .extraction import Extraction
from .geometry import agreement, auroc


@dataclass(frozen=True)
class Identification:
    """How texts of known label score: mean one-against-rest `auroc` (chance 0.5), how often the right label is among
    the ten highest (`top10`), the rank of the right label per text [N] (0 is best), and how many labels there are."""

    auroc: float
    top10: float
    ranks: Tensor
    labels: int

    @property
    def top10_chance(self) -> float:
        """What `top10` would be by chance."""
        return min(10 / self.labels, 1.0)


def identify(scores: Tensor, truth: Sequence[int]) -> Identification:
    """Judge scores [N, K] of texts whose right label is truth [N]; labels without a text are left out of the mean."""
    right = torch.as_tensor(truth)
    if len(right) != len(scores) or not len(right):
        raise ArgumentError("truth", expected=f"{len(scores)} labels", got=len(right))
    present = right.unique().tolist()
    areas = [auroc(scores[:, k], right == k) for k in present]
    own = scores.gather(1, right[:, None])
    ranks = (scores > own).sum(1)
    return Identification(sum(areas) / len(areas), float((ranks < 10).double().mean()), ranks, scores.shape[1])


def leave_one_group_out(
    run: Extraction, labels: Sequence[str], groups: Sequence[str], **options: Any
) -> dict[str, Identification]:
    """Score every group's pooled rows with directions fitted on the other groups; {hook point: Identification}.

    Each group is judged by itself, so that no label profits from its topic; scores are in standard deviations over the
    stories fitted on. `options` are those of `Directions.fit`; needs `extract(..., keep_rows=True)`.
    """
    names = list(run.groups)
    if len(names) < 2:
        raise FitError("groups: nothing can be left out", expected="at least 2 groups", got=names)
    found: dict[str, list[Identification]] = {}
    for left_out in names:
        rest = run.only([g for g in names if g != left_out])
        for name, vectors in rest.fit(**options).items():
            rows, truth = group_rows(run, name, vectors, labels, groups, left_out)
            scores = vectors.calibrate(rest.stories[name]).score(rows, kind="z")
            found.setdefault(name, []).append(identify(scores, truth))
    return {name: _mean(parts) for name, parts in found.items()}


def group_rows(
    run: Extraction, hook_point: str, vectors: Directions, labels: Sequence[str], groups: Sequence[str], group: str
) -> tuple[Tensor, list[int]]:
    """Pooled rows [N, D] of one group's texts at a hook point, and the right direction of each."""
    if not run.rows:
        raise FitError("run: it kept no rows", way_out="Use extract(..., keep_rows=True).")
    mine = [i for i, place in enumerate(run.places) if groups[place] == group]
    return run.rows[hook_point][mine], vectors.index([labels[run.places[i]] for i in mine])


def _mean(parts: Sequence[Identification]) -> Identification:
    n = len(parts)
    return Identification(
        sum(p.auroc for p in parts) / n,
        sum(p.top10 for p in parts) / n,
        torch.cat([p.ranks for p in parts]),
        parts[0].labels,
    )


def halves(run: Extraction, **options: Any) -> dict[str, float]:
    """Agreement of directions fitted on one half of the groups and on the other; {hook point: mean cosine}."""
    names = list(run.groups)
    if len(names) < 2:
        raise FitError("groups: no halves to compare", expected="at least 2 groups", got=names)
    one, other = run.only(names[0::2]).fit(**options), run.only(names[1::2]).fit(**options)
    return {name: agreement(one[name], other[name]) for name in one}


def control(
    vectors: Mapping[str, Directions], run: Extraction, labels: Sequence[str], groups: Sequence[str]
) -> dict[str, Identification]:
    """Judge given directions on every group of `run`, as `leave_one_group_out` judges fitted ones."""
    found = {}
    for name, directions in vectors.items():
        scaled = directions.calibrate(run.stories[name])
        parts = []
        for group in run.groups:
            rows, truth = group_rows(run, name, scaled, labels, groups, group)
            parts.append(identify(scaled.score(rows, kind="z"), truth))
        found[name] = _mean(parts)
    return found
