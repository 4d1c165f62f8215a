"""Steering on a GPU: a direction added to every row, or to each row the direction of its slot."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emocore.reference_steering import rows_per_slot

from ._launch import Variant, launch
from ._tiles import STEER_BLOCK, STEER_ELEMENTS, STEER_FEW_ROWS, WIDTHS


@triton.jit
def slot_of(slots_ptr, rows, inside, share, S):
    """Slot of each of rows [ROWS], of which `share` in a row have one; 0 for what is no slot of S."""
    slot = tl.load(slots_ptr + rows.to(tl.int32) // share, mask=inside, other=0)  # 64-bit division is a call
    return tl.where((slot > 0) & (slot < S), slot, 0)


@triton.jit(do_not_specialize=["n", "share", "S"])
def steer_add_kernel(
    x_ptr,
    slots_ptr,
    deltas_ptr,
    out_ptr,
    n,
    share,
    S,
    D,
    x_stride,
    out_stride,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[r] = x[r] + deltas[slot[r // share]], the very bits of x[r] where the slot is 0; without slots deltas is [D].

    x, out: [n, D], deltas: [S, D] float32 or float64; summed in float32, float64 for float64, rounded once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # row * stride passes 2^31
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    written = (rows < n)[:, None] & (cols < D)[None, :]
    if slots_ptr is None:
        read = written
        delta = tl.load(deltas_ptr + cols, mask=cols < D, other=0.0)[None, :]
    else:
        slot = slot_of(slots_ptr, rows, rows < n, share, S)
        moved = written & (slot > 0)[:, None]
        read = written
        if IN_PLACE:
            read = moved
        delta = tl.load(deltas_ptr + slot.to(tl.int64)[:, None] * D + cols[None, :], mask=moved, other=0.0)
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=read, other=0.0)
    WIDE: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    y = (x.to(WIDE) + delta.to(WIDE)).to(x.dtype)
    if slots_ptr is not None:
        y = tl.where(moved, y, x)
    tl.store(out_ptr + rows[:, None] * out_stride + cols[None, :], y, mask=read)


def warps_for(elements: int, most: int = 8) -> int:
    """Warps of a tile, so that each of its threads has 16 elements or more."""
    return max(1, min(most, elements // 512))


def add_rows(x: Tensor, slots: Tensor | None, deltas: Tensor, out: Tensor) -> None:
    """Launch on x [N, D] with unit column stride; out may be x itself."""
    n, dim = x.shape
    block = min(triton.next_power_of_2(dim), STEER_BLOCK)
    tall = 1 if n <= STEER_FEW_ROWS else STEER_ELEMENTS // block
    launch(
        steer_add_kernel,
        (triton.cdiv(n, tall), triton.cdiv(dim, block)),
        x,
        slots,
        deltas.contiguous(),
        out,
        n,
        1 if slots is None else rows_per_slot(n, slots),
        len(deltas),
        dim,
        x.stride(0),
        out.stride(0),
        IN_PLACE=out is x,
        ROWS=tall,
        BLOCK_D=block,
        warps=warps_for(tall * block),
    )


def lined(x: Tensor) -> Tensor:
    """x with its columns side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def steer_add(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta [D] in a new tensor [N, D]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    add_rows(lined(x), None, delta, out)
    return out


def steer_add_(x: Tensor, delta: Tensor) -> None:
    """x += delta [D] in place; a strided column axis goes through a copy."""
    if x.stride(-1) == 1:
        add_rows(x, None, delta, x)
    else:
        x.copy_(steer_add(x, delta))


def variants() -> Iterator[Variant]:
    """bfloat16, in place, to every row and by slot: one row a program, and as many as a tile has."""
    row = "*bf16:16"
    types = {"x_ptr": row, "deltas_ptr": "*fp32:16", "out_ptr": row, "n": "i32", "share": "i32", "S": "i32"}
    types |= {"D": "i32:16", "x_stride": "i64:16", "out_stride": "i64:16"}
    for block in sorted({min(triton.next_power_of_2(dim), STEER_BLOCK) for dim in WIDTHS}):
        for tall in (1, STEER_ELEMENTS // block):
            tile, warps = {"IN_PLACE": True, "ROWS": tall, "BLOCK_D": block}, warps_for(tall * block)
            yield variant_of(steer_add_kernel, types, tile, warps)
            yield variant_of(steer_add_kernel, types | {"slots_ptr": "*i32"}, tile, warps)


def variant_of(kernel: Any, types: Mapping[str, str], tile: Mapping[str, Any], warps: int, stages: int = 3) -> Variant:
    """The form of a kernel whose arguments are those that `types` names, and None."""
    arguments = [p.name for p in kernel.params if not p.is_constexpr]
    given = {name: types[name] for name in arguments if name in types}
    return Variant(kernel, given, {n: None for n in arguments if n not in given} | dict(tile), warps, stages)
