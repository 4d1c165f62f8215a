"""The end of a drain on a GPU: norms counted, shifts frozen, the block drained."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import SETTLE_TILE, SETTLE_WARPS


@triton.jit(do_not_specialize=["block", "capacity"])
def settle_kernel(
    norms_ptr, marks_ptr, cursor_ptr, frozen_ptr, sum_ptr, count_ptr, block, capacity, TILE: tl.constexpr
):
    """norm_sum[s] += sum of norms, norm_count[s] += number, of the block's rows that are marked 2; frozen[s] = 1.

    norms, marks: [S, capacity]; a program for each s; float64 accumulators, in a fixed order.
    """
    s = tl.program_id(0).to(tl.int64)
    drained = tl.load(cursor_ptr + 1)
    if tl.load(cursor_ptr) - drained < block:
        return
    first = s * capacity + drained % capacity
    lanes = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float64)
    count = tl.zeros([TILE], tl.int64)
    for at in range(0, block, TILE):
        inside = at + lanes < block
        norm = tl.load(norms_ptr + first + at + lanes, mask=inside, other=0.0)
        counted = tl.load(marks_ptr + first + at + lanes, mask=inside, other=0) == 2
        total += tl.where(counted, norm.to(tl.float64), 0.0)
        count += counted.to(tl.int64)
    tl.store(sum_ptr + s, tl.load(sum_ptr + s) + tl.sum(total))
    tl.store(count_ptr + s, tl.load(count_ptr + s) + tl.sum(count))
    tl.store(frozen_ptr + s, 1)


@triton.jit(do_not_specialize=["block"])
def advance_kernel(cursor_ptr, block):
    """cursor[1] += block, if that many rows wait; one program."""
    drained = tl.load(cursor_ptr + 1)
    if tl.load(cursor_ptr) - drained >= block:
        tl.store(cursor_ptr + 1, drained + block)


def settle(
    norms: Tensor, marks: Tensor, cursor: Tensor, block: int, frozen: Tensor, norm_sum: Tensor, norm_count: Tensor
) -> None:
    """Count the norms [S, capacity] of the block, if it is full, freeze all shifts and drain it.

    Two launches, since the cursor may move only once every program has read it. One program for all would need only
    one, but a multiprocessor reads some 60 GB/s, a block is 80 KB a hook point, a launch in a graph 2 us: that pays up
    to S = 2.
    """
    points, capacity = norms.shape
    args = (norms, marks, cursor, frozen, norm_sum, norm_count, block, capacity)
    launch(settle_kernel, (points,), *args, warps=SETTLE_WARPS, TILE=SETTLE_TILE)
    launch(advance_kernel, (1,), cursor, block, warps=1)


def variants() -> Iterator[Variant]:
    """Both."""
    ring = {"norms_ptr": "*fp32:16", "marks_ptr": "*i8:16", "cursor_ptr": "*i64:16"}
    held = {"frozen_ptr": "*i32:16", "sum_ptr": "*fp64:16", "count_ptr": "*i64:16"}
    counts = {"block": "i32", "capacity": "i32"}
    yield Variant(settle_kernel, ring | held | counts, {"TILE": SETTLE_TILE}, SETTLE_WARPS)
    yield Variant(advance_kernel, {"cursor_ptr": "*i64:16", "block": "i32"}, warps=1)
