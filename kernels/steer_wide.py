"""Edits of many directions at once on a GPU, by tensor cores, for rows of any width."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from emocore.reference_steering import rows_per_slot

from ._launch import Variant, launch
from ._tiles import EDIT_WIDE
from .steering import slot_of, variant_of


@triton.jit(do_not_specialize=["n", "share", "S", "R"])
def steer_wide_kernel(
    x_ptr,
    slots_ptr,
    deltas_ptr,
    basis_ptr,
    dual_ptr,
    target_ptr,
    gate_ptr,
    out_ptr,
    n,
    share,
    S,
    D,
    R,
    x_stride,
    out_stride,
    RANK: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = x + deltas_s + (gate_s (target_s - x basis')) dual by tensor cores; R <= RANK, any D, arguments as above.

    The rows are read twice, the second time from L2; products are three tf32 ones, sums float32, rounded once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    on = inside
    slot = tl.zeros([ROWS], tl.int32)
    if slots_ptr is not None:
        slot = slot_of(slots_ptr, rows, inside, share, S)
        on = slot > 0
        if (tl.max(slot, 0) == 0) & IN_PLACE:
            return
    r = tl.arange(0, RANK)
    x_at = x_ptr + rows[:, None] * x_stride
    scores = tl.zeros([ROWS, RANK], tl.float32)
    for begin in range(0, D, BLOCK_D):
        cols = begin + tl.arange(0, BLOCK_D)
        x = tl.load(x_at + cols[None, :], mask=on[:, None] & (cols < D)[None, :], other=0.0)
        inner = (r < R)[None, :] & (cols < D)[:, None]
        basis = tl.load(basis_ptr + r[None, :] * D + cols[:, None], mask=inner, other=0.0)
        scores = tl.dot(x.to(tl.float32), basis, scores, input_precision="tf32x3")
    at = slot[:, None] * R + r[None, :]
    valid = on[:, None] & (r < R)[None, :]
    move = tl.load(target_ptr + at, mask=valid, other=0.0) - scores
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + at, mask=valid, other=0.0)
        move = tl.where(gate != 0, gate * move, 0.0)
    move = tl.where(valid, move, 0.0)
    for begin in range(0, D, BLOCK_D):
        cols = begin + tl.arange(0, BLOCK_D)
        written = inside[:, None] & (cols < D)[None, :]
        if IN_PLACE:
            written = on[:, None] & (cols < D)[None, :]
        x = tl.load(x_at + cols[None, :], mask=written, other=0.0)
        inner = (r < R)[:, None] & (cols < D)[None, :]
        dual = tl.load(dual_ptr + r[:, None] * D + cols[None, :], mask=inner, other=0.0)
        y = x.to(tl.float32) + tl.dot(move, dual, input_precision="tf32x3")
        if deltas_ptr is not None:
            delta_at = deltas_ptr + slot.to(tl.int64)[:, None] * D + cols[None, :]
            y += tl.load(delta_at, mask=on[:, None] & (cols < D)[None, :], other=0.0)
        out = tl.where(on[:, None], y.to(x.dtype), x)
        tl.store(out_ptr + rows[:, None] * out_stride + cols[None, :], out, mask=written)


def edit_wide(
    x: Tensor,
    out: Tensor,
    slots: Tensor | None,
    deltas: Tensor | None,
    basis: Tensor,
    dual: Tensor,
    target: Tensor,
    gate: Tensor | None,
) -> None:
    """Launch on x [N, D] with unit column stride; out may be x itself."""
    (n, dim), rank = x.shape, len(basis)
    tall, block, warps, stages = EDIT_WIDE
    launch(
        steer_wide_kernel,
        (triton.cdiv(n, tall),),
        x,
        slots,
        deltas,
        basis,
        dual,
        target,
        gate,
        out,
        n,
        1 if slots is None else rows_per_slot(n, slots),
        1 if deltas is None else len(deltas),
        dim,
        rank,
        x.stride(0),
        out.stride(0),
        RANK=max(16, triton.next_power_of_2(rank)),
        IN_PLACE=out is x,
        ROWS=tall,
        BLOCK_D=block,
        warps=warps,
        stages=stages,
    )


def variants() -> Iterator[Variant]:
    """bfloat16 rows by slot, in place, up to 16 directions and up to 64."""
    types = {"x_ptr": "*bf16:16", "slots_ptr": "*i32", "deltas_ptr": "*fp32:16", "basis_ptr": "*fp32:16"}
    types |= {"dual_ptr": "*fp32:16", "target_ptr": "*fp32", "gate_ptr": "*fp32", "out_ptr": "*bf16:16", "n": "i32"}
    types |= {"share": "i32", "S": "i32", "D": "i32:16", "R": "i32", "x_stride": "i64:16", "out_stride": "i64:16"}
    rows, block, warps, stages = EDIT_WIDE
    for rank in (16, 64):
        tile = {"RANK": rank, "IN_PLACE": True, "ROWS": rows, "BLOCK_D": block}
        yield variant_of(steer_wide_kernel, types, tile, warps, stages)
