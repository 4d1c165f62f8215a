"""Labels and weights: what names and numbers become, row by row, and what is refused with the row named."""

from typing import Any

import numpy as np
import pytest
import torch

from emocore.errors import ArgumentError, LabelError, ShapeError
from emocore.labels import encode_labels, label_ids, label_names, row_weights, spread_labels

NAMES = ("at ease", "self-critical", "worn out", "on edge")


# --- names


def test_names_with_spaces_and_hyphens_stay_as_they_are() -> None:
    assert label_names(list(NAMES)) == NAMES


@pytest.mark.parametrize("given", [3, ("0", "1", "2"), np.array(["0", "1", "2"]), (str(i) for i in range(3))])
def test_count_or_any_sequence_gives_plain_names(given: Any) -> None:
    names = label_names(given)
    assert names == ("0", "1", "2")
    assert {type(n) for n in names} == {str}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["a", "b", "a"], "'a'"),
        ([], "none"),
        (0, "none"),
        (-2, "none"),
        ([1, 2], "1, 2"),
        ([["a"], "b"], r"\['a'\]"),
        ("calm", r"Write \['calm'\]"),
    ],
)
def test_names_that_are_none_are_refused(given: Any, shown: str) -> None:
    with pytest.raises(LabelError, match=shown):
        label_names(given)


# --- ids


@pytest.mark.parametrize(
    "given",
    [
        ["self-critical", None, 0, "on edge", -1],
        ("self-critical", None, 0, "on edge", -1),
        [1, -1, 0, 3, -1],
        np.array([1, -1, 0, 3, -1], dtype=np.int16),
        torch.tensor([1, -1, 0, 3, -1], dtype=torch.int8),
        [np.int64(1), None, torch.tensor(0), np.str_("on edge"), -1],
        np.array(["self-critical", None, 0, "on edge", -1], dtype=object),
    ],
)
def test_one_meaning_whatever_the_container(given: Any) -> None:
    ids = encode_labels(given, NAMES)
    assert ids.tolist() == [1, -1, 0, 3, -1]
    assert ids.dtype == torch.int32


@pytest.mark.parametrize(
    "given", [[["on edge", None], [0, 1]], np.array([[3, -1], [0, 1]]), torch.tensor([[3, -1], [0, 1]])]
)
def test_two_axes_are_kept(given: Any) -> None:
    assert encode_labels(given, NAMES).tolist() == [[3, -1], [0, 1]]


def test_no_labels_for_no_rows() -> None:
    assert encode_labels([], NAMES).shape == (0,)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["at ease", "worn-out"], r"row 1.*Did you mean 'worn out'"),
        (["on edge", 4], r"row 1; expected -1 \.\. 3; got 4"),
        ([0, -2, 9], r"row 1.*2 labels are out of range; nothing was accumulated"),
        (torch.tensor([[0, 1], [7, 0]]), r"row \(1, 0\)"),
        (torch.tensor([0.0, 1.0]), r"integers or names; got torch\.float32"),
        ([0, 0.5], r"row 1; got 0\.5"),
        (np.array([0.0, 1.0]), "neither a name nor an integer at row 0"),
        ([0, b"at ease"], "row 1"),
        ("at ease", "one a row"),
    ],
)
def test_what_is_no_label_is_refused_with_its_row(given: Any, shown: str) -> None:
    with pytest.raises(LabelError, match=shown):
        encode_labels(given, NAMES)


def test_ragged_labels_are_refused() -> None:
    with pytest.raises(ShapeError, match="ragged"):
        encode_labels([[0, 1], [2]], NAMES)


def test_large_numbers_are_not_wrapped() -> None:
    with pytest.raises(LabelError, match=str(2**32)):
        encode_labels(torch.tensor([2**32]), NAMES)


# --- one a row, or one a sequence


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (2, 1, 3)])
def test_one_a_sequence_is_given_to_each_of_its_rows(shape: tuple[int, ...]) -> None:
    assert spread_labels(torch.tensor([5, 6]), shape).tolist() == [5, 5, 5, 6, 6, 6]


def test_one_a_row_is_taken_in_order() -> None:
    assert spread_labels(torch.tensor([[1, 2], [3, 4]]), (2, 2)).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "shape", "expected"),
    [
        ((3,), (2,), r"\[2\]"),
        ((3,), (2, 3), r"\[2\] or \[2, 3\]"),
        ((3, 2), (2, 3), r"got \[3, 2\]"),
        ((), (1,), r"\[1\]"),
    ],
)
def test_labels_of_another_shape_are_refused(given: tuple[int, ...], shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ShapeError, match=expected):
        spread_labels(torch.zeros(given), shape)


def test_no_labels_are_unlabelled_rows() -> None:
    assert label_ids(None, NAMES, (2, 2)).tolist() == [-1] * 4
    assert label_ids(None, (), (0, 4)).shape == (0,)


def test_labels_need_names() -> None:
    with pytest.raises(LabelError, match="keeps none"):
        label_ids([0], (), (1,))


# --- weights


@pytest.mark.parametrize("given", [[0, 2.5], (0, 2.5), np.array([0, 2.5], dtype=np.float32), torch.tensor([0, 2.5])])
def test_weights_become_float64_one_a_row(given: Any) -> None:
    weights = row_weights(given, (2, 2))
    assert weights is not None
    assert weights.dtype == torch.float64
    assert weights.tolist() == [0, 0, 2.5, 2.5]


def test_no_weights_stay_none() -> None:
    assert row_weights(None, (3,)) is None


@pytest.mark.parametrize(
    ("given", "kind", "shown"),
    [
        ([1.0, -1.0], ArgumentError, r"got \[-1\.0\]"),
        ([float("nan"), 1.0], ArgumentError, "nan"),
        ([float("inf"), 1.0], ArgumentError, "inf"),
        (["a", "b"], ArgumentError, "numbers"),
        ([[1.0], [1.0, 2.0]], ArgumentError, "numbers"),
        ([1.0], ShapeError, r"weights; expected \[2\]; got \[1\]"),
    ],
)
def test_what_is_no_weight_is_refused(given: Any, kind: type[Exception], shown: str) -> None:
    with pytest.raises(kind, match=shown):
        row_weights(given, (2,))
