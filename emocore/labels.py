"""Labels and weights, one a row or one a sequence. Labels are names or numbers, made into ids; -1 is unlabelled."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, LabelError, ShapeError, near

Labels: TypeAlias = Tensor | np.ndarray[Any, Any] | Sequence[Any]
Weights: TypeAlias = Tensor | np.ndarray[Any, Any] | Sequence[float]


def label_names(labels: int | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the labels a sink keeps: a count gives "0", "1", ...; raises LabelError for doubled names.

    >>> label_names(3), label_names(["at ease", "self-critical"]), label_names(None)
    (('0', '1', '2'), ('at ease', 'self-critical'), ())
    """
    if labels is None:
        return ()
    if isinstance(labels, str):
        raise LabelError("labels", expected="a sequence of names", got=repr(labels), way_out=f"Write [{labels!r}].")
    names = tuple(map(str, range(labels))) if isinstance(labels, int) else tuple(labels)
    wrong = sorted({repr(n) for n in names if not isinstance(n, str) or names.count(n) > 1})
    if wrong or not names:
        raise LabelError("labels", expected="distinct names, at least one", got=", ".join(wrong[:8]) or "none")
    return tuple(map(str, names))


def encode_labels(labels: Labels, names: Sequence[str]) -> Tensor:
    """Ids int32 of the shape of `labels`: names by their place in `names`, numbers as they are, None as -1.

    Raises LabelError naming the row of an unknown name or a number outside -1 .. K-1, ShapeError for ragged labels.

    >>> encode_labels(["sad", None, 0], ["calm", "sad"])
    tensor([ 1, -1,  0], dtype=torch.int32)
    """
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.is_complex():
            raise LabelError("labels", expected="integers or names", got=labels.dtype)
        ids = labels.detach().to("cpu", torch.int64)
    elif isinstance(labels, str):
        raise LabelError("labels", expected="one a row", got=repr(labels))
    else:
        place = {name: i for i, name in enumerate(names)}
        numbers = _numbers(labels, place, names)
        try:
            ids = torch.tensor(numbers, dtype=torch.int64)
        except ValueError as error:
            raise ShapeError("labels: ragged", got=str(error)) from error
    bad = ((ids < -1) | (ids >= len(names))).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        raise LabelError(
            f"labels: out of range at row {at[0] if len(at) == 1 else at}",
            expected=f"-1 .. {len(names) - 1}",
            got=int(ids[at]),
            way_out=f"{len(bad)} labels are out of range; nothing was accumulated.",
        )
    return ids.to(torch.int32)


def _numbers(values: Any, place: dict[str, int], names: Sequence[str]) -> list[Any]:
    out: list[Any] = []
    for row, value in enumerate(_listed(values)):
        value = _listed(value)
        if isinstance(value, (list, tuple)):
            out.append(_numbers(value, place, names))
        elif value is None:
            out.append(-1)
        elif isinstance(value, str):
            if value not in place:
                raise LabelError(f"labels: unknown name at row {row}", got=repr(value), way_out=near(value, names))
            out.append(place[value])
        else:
            try:
                out.append(operator.index(value))
            except TypeError:
                raise LabelError(f"labels: neither a name nor an integer at row {row}", got=repr(value)) from None
    return out


def _listed(values: Any) -> Any:
    """Arrays and tensors as lists of plain values; scalars of theirs as one."""
    return values.tolist() if hasattr(values, "tolist") else values


def spread_labels(ids: Tensor, shape: Sequence[int], argument: str = "labels") -> Tensor:
    """Ids of every row of a batch of leading `shape`: given one a row, or one a sequence (the first axis)."""
    shape = tuple(shape)
    if tuple(ids.shape) == shape:
        return ids.reshape(-1)
    if len(shape) > 1 and tuple(ids.shape) == shape[:1]:
        return ids.reshape(-1, *([1] * (len(shape) - 1))).expand(shape).reshape(-1)
    expected = f"{list(shape[:1])} or {list(shape)}" if len(shape) > 1 else list(shape)
    raise ShapeError(argument, expected=expected, got=list(ids.shape))


def label_ids(labels: Labels | None, names: Sequence[str], shape: Sequence[int]) -> Tensor:
    """Ids [N] int32 of every row of a batch of leading `shape`; raises LabelError where no labels are kept."""
    if labels is None:
        return torch.full((math.prod(shape),), -1, dtype=torch.int32)
    if not names:
        raise LabelError("labels: this Moments keeps none", way_out="Construct it with Moments(labels=...).")
    return spread_labels(encode_labels(labels, names), shape)


def row_weights(weights: Weights | None, shape: Sequence[int]) -> Tensor | None:
    """Weights [N] float64 of every row of a batch of leading `shape`; raises ArgumentError for what is no weight."""
    if weights is None:
        return None
    try:
        given = weights.detach() if isinstance(weights, Tensor) else torch.from_numpy(np.array(weights, np.float64))
    except (ValueError, TypeError) as error:
        raise ArgumentError("weights", expected="numbers", got=str(error)) from error
    spread = spread_labels(given.to("cpu", torch.float64), shape, "weights")
    bad = ~(spread.isfinite() & (spread >= 0))
    if bool(bad.any()):
        raise ArgumentError("weights", expected="finite values >= 0", got=spread[bad][:8].tolist())
    return spread
