"""Fitting: what a fit records, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emocore.directions import Directions
from emocore.errors import ArgumentError, FitError, LabelError, ShapeError
from emocore.moments import Moments
from emocore.tokens import Tokens


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stories_of(d: int = 4, labels: int = 3, rows: int = 24) -> Moments:
    m = Moments(labels=labels, covariance=True)
    m.update(randn(rows, d), torch.arange(rows) % labels)
    return m


def neutral_of(d: int) -> Moments:
    m = Moments(covariance=True)
    m.update(randn(20, d, seed=1))
    return m


def test_a_rule_of_tokens_and_a_norm_come_from_the_stories() -> None:
    stories = stories_of(labels=2)
    stories.tokens = Tokens(skip=49, pool="mean")
    found = Directions.fit(stories, hook_point="layers.3", provenance={"model": "Toy"})
    assert found.tokens == Tokens(skip=49, pool="mean")
    assert found.mean_norm == stories.mean_norm
    assert found.hook_point == "layers.3"
    assert found.provenance["model"] == "Toy"
    assert found.provenance["method"] == "difference"
    assert found.provenance["rows"] == 24


def one_row_a_label() -> Moments:
    m = Moments(labels=["calm", "sad"], covariance=True)
    m.update(torch.eye(2), ["calm", "sad"])
    return m


def test_one_story_a_label_carries_a_difference_but_no_whitening() -> None:
    assert len(Directions.fit(one_row_a_label())) == 2
    with pytest.raises(FitError, match=r"one row per label.*2 rows, 2 labels.*method='difference'"):
        Directions.fit(one_row_a_label(), method="whitened")


def test_labels_without_rows_are_refused_by_name() -> None:
    m = Moments(labels=["calm", "on edge", "sad"])
    m.update(torch.eye(2), ["calm", "sad"])
    with pytest.raises(FitError, match=r"1 labels have no row; got \['on edge'\]"):
        Directions.fit(m)


def test_equal_label_means_are_refused() -> None:
    m = Moments(labels=["calm", "sad"])
    rows = randn(7, 3)
    m.update(rows, ["calm"] * 7)
    m.update(rows.flip(0), ["sad"] * 7)  # the same mean, but for the last digit
    with pytest.raises(FitError, match=r"nothing is left.*'calm', 'sad'"):
        Directions.fit(m)


@pytest.mark.parametrize("labels", [None, ["calm"]])
def test_fewer_than_two_labels_are_refused(labels: list[str] | None) -> None:
    m = Moments(labels=labels)
    m.update(torch.eye(2), None if labels is None else ["calm", "calm"])
    with pytest.raises(FitError, match="at least 2"):
        Directions.fit(m)


def test_unlabelled_rows_have_no_within_label_scatter() -> None:
    stories = stories_of()
    stories.update(torch.ones(1, 4))
    with pytest.raises(LabelError, match="1 of 25 rows unlabelled"):
        Directions.fit(stories, method="whitened")


def test_a_singular_covariance_cannot_whiten_unshrunk() -> None:
    m = Moments(labels=2, covariance=True)
    m.update(randn(6, 20), torch.tensor([0, 1] * 3))
    with pytest.raises(FitError, match=r"singular.*shrinkage"):
        Directions.fit(m, method="whitened", shrinkage=0.0)
    assert len(Directions.fit(m, method="whitened")) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "lda"}, "'difference' or 'whitened'"),
        ({"whiten_by": "stories"}, "'labels' or 'neutral'"),
        ({"method": "whitened", "rank": 0}, "rank; expected at least 1"),
        ({"method": "whitened", "shrinkage": 1.5}, "shrinkage; expected 0 .. 1"),
        ({"explained": 1.5}, "explained; expected a fraction"),
        ({"explained": -0.5}, "explained; expected a fraction"),
        ({"explained": 0.5}, "no neutral variance"),
        ({"method": "whitened", "whiten_by": "neutral"}, "needs the neutral Moments"),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FitError, match=said):
        Directions.fit(stories_of(), **options)


def test_neutral_rows_that_do_not_vary_are_refused() -> None:
    neutral = Moments(covariance=True)
    neutral.update(torch.ones(1, 4))
    with pytest.raises(FitError, match="neutral: its rows do not vary; got 1 rows"):
        Directions.fit(stories_of(), neutral)


def test_other_widths_are_refused() -> None:
    stories = stories_of()
    with pytest.raises(ShapeError, match="neutral: width; expected D = 4"):
        Directions.fit(stories, neutral_of(5))
    with pytest.raises(ShapeError, match="scatter: width; expected D = 4"):
        Directions.fit(stories, scatter=stories_of(5), method="whitened")


def test_a_mapping_names_its_hook_points_itself() -> None:
    with pytest.raises(ArgumentError, match="hook_point"):
        Directions.fit({"layers.0": stories_of()}, hook_point="layers.0")
