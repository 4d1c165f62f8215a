"""Rows by label on a GPU."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import SORT_TILE, SORT_WARPS


@triton.jit(do_not_specialize=["block", "capacity", "labels"])
def sort_labels_kernel(labels_ptr, cursor_ptr, order_ptr, starts_ptr, block, capacity, labels, TILE: tl.constexpr):
    """order: the block's rows by label, stable, those outside of 0 .. labels - 1 last; starts[k]: how many come before
    label k. labels: [capacity], order: [block], starts: [labels + 2], all int32.

    Program k counts the rows of smaller labels, then places its own.
    """
    k = tl.program_id(0)
    if cursor_ptr is not None:
        drained = tl.load(cursor_ptr + 1)
        if tl.load(cursor_ptr) - drained < block:
            return
        labels_ptr += drained % capacity
    lanes = tl.arange(0, TILE)
    smaller = tl.zeros([TILE], tl.int32)
    for at in range(0, block, TILE):
        given = tl.load(labels_ptr + at + lanes, mask=at + lanes < block, other=-1)
        smaller += (tl.where((given >= 0) & (given < labels), given, labels) < k).to(tl.int32)
    place = tl.sum(smaller)
    tl.store(starts_ptr + k, place)
    if k == labels:
        tl.store(starts_ptr + labels + 1, block)
    for at in range(0, block, TILE):
        given = tl.load(labels_ptr + at + lanes, mask=at + lanes < block, other=-1)
        mine = tl.where((given >= 0) & (given < labels), given, labels) == k
        mine = (mine & (at + lanes < block)).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine) - 1, at + lanes, mask=mine > 0)
        place += tl.sum(mine)


@triton.jit
def piece_of(slot, starts_ptr, labels, windows, PIECE: tl.constexpr, NEAR: tl.constexpr):
    """Which piece of which label is slot's, and where the label's rows begin and end.

    Piece i of label k has the slot k + starts[k] // PIECE + i: none is shared, and k is one of the last `windows`.
    """
    least = tl.maximum(slot - windows, 0)
    k = least + tl.arange(0, NEAR)
    known = k <= tl.minimum(slot, labels - 1)
    slots = k + tl.load(starts_ptr + k, mask=known, other=0) // PIECE
    label = least + tl.sum((known & (slots <= slot)).to(tl.int32)) - 1
    begin = tl.load(starts_ptr + label)
    return label, slot - label - begin // PIECE, begin, tl.load(starts_ptr + label + 1)


def sort_labels(labels: Tensor, cursor: Tensor | None, block: int, order: Tensor, starts: Tensor) -> None:
    """order [block] and starts [K + 2] of the block's labels, if it is full; without a cursor of the first `block`."""
    k = len(starts) - 2
    args = (labels, cursor, order, starts, block, len(labels), k)
    launch(sort_labels_kernel, (k + 1,), *args, warps=SORT_WARPS, TILE=SORT_TILE)


def variants() -> Iterator[Variant]:
    """In the drain and in the op."""
    types = {"labels_ptr": "*i32:16", "order_ptr": "*i32:16", "starts_ptr": "*i32:16"}
    counts = {"block": "i32", "capacity": "i32", "labels": "i32"}
    yield Variant(sort_labels_kernel, types | {"cursor_ptr": "*i64:16"} | counts, {"TILE": SORT_TILE}, SORT_WARPS)
    yield Variant(sort_labels_kernel, types | counts, {"TILE": SORT_TILE, "cursor_ptr": None}, SORT_WARPS)
