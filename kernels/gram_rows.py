"""Rows of the op `gram` as they are multiplied: fp16 about a shift, weights folded in, by the scale of each column."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import GRAM_PEAK_ROWS, GRAM_ROWS_COLUMNS, GRAM_ROWS_TILE, GRAM_ROWS_WARPS

TOP = 15  # a column's largest |y| is under 2^15, half of what fp16 holds
DEEPEST = 511  # of an exponent: that of a product then is one of float64


@triton.jit
def _centred(rows_ptr, root_ptr, shift_ptr, row, cols, N, D, row_stride, col_stride):
    """(x - s) sqrt(w) [R, C] in float64, 0 outside of x [N, D]."""
    mask = (row < N)[:, None] & (cols < D)[None, :]
    at = rows_ptr + row.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
    y -= tl.load(shift_ptr + cols, mask=cols < D, other=0.0)[None, :]
    if root_ptr is not None:
        y *= tl.load(root_ptr + row, mask=row < N, other=0.0)[:, None]
    return tl.where(mask, y, 0.0)


@triton.jit(do_not_specialize=["N"])
def peaks_kernel(
    rows_ptr,
    root_ptr,
    shift_ptr,
    peaks_ptr,
    N,
    D,
    row_stride,
    col_stride,
    SLAB: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """peaks[p] = max over SLAB rows of |x - s| sqrt(w): rows [N, D], root [N] or None, shift [D], peaks [N/SLAB, D]."""
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    peak = tl.zeros([COLUMNS], tl.float64)
    for start in range(0, SLAB, ROWS):
        row = tl.program_id(0) * SLAB + start + tl.arange(0, ROWS)
        y = _centred(rows_ptr, root_ptr, shift_ptr, row, cols, N, D, row_stride, col_stride)
        peak = tl.maximum(peak, tl.max(tl.abs(y), 0))
    tl.store(peaks_ptr + tl.program_id(0).to(tl.int64) * D + cols, peak, mask=cols < D)


@triton.jit(do_not_specialize=["N", "length"])
def scale_rows_kernel(
    rows_ptr,
    root_ptr,
    shift_ptr,
    exponent_ptr,
    y_ptr,
    N,
    length,
    D,
    width,
    row_stride,
    col_stride,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y[0] = fp16 of v = (x - s) sqrt(w) 2^-k, y[1] = fp16 of 2^11 (v - y[0]); zeros beyond x: rows [N, D], y: [PARTS,
    length, width], exponent k: [width], root: [N] or None; in float64.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.load(exponent_ptr + cols, mask=cols < width, other=0)
    v = _centred(rows_ptr, root_ptr, shift_ptr, row, cols, N, D, row_stride, col_stride)
    v *= ((1023 - k).to(tl.int64) << 52).to(tl.float64, bitcast=True)[None, :]
    high = v.to(tl.float16)
    at = y_ptr + row.to(tl.int64)[:, None] * width + cols[None, :]
    mask = (row < length)[:, None] & (cols < width)[None, :]
    tl.store(at, high, mask=mask)
    if PARTS == 2:
        low = ((v - high.to(tl.float64)) * 2048.0).to(tl.float16)
        tl.store(at + length.to(tl.int64) * width, low, mask=mask)


PEAKS = {"SLAB": GRAM_PEAK_ROWS, "ROWS": GRAM_ROWS_TILE, "COLUMNS": GRAM_ROWS_COLUMNS}
SCALE = {"ROWS": GRAM_ROWS_TILE, "COLUMNS": GRAM_ROWS_COLUMNS}


def exponents(rows: Tensor, root: Tensor | None, shift: Tensor, width: int) -> Tensor:
    """k [1, width] int32 for rows [N, D]: the least with |x - s| sqrt(w) 2^-k < 2^15, so that fp16 never overflows.

    Nothing is lost against a scale by the deviation: values down to 2^-29 of the peak keep their 11 bits.
    """
    n, dim = rows.shape
    slabs = triton.cdiv(n, PEAKS["SLAB"])
    peaks = torch.empty(slabs, dim, dtype=torch.float64, device=rows.device)
    args = (rows, root, shift, peaks, n, dim, *rows.stride())
    launch(peaks_kernel, (slabs, triton.cdiv(dim, PEAKS["COLUMNS"])), *args, warps=GRAM_ROWS_WARPS, **PEAKS)
    found = torch.zeros(1, width, dtype=torch.int32, device=rows.device)
    found[0, :dim] = (torch.frexp(peaks.amax(0)).exponent - TOP).clamp(-DEEPEST, DEEPEST)
    return found


def scale_rows(rows: Tensor, root: Tensor | None, shift: Tensor, exponent: Tensor, y: Tensor) -> None:
    """Write rows [N, D] to y [1, P, length, width] by `exponent` [1, width]."""
    _, parts, length, width = y.shape
    grid = (triton.cdiv(length, SCALE["ROWS"]), triton.cdiv(width, SCALE["COLUMNS"]))
    args = (rows, root, shift, exponent, y, len(rows), length, rows.shape[1], width, *rows.stride())
    launch(scale_rows_kernel, grid, *args, warps=GRAM_ROWS_WARPS, PARTS=parts, **SCALE)


def variants() -> Iterator[Variant]:
    """Rows of every dtype with unit column stride, weighted or not."""
    types = {"shift_ptr": "*fp64:16", "N": "i32", "D": "i32:16", "row_stride": "i32:16"}
    for name in ("bf16", "fp16", "fp32"):
        for root in ({"root_ptr": "*fp64:16"}, {}):
            given = {"rows_ptr": f"*{name}:16", **root, **types}
            folded = {"col_stride": 1} | ({} if root else {"root_ptr": None})
            yield Variant(peaks_kernel, given | {"peaks_ptr": "*fp64:16"}, folded | PEAKS, GRAM_ROWS_WARPS)
            given |= {"exponent_ptr": "*i32:16", "y_ptr": "*fp16:16", "length": "i32", "width": "i32:16"}
            parts = {"PARTS": 2 if root or name == "fp32" else 1}
            yield Variant(scale_rows_kernel, given, folded | parts | SCALE, GRAM_ROWS_WARPS)
