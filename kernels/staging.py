"""Gathering, testing and measuring rows on a GPU."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import STAGE_BYTES, STAGE_LANE, STAGE_WIDEST, WIDTHS


@triton.jit
def _measured(x, y):
    """Sum of y^2 [ROWS] in float64, and how many of x are not finite; x, y: [ROWS, BLOCK_D].

    Squares of less than 64 bits cannot overflow a float64: where y is x, a sum that is not finite says it all.
    """
    wide = y.to(tl.float64)
    square = tl.sum(wide * wide, 1)
    if x.dtype == y.dtype and x.dtype != tl.float64:
        lost = (square < float("inf")).to(tl.int32) ^ 1
    else:
        lost = tl.sum((tl.abs(x.to(tl.float64)) < float("inf")).to(tl.int32) ^ 1, 1)
    return square, lost


@triton.jit(do_not_specialize=["n"])
def stage_kernel(
    x_ptr,
    index_ptr,
    rows_ptr,
    norms_ptr,
    finite_ptr,
    n,
    D: tl.constexpr,
    X_STRIDE: tl.constexpr,
    ROWS_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows[r] = x[index[r]], norms[r] = |rows[r]|, summed in float64; a row with NaN or Inf becomes zeros, with norm 0
    and finite[r] False. x: [N, D], rows: [n, D], index, norms, finite: [n].

    A program holds ROWS rows whole, or, where they are wider than BLOCK_D, reads them again to write them.
    """
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = r < n
    at = r
    if index_ptr is not None:
        at = tl.load(index_ptr + r, mask=there, other=0)
    x_at = x_ptr + (at * X_STRIDE)[:, None]
    rows_at = rows_ptr + (r * ROWS_STRIDE)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    if D <= BLOCK_D:
        mask = there[:, None] & (cols < D)
        x = tl.load(x_at + cols, mask=mask, other=0.0)
        y = x.to(rows_ptr.dtype.element_ty)
        square, lost = _measured(x, y)
        tl.store(rows_at + cols, tl.where((lost == 0)[:, None], y, 0.0), mask=mask)
    else:
        square = tl.zeros([ROWS], tl.float64)
        lost = tl.zeros([ROWS], tl.int32)
        for start in range(0, D, BLOCK_D):
            x = tl.load(x_at + start + cols, mask=there[:, None] & (start + cols < D), other=0.0)
            more = _measured(x, x.to(rows_ptr.dtype.element_ty))
            square += more[0]
            lost += more[1]
        for start in range(0, D, BLOCK_D):
            mask = there[:, None] & (start + cols < D)
            y = tl.load(x_at + start + cols, mask=mask, other=0.0).to(rows_ptr.dtype.element_ty)
            tl.store(rows_at + start + cols, tl.where((lost == 0)[:, None], y, 0.0), mask=mask)
    tl.store(norms_ptr + r, tl.where(lost == 0, tl.sqrt(square), 0.0), mask=there)
    tl.store(finite_ptr + r, lost == 0, mask=there)


def stage(x: Tensor, index: Tensor | None, rows: Tensor, norms: Tensor, finite: Tensor) -> None:
    """rows [n, D], norms [n] and finite [n] of x[index]; strided columns go through a copy."""
    n, dim = rows.shape
    x = x if x.stride(1) == 1 or dim == 1 else x.contiguous()
    index = None if index is None else index.contiguous()
    into = rows if rows.stride(1) == 1 or dim == 1 else rows.contiguous(), norms.contiguous(), finite.contiguous()
    constants, warps = stage_constants(x.dtype, dim, x.stride(0), into[0].stride(0))
    launch(stage_kernel, (triton.cdiv(n, constants["ROWS"]),), x, index, *into, n, warps=warps, **constants)
    for given, written in zip((rows, norms, finite), into, strict=True):
        if written is not given:
            given.copy_(written)


def stage_constants(dtype: torch.dtype, dim: int, x_stride: int, rows_stride: int) -> tuple[dict[str, int], int]:
    """Constants of stage_kernel for x [N, D] of `dtype`, and its warps."""
    size = dtype.itemsize
    columns = min(triton.next_power_of_2(max(dim, 1)), STAGE_WIDEST // size)
    rows = max(1, STAGE_BYTES // (size * columns))
    constants = {"D": dim, "X_STRIDE": x_stride, "ROWS_STRIDE": rows_stride, "ROWS": rows, "BLOCK_D": columns}
    return constants, size * rows * columns // (32 * STAGE_LANE)


def variants() -> Iterator[Variant]:
    """Every dtype at every width, gathered and whole."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
    out = {"norms_ptr": "*fp64:16", "finite_ptr": "*i1:16", "n": "i32"}
    for dtype, name in names.items():
        types = {"x_ptr": f"*{name}:16", "rows_ptr": f"*{name}:16", **out}
        for dim in WIDTHS:
            constants, warps = stage_constants(dtype, dim, dim, dim)
            yield Variant(stage_kernel, types | {"index_ptr": "*i64:16"}, constants, warps)
            yield Variant(stage_kernel, types, constants | {"index_ptr": None}, warps)
