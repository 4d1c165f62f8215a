"""Steering on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import STEER_BLOCK, STEER_WARPS


@triton.jit(do_not_specialize=["rows"])
def steer_add_kernel(x_ptr, delta_ptr, out_ptr, rows, x_stride, out_stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[r] = x[r] + delta, x, out: [rows, D], delta: [D] float32; summed in float32 (float64 for float64), rounded
    once.
    """
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    x = tl.load(x_ptr + row * x_stride + cols, mask=inside)
    delta = tl.load(delta_ptr + cols, mask=inside)
    y = x.to(tl.float64) + delta.to(tl.float64) if x.dtype == tl.float64 else x.to(tl.float32) + delta.to(tl.float32)
    tl.store(out_ptr + row * out_stride + cols, y.to(x.dtype), mask=inside)


def steer_add_launch(x: Tensor, delta: Tensor, out: Tensor) -> None:
    """Launch on x [N, D] with unit column stride; out may be x itself."""
    rows, dim = x.shape
    if rows == 0:
        return
    block = min(triton.next_power_of_2(dim), STEER_BLOCK)
    grid = (rows, triton.cdiv(dim, block))
    steer_add_kernel[grid](x, delta, out, rows, x.stride(0), out.stride(0), D=dim, BLOCK_D=block, num_warps=STEER_WARPS)


def steer_add(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta [D] in a new tensor [N, D]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    steer_add_launch(x if x.stride(-1) == 1 else x.contiguous(), delta.contiguous(), out)
    return out


def steer_add_(x: Tensor, delta: Tensor) -> None:
    """x += delta [D] in place; a strided column axis goes through a copy."""
    if x.stride(-1) == 1:
        steer_add_launch(x, delta.contiguous(), x)
    else:
        x.copy_(steer_add(x, delta))
