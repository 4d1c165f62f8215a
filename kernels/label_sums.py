"""The op label_sums on a GPU: rows are sorted and folded as in the drain, at most LABEL_SUMS_ROWS at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ._launch import Variant
from ._tiles import LABEL_SUMS_ROWS
from .folding import BY_LABEL, NAMES, fold_constants, fold_labels, fold_labels_kernel, fold_types
from .sorting import sort_labels


def label_sums(
    rows: Tensor, labels: Tensor | None, weights: Tensor | None, shift: Tensor, sums: Tensor, squares: Tensor | None
) -> None:
    """sums[k] += w (x - s), squares[k] += w (x - s)^2 by label; other labels than 0 .. K - 1 are left out."""
    n, k = len(rows), len(sums)
    if n == 0 or k == 0:
        return
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    labels, order, starts = None if labels is None else labels.to(torch.int32).contiguous(), None, None
    if labels is not None:
        order, starts = labels.new_empty(min(n, LABEL_SUMS_ROWS)), labels.new_empty(k + 2)
    weights, shift = None if weights is None else weights.contiguous(), shift.contiguous()
    into, into_squares = sums.contiguous(), None if squares is None else squares.contiguous()
    state = [None if t is None else t[None, : 1 if labels is None else k] for t in (into, into_squares)]
    for at in range(0, n, LABEL_SUMS_ROWS):
        block = min(n - at, LABEL_SUMS_ROWS)
        if labels is not None:
            sort_labels(labels[at : at + block], None, block, order, starts)
        x = rows[None, at : at + block]
        w = None if weights is None else weights[at : at + block]
        fold_labels(x, w, None, block, order, starts, shift, *state, None)
    for given, written in ((sums, into), (squares, into_squares)):
        if written is not given:
            given.copy_(written)


def variants() -> Iterator[Variant]:
    """Every dtype, narrow and wide, with labels and weights and without."""
    for dtype, name in NAMES.items():
        for dim in (384, 4096):
            constants = fold_constants(dtype, dim, dim, LABEL_SUMS_ROWS) | {"cursor_ptr": None, "counts_ptr": None}
            yield Variant(fold_labels_kernel, fold_types(name) | {"weights_ptr": "*fp64:16"} | BY_LABEL, constants, 1)
            constants |= {"weights_ptr": None, "order_ptr": None, "starts_ptr": None}
            yield Variant(fold_labels_kernel, fold_types(name), constants, 1)
