"""Sums by label on a GPU: every label's rows (`sorting`) cut into pieces of a fixed length, pieces summed in
float64 and added in order. What is added to what follows from the labels alone, whatever the grid.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..precision import DEVICE_BLOCK_ROWS
from ._launch import Variant, launch
from ._tiles import (
    FOLD_BYTES,
    FOLD_COLUMNS,
    FOLD_PIECE,
    FOLD_PROGRAMS,
    FOLD_ROWS,
    LABEL_SUMS_ROWS,
    PARTS_COLUMNS,
    PARTS_DEEP,
    PARTS_WARPS,
    WIDTHS,
)
from .sorting import piece_of


@triton.jit
def _widened(x, FINITE: tl.constexpr):
    """x in float64; as conversions run at a quarter of the rate of additions, finite 16-bit x take integer steps."""
    if FINITE and x.dtype.primitive_bitwidth == 16:
        if x.dtype == tl.bfloat16:
            bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        else:
            bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        high = (bits >> 3) & -0x70000001  # sign, exponent and fraction of x 2^-896: 896 = 1023 - 127
        y = (high.to(tl.int64) << 32).to(tl.float64, bitcast=True) * 2.0**896
    else:
        y = x.to(tl.float64)
    return y


@triton.jit
def _sums(
    rows_ptr,
    weights_ptr,
    order_ptr,
    shift,
    begin,
    end,
    cols,
    inside,
    STRIDE: tl.constexpr,
    MARKED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums of w (x - shift) and w (x - shift)^2 [BLOCK_D] over rows begin .. end - 1 of order, and how many count."""
    total = tl.zeros(cols.shape, tl.float64)
    square = tl.zeros(cols.shape, tl.float64)
    count = tl.zeros([], tl.int64)
    for step in range(0, tl.cdiv(end - begin, ROWS)):  # not up to `end`: the first row too must be counted by a branch
        at = begin + step * ROWS
        rows, weights, counted = (), (), ()
        for i in tl.static_range(ROWS):
            row = tl.minimum(at + i, end - 1)  # past the end the last once more, which does not count
            if order_ptr is not None:
                row = tl.load(order_ptr + row)
            counts = at + i < end
            weight = 1.0
            if MARKED:
                counts = counts & (tl.load(weights_ptr + row) > 0)
                count += counts.to(tl.int64)
            elif weights_ptr is not None:
                weight = tl.load(weights_ptr + row)
            rows += (tl.load(rows_ptr + row.to(tl.int64) * STRIDE + cols, mask=inside, other=0.0),)
            weights += (weight,)
            counted += (counts,)
        tl.debug_barrier()  # all loads go before the branches below; the compiler would add between them
        for i in tl.static_range(ROWS):
            if counted[i]:
                y = _widened(rows[i], MARKED) - shift
                z = weights[i] * y
                total += z
                square += z * y
    return total, square, count


