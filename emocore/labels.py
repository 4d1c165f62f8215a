"""Labels: names or numbers, one a row or one a sequence, to ids; -1 is unlabelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .errors import LabelError, ShapeError, near

Labels: TypeAlias = Tensor | Sequence[Any]


def label_names(labels: int | Sequence[str] | None) -> tuple[str, ...]:
    """Names of the labels a sink keeps: a count gives "0", "1", ...; raises LabelError for doubled names."""
    if labels is None:
        return ()
    names = tuple(str(i) for i in range(labels)) if isinstance(labels, int) else tuple(labels)
    if not names or len(set(names)) != len(names) or not all(isinstance(n, str) for n in names):
        doubled = sorted({str(n) for n in names if names.count(n) > 1})
        raise LabelError("labels", expected="distinct names, at least one", got=doubled or names)
    return names


def encode_labels(labels: Labels, names: Sequence[str]) -> Tensor:
    """Ids int32 of the shape of `labels`: names by their place in `names`, numbers as they are, None as -1.

    Raises LabelError naming the row of an unknown name or a number outside -1 .. K-1.

    >>> encode_labels(["sad", None, 0], ["calm", "sad"])
    tensor([ 1, -1,  0], dtype=torch.int32)
    """
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.is_complex():
            raise LabelError("labels", expected="integers or names", got=labels.dtype)
        ids = labels.detach().to("cpu", torch.int64)
    else:
        place = {name: i for i, name in enumerate(names)}
        nested = [list(row) if isinstance(row, (list, tuple)) else row for row in labels]
        ids = torch.tensor(_numbers(nested, place, names), dtype=torch.int64)
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


def _numbers(values: list[Any], place: dict[str, int], names: Sequence[str]) -> list[Any]:
    out: list[Any] = []
    for row, value in enumerate(values):
        if isinstance(value, list):
            out.append(_numbers(value, place, names))
        elif value is None:
            out.append(-1)
        elif isinstance(value, str):
            if value not in place:
                raise LabelError(f"labels: unknown name at row {row}", got=repr(value), way_out=near(value, names))
            out.append(place[value])
        else:
            out.append(int(value))
    return out


def spread_labels(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Ids of every row of a batch of leading `shape`: given one a row, or one a sequence (the first axis)."""
    shape = tuple(shape)
    if tuple(ids.shape) == shape:
        return ids.reshape(-1)
    if len(shape) > 1 and tuple(ids.shape) == shape[:1]:
        return ids.reshape(-1, *([1] * (len(shape) - 1))).expand(shape).reshape(-1)
    raise ShapeError("labels", expected=f"{list(shape[:1])} or {list(shape)}", got=list(ids.shape))
