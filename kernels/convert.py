"""What of a block is multiplied: shift and scale of every column, and fp16 rows about them (docs/gpu.md)."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import CONVERT_COLUMNS, CONVERT_TILE, CONVERT_WARPS, FREEZE_COLUMNS, FREEZE_ROWS, FREEZE_WARPS

RUNS = 32  # of consecutive rows of a block, whose medians set the shift
FREEZE_CONSTANTS = {"RUNS": RUNS, "BLOCK_N": FREEZE_ROWS, "BLOCK_D": FREEZE_COLUMNS}
LIMIT = tl.constexpr(0x477FE000)  # 65504, the largest fp16, as the bits of a float32


@triton.jit
def _exponent(v):
    """floor(log2 |v|) of float64 v, a normal number."""
    return ((v.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1023


@triton.jit
def _power(e):
    """2^e in float64."""
    return ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _median(v, valid):
    """Lower median [C] of v [RUNS, C] over the runs that are valid; 0 where none is."""
    run = tl.arange(0, v.shape[0])[:, None]
    rank = tl.zeros(v.shape, tl.int32)
    for r in range(v.shape[0]):
        own = run == r
        other = tl.sum(tl.where(own, v, 0.0), 0)[None, :]
        counts = tl.max((own & valid).to(tl.int32), 0)[None, :]
        rank += tl.where((other < v) | ((other == v) & (r < run)), counts, 0)
    n = tl.sum(valid.to(tl.int32), 0)  # [C]
    middle = valid & (rank == (tl.maximum(n, 1) - 1)[None, :] // 2)
    return tl.sum(tl.where(middle, v, 0.0), 0)


@triton.jit
def _load(rows_ptr, marks_ptr, place, inside, cols, D):
    """Rows [BLOCK_N, BLOCK_D] in float64 at `place` [BLOCK_N], and which of them count."""
    kept = tl.load(marks_ptr + place, mask=inside, other=0) > 0
    mask = kept[:, None] & (cols < D)[None, :]
    return tl.load(rows_ptr + place[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float64), kept


@triton.jit(do_not_specialize=["capacity", "block"])
def freeze_kernel(
    rows_ptr,
    marks_ptr,
    cursor_ptr,
    frozen_ptr,
    shift_ptr,
    exponent_ptr,
    capacity,
    block,
    D,
    RUNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """exponent = k = floor(log2 std), shift = m rounded to a multiple of 2^k and to BITS bits, 0 where |m| <= std / 2.

    m: median over runs of the run's mean; std^2: median over runs of the run's mean square about m, or their mean where
    half of the runs never leave m. rows: [S, capacity, D]; shift, exponent: [S, D]; sums in float64.
    """
    BITS: tl.constexpr = 24 if rows_ptr.dtype.element_ty == tl.float32 else 11
    s = tl.program_id(1).to(tl.int64)
    drained = tl.load(cursor_ptr + 1)
    if (tl.load(cursor_ptr) - drained < block) | (tl.load(frozen_ptr + s) != 0):
        return
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    length = block // RUNS
    run = tl.arange(0, RUNS)[:, None]
    step = tl.arange(0, BLOCK_N)
    mean = tl.zeros([RUNS, BLOCK_D], tl.float64)
    square = tl.zeros([RUNS, BLOCK_D], tl.float64)
    valid = tl.zeros([RUNS, BLOCK_D], tl.int1)
    for r in range(RUNS):
        first = s * capacity + drained % capacity + r * length + step  # [BLOCK_N] int64
        count = tl.zeros([BLOCK_N], tl.int32)
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
        for start in range(0, length, BLOCK_N):
            x, kept = _load(rows_ptr, marks_ptr, first + start, start + step < length, cols, D)
            count += kept.to(tl.int32)
            total += x
        n = tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
        centre = tl.sum(total, 0) / n  # [BLOCK_D]
        total = tl.zeros([BLOCK_N, BLOCK_D], tl.float64)
        for start in range(0, length, BLOCK_N):
            x, kept = _load(rows_ptr, marks_ptr, first + start, start + step < length, cols, D)
            y = tl.where(kept[:, None], x - centre[None, :], 0.0)
            total += y * y
        spread = tl.sum(total, 0) / n
        own = (run == r) & ((tl.sum(count, 0) > 0) & (spread < float("inf")))[None, :]  # NaN or Inf takes its run out
        mean = tl.where(own, centre[None, :], mean)
        square = tl.where(own, spread[None, :], square)
        valid = valid | own
    m = _median(mean, valid)
    square += (mean - m[None, :]) * (mean - m[None, :])
    whole = tl.sum(tl.where(valid, square, 0.0), 0) / tl.maximum(tl.sum(valid.to(tl.int32), 0), 1).to(tl.float64)
    v = _median(square, valid)
    v = tl.where(v > 0, v, whole)
    k = tl.where(v > 0, tl.minimum(tl.maximum(_exponent(v) >> 1, -126), 126), 0)
    grid = _power(tl.maximum(k, _exponent(m) + 1 - BITS))
    near = tl.where(4 * m * m <= v, 0.0, tl.floor(m / grid + 0.5) * grid)
    tl.store(shift_ptr + s * D + cols, tl.where(v > 0, near, m), mask=cols < D)
    tl.store(exponent_ptr + s * D + cols, k, mask=cols < D)


def freeze(
    rows: Tensor, marks: Tensor, cursor: Tensor, block: int, frozen: Tensor, shift: Tensor, exponent: Tensor
) -> None:
    """Shift and exponent [S, D] of the hook points that are not frozen, if a block is full; a multiple of 32 rows."""
    points, capacity, dim = rows.shape
    grid = (triton.cdiv(dim, FREEZE_COLUMNS), points)
    args = (rows, marks, cursor, frozen, shift, exponent, capacity, block, dim)
    launch(freeze_kernel, grid, *args, warps=FREEZE_WARPS, **FREEZE_CONSTANTS)


@triton.jit(do_not_specialize=["capacity", "block"])
def convert_kernel(
    rows_ptr,
    marks_ptr,
    cursor_ptr,
    shift_ptr,
    exponent_ptr,
    y_ptr,
    overrange_ptr,
    capacity,
    block,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y[0] = fp16((x - s) 2^-k), y[1] = fp16 of 2^11 times what that leaves; a row that is left out gives zeros.

    Subtracted in float32, after exact scaling: exact too for 16-bit rows about a shift of 11 bits that is a multiple of
    2^k. rows: [S, capacity, D], y: [S, PARTS, block, D]; a row with some |y| > 65504 (or NaN) is marked 0 and counted.
    """
    PARTS: tl.constexpr = 2 if rows_ptr.dtype.element_ty == tl.float32 else 1
    s = tl.program_id(1).to(tl.int64)
    drained = tl.load(cursor_ptr + 1)
    if tl.load(cursor_ptr) - drained < block:
        return
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < block
    place = s * capacity + drained % capacity + row  # [BLOCK_N] int64
    out = s * PARTS * block + row
    kept = tl.load(marks_ptr + place, mask=inside, other=0) > 0
    worst = tl.zeros([BLOCK_N], tl.int32)  # bits of the largest |y|: in the order of the numbers, NaN above all
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (cols < D)[None, :]
        k = tl.load(exponent_ptr + s * D + cols, mask=cols < D, other=0)
        shift = tl.load(shift_ptr + s * D + cols, mask=cols < D, other=0.0)
        scale = ((127 - k) << 23).to(tl.float32, bitcast=True)  # 2^-k
        x = tl.load(rows_ptr + place[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        y = x * scale[None, :] - (shift * _power(-k)).to(tl.float32)[None, :]
        bits = y.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        worst = tl.maximum(worst, tl.max(bits, 1))
        y = tl.where((bits <= LIMIT) & kept[:, None], y, 0.0)
        high = y.to(tl.float16)
        tl.store(y_ptr + out[:, None] * D + cols[None, :], high, mask=mask)
        if PARTS == 2:
            low = (y - high.to(tl.float32)) * 2048.0
            tl.store(y_ptr + (out + block)[:, None] * D + cols[None, :], low.to(tl.float16), mask=mask)
    lost = kept & (worst > LIMIT)
    if tl.max(lost.to(tl.int32), 0) > 0:  # rare: write over what the row's earlier columns have left
        tl.debug_barrier()
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            mask = lost[:, None] & (cols < D)[None, :]
            for part in tl.static_range(PARTS):
                at = y_ptr + (out + part * block)[:, None] * D + cols[None, :]
                tl.store(at, tl.zeros([BLOCK_N, BLOCK_D], tl.float16), mask=mask)
        tl.store(marks_ptr + place, tl.zeros([BLOCK_N], tl.int8), mask=lost)
        tl.atomic_add(overrange_ptr + s, tl.sum(lost.to(tl.int64), 0), sem="relaxed")


def convert(
    rows: Tensor,
    marks: Tensor,
    cursor: Tensor,
    block: int,
    shift: Tensor,
    exponent: Tensor,
    y: Tensor,
    overrange: Tensor,
) -> None:
    """y [S, P, block, D] from the block's rows, if it is full; P = 2 for float32 rows."""
    points, capacity, dim = rows.shape
    constants = convert_constants(dim)
    grid = (triton.cdiv(block, constants["BLOCK_N"]), points)
    args = (rows, marks, cursor, shift, exponent, y, overrange, capacity, block, dim)
    launch(convert_kernel, grid, *args, warps=CONVERT_WARPS, **constants)


def convert_constants(dim: int) -> dict[str, int]:
    """The tile for rows [D]: of columns that divide D where they can, so that no access is masked off."""
    columns = min(CONVERT_COLUMNS, dim & -dim)
    if columns < CONVERT_COLUMNS // 4:
        columns = min(CONVERT_COLUMNS, max(16, triton.next_power_of_2(dim)))
    return {"BLOCK_N": CONVERT_TILE // columns, "BLOCK_D": columns}


def variants() -> Iterator[Variant]:
    """Rows of every dtype, of any width that is a multiple of the tile's columns."""
    ring = {"marks_ptr": "*i8:16", "cursor_ptr": "*i64:16"}
    columns = {"shift_ptr": "*fp64:16", "exponent_ptr": "*i32:16"}
    sizes = {"capacity": "i32", "block": "i32", "D": "i32:16"}
    for name in ("*bf16:16", "*fp16:16", "*fp32:16"):
        types = {"rows_ptr": name, **ring, "frozen_ptr": "*i32:16", **columns, **sizes}
        yield Variant(freeze_kernel, types, FREEZE_CONSTANTS, FREEZE_WARPS)
        # a part of the hook points may begin at any word of overrange
        types = {"rows_ptr": name, **ring, **columns, "y_ptr": "*fp16:16", "overrange_ptr": "*i64", **sizes}
        yield Variant(convert_kernel, types, convert_constants(CONVERT_COLUMNS), CONVERT_WARPS)