@triton.jit(do_not_specialize=["block", "capacity", "labels", "windows", "items"])
def fold_labels_kernel(
    rows_ptr,
    weights_ptr,
    cursor_ptr,
    order_ptr,
    starts_ptr,
    shift_ptr,
    totals_ptr,
    squares_ptr,
    counts_ptr,
    parts_ptr,
    block,
    capacity,
    labels,
    windows,
    items,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    PIECE: tl.constexpr,
    NEAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """totals[s, k] += sum w (x - shift[s]), squares[s, k] += sum w (x - shift[s])^2 over the first PIECE rows x of
    label k in `order`; the sums over its further pieces go to parts [S, windows, 1 or 2, D].

    rows: [S, capacity, D], STRIDE from row to row; totals, squares: [S, labels, D]; float64 accumulators.
    weights: [S, capacity] float64 or None; with counts [S, labels] they are the marks: a row counts where they are > 0.
    Without order all rows are label 0's. A warp a program; 3 float64 instructions a number: 6.5e12 a second for 16-bit
    rows at 4.3 TB/s, of the 17e12 that 34 TFLOP/s are (an A100: 2.7e12 at 1.8 TB/s, of 4.9e12).
    """
    tiles: tl.constexpr = tl.cdiv(D, BLOCK_D)
    MARKED: tl.constexpr = counts_ptr is not None
    SUMS: tl.constexpr = 1 if squares_ptr is None else 2
    start = tl.zeros([], tl.int64)
    if cursor_ptr is not None:
        drained = tl.load(cursor_ptr + 1)
        if tl.load(cursor_ptr) - drained < block:
            return
        start += drained % capacity
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        slot = item // tiles % (labels + windows)
        s = (item // tiles // (labels + windows)).to(tl.int64)
        if order_ptr is None:
            label, piece, begin, end = slot * 0, slot, slot * 0, slot * 0 + block
        else:
            label, piece, begin, end = piece_of(slot, starts_ptr, labels, windows, PIECE, NEAR)
        begin += piece * PIECE
        if begin < end:
            cols = item % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = cols < D
            first = start + s * capacity
            held = weights_ptr
            if weights_ptr is not None:
                held += first
            shift = tl.load(shift_ptr + s * D + cols, mask=inside, other=0.0)
            stop = tl.minimum(end, begin + PIECE)
            total, square, count = _sums(
                rows_ptr + first * STRIDE, held, order_ptr, shift, begin, stop, cols, inside, STRIDE, MARKED, ROWS
            )
            if MARKED and item % tiles == 0:  # integers: the same in any order
                tl.atomic_add(counts_ptr + s * labels + label, count, sem="relaxed")
            if piece == 0:
                out = (s * labels + label) * D + cols
                tl.store(totals_ptr + out, tl.load(totals_ptr + out, mask=inside) + total, mask=inside)
                if squares_ptr is not None:
                    tl.store(squares_ptr + out, tl.load(squares_ptr + out, mask=inside) + square, mask=inside)
            else:  # further pieces begin PIECE rows or more apart: one at most in a window
                out = (s * windows + begin // PIECE) * (SUMS * D) + cols
                tl.store(parts_ptr + out, total, mask=inside)
                if squares_ptr is not None:
                    tl.store(parts_ptr + out + D, square, mask=inside)


@triton.jit(do_not_specialize=["block", "labels", "windows", "items"])
def fold_parts_kernel(
    totals_ptr,
    squares_ptr,
    parts_ptr,
    cursor_ptr,
    starts_ptr,
    block,
    labels,
    windows,
    items,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    DEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """totals[s, k], squares[s, k] += the sums over label k's further pieces, parts: [S, windows, 1 or 2, D] float64."""
    tiles: tl.constexpr = tl.cdiv(D, BLOCK_D)
    SUMS: tl.constexpr = 1 if squares_ptr is None else 2
    if cursor_ptr is not None and tl.load(cursor_ptr) - tl.load(cursor_ptr + 1) < block:
        return
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        label = item // tiles % labels
        begin, end = label * 0, label * 0 + block
        if starts_ptr is not None:
            begin, end = tl.load(starts_ptr + label), tl.load(starts_ptr + label + 1)
        if end - begin > PIECE:
            s = (item // tiles // labels).to(tl.int64)
            cols = item % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = cols < D
            window = begin // PIECE
            last = window + (end - begin - 1) // PIECE
            total = tl.zeros([BLOCK_D], tl.float64)
            square = tl.zeros([BLOCK_D], tl.float64)
            for at in range(window + 1, last + 1, DEEP):
                part = at + tl.arange(0, DEEP)
                there = (s * windows + part)[:, None] * (SUMS * D) + cols[None, :]
                mask = (part <= last)[:, None] & inside[None, :]
                total += tl.sum(tl.load(parts_ptr + there, mask=mask, other=0.0), 0)
                if squares_ptr is not None:
                    square += tl.sum(tl.load(parts_ptr + there + D, mask=mask, other=0.0), 0)
            out = (s * labels + label) * D + cols
            tl.store(totals_ptr + out, tl.load(totals_ptr + out, mask=inside) + total, mask=inside)
            if squares_ptr is not None:
                tl.store(squares_ptr + out, tl.load(squares_ptr + out, mask=inside) + square, mask=inside)


_parts = WeakTensorKeyDictionary()  # by the totals they are added to


def _parts_of(totals: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for the sums of pieces that lives as long as the totals: a drain allocates nothing."""
    held = _parts.get(totals)
    if held is None or held.shape != shape:
        held = _parts[totals] = totals.new_empty(shape)
    return held


@functools.cache
def _programs(device: torch.device) -> int:
    """As many as run at once, so that a drain that is not due is over at once; no result depends on it."""
    many = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return FOLD_PROGRAMS * many


def fold_labels(
    rows: Tensor,
    weights: Tensor | None,
    cursor: Tensor | None,
    block: int,
    order: Tensor | None,
    starts: Tensor | None,
    shift: Tensor,
    totals: Tensor,
    squares: Tensor | None,
    counts: Tensor | None,
) -> None:
    """totals, squares [S, labels, D] += sums over the block's rows [S, capacity, D], if it is full; without a cursor
    over the first `block` rows. Weights are the marks where there are counts [S, labels].
    """
    (points, capacity, dim), labels = rows.shape, totals.shape[1]
    windows = triton.cdiv(block, FOLD_PIECE)
    shape = (points, windows, 1 if squares is None else 2, dim)
    parts = totals.new_empty(shape) if cursor is None else _parts_of(totals, shape)
    constants = fold_constants(rows.dtype, dim, rows.stride(1), block if cursor is not None else LABEL_SUMS_ROWS)
    items = triton.cdiv(dim, constants["BLOCK_D"]) * (labels + windows) * points
    args = (rows, weights, cursor, order, starts, shift, totals, squares, counts, parts)
    grid = (min(items, _programs(rows.device)),)
    launch(fold_labels_kernel, grid, *args, block, capacity, labels, windows, items, warps=1, **constants)
    if windows > 1:
        constants = parts_constants(dim)
        items = triton.cdiv(dim, constants["BLOCK_D"]) * labels * points
        args = (totals, squares, parts, cursor, starts, block, labels, windows, items)
        launch(fold_parts_kernel, (min(items, _programs(rows.device)),), *args, warps=PARTS_WARPS, **constants)


def fold_constants(dtype: torch.dtype, dim: int, stride: int, most: int) -> dict[str, int]:
    """Constants of fold_labels_kernel for blocks of at most so many rows: 16 bytes of a row a lane, or 32."""
    return {
        "D": dim,
        "STRIDE": stride,
        "PIECE": FOLD_PIECE,
        "NEAR": triton.next_power_of_2(triton.cdiv(most, FOLD_PIECE) + 1),
        "ROWS": FOLD_ROWS,
        "BLOCK_D": min(max(FOLD_BYTES // dtype.itemsize, FOLD_COLUMNS), triton.next_power_of_2(dim)),
    }


def parts_constants(dim: int) -> dict[str, int]:
    """Constants of fold_parts_kernel."""
    columns = min(PARTS_COLUMNS, triton.next_power_of_2(dim))
    return {"D": dim, "PIECE": FOLD_PIECE, "DEEP": PARTS_DEEP, "BLOCK_D": columns}


NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
STATE = {"totals_ptr": "*fp64:16", "squares_ptr": "*fp64:16", "parts_ptr": "*fp64:16"}
BY_LABEL = {"order_ptr": "*i32:16", "starts_ptr": "*i32:16"}
COUNTS = {"block": "i32", "labels": "i32", "windows": "i32", "items": "i32"}


def fold_types(name: str) -> dict[str, str]:
    """Types of the arguments that fold_labels_kernel always has, for rows of Triton's type `name`."""
    return {"rows_ptr": f"*{name}:16", "shift_ptr": "*fp64:16", "capacity": "i32", **STATE, **COUNTS}


def variants() -> Iterator[Variant]:
    """Every dtype at every width."""
    drain = {"weights_ptr": "*i8:16", "cursor_ptr": "*i64:16", "counts_ptr": "*i64:16"}
    for dim in WIDTHS:
        for dtype, name in NAMES.items():
            constants = fold_constants(dtype, dim, dim, DEVICE_BLOCK_ROWS)
            yield Variant(fold_labels_kernel, fold_types(name) | drain | BY_LABEL, constants, 1)
        types = {**STATE, "cursor_ptr": "*i64:16", "starts_ptr": "*i32:16", **COUNTS}
        yield Variant(fold_parts_kernel, types, parts_constants(dim), PARTS_WARPS)
