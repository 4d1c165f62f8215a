"""Edits on a GPU: scores of each row moved to targets, by slots and above levels, in one read and one write of it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emocore.reference import steer_set_ref
from emocore.reference_steering import rows_per_slot, steer_rows_ref, steer_when_ref

from ._launch import Variant, launch
from ._tiles import (
    EDIT_COLUMNS,
    EDIT_DIRECTIONS,
    EDIT_ELEMENTS,
    EDIT_FEW_COLUMNS,
    EDIT_PROGRAMS,
    EDIT_RANK,
    EDIT_WARPS,
    WIDTHS,
)
from .steer_slots import steer_slots
from .steer_wide import edit_wide
from .steering import add_rows, lined, slot_of, variant_of, warps_for


@triton.jit(do_not_specialize=["n", "share", "S", "W", "R"])
def steer_edit_kernel(
    x_ptr,
    slots_ptr,
    readers_ptr,
    levels_ptr,
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
    W,
    R,
    x_stride,
    out_stride,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = x + deltas_s + sum_r gate_sr (target_sr - x . basis_r) dual_r where all x . readers_w > levels_sw, else x.

    x, out: [n, D], s = slots[row // share], deltas: [S, D], basis, dual: [R, D], target, gate: [S, R], readers: [W, D],
    levels: [S, W]; slot 0 is nothing, and without slots all rows have s = 0. float32 throughout, rounded once.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < n
    across = cols < D
    on = inside
    slot = tl.zeros([ROWS], tl.int32)
    if slots_ptr is not None:
        slot = slot_of(slots_ptr, rows, inside, share, S)
        on = slot > 0
        if (tl.max(slot, 0) == 0) & IN_PLACE:
            return
    read = inside
    if IN_PLACE:
        read = on
    x_at = x_ptr + rows[:, None] * x_stride + cols[None, :]
    x = tl.load(x_at, mask=read[:, None] & across[None, :], other=0.0)
    wide = x.to(tl.float32)
    if readers_ptr is not None:
        for w in range(W):
            reader = tl.load(readers_ptr + w * D + cols, mask=across, other=0.0)
            on = on & (tl.sum(wide * reader[None, :], 1) > tl.load(levels_ptr + slot * W + w))
        if (tl.max(on.to(tl.int32), 0) == 0) & IN_PLACE:
            return
    y = wide
    if deltas_ptr is not None:
        delta_at = deltas_ptr + slot.to(tl.int64)[:, None] * D + cols[None, :]
        y += tl.load(delta_at, mask=on[:, None] & across[None, :], other=0.0)
    if basis_ptr is not None:
        for r in range(R):
            basis = tl.load(basis_ptr + r * D + cols, mask=across, other=0.0)
            dual = tl.load(dual_ptr + r * D + cols, mask=across, other=0.0)
            move = tl.load(target_ptr + slot * R + r) - tl.sum(wide * basis[None, :], 1)
            if gate_ptr is not None:
                gate = tl.load(gate_ptr + slot * R + r)
                move = tl.where(gate != 0, gate * move, 0.0)
            y += move[:, None] * dual[None, :]
    out = y.to(x.dtype)
    written = on
    if slots_ptr is not None and not IN_PLACE:
        out = tl.where(on[:, None], out, x)
        written = inside
    tl.store(out_ptr + rows[:, None] * out_stride + cols[None, :], out, mask=written[:, None] & across[None, :])


class Sets(NamedTuple):
    """What is set, by slot: basis, dual [R, D], target, gate [S, R] float32; without a gate all of it."""

    basis: Tensor
    dual: Tensor
    target: Tensor
    gate: Tensor | None


class When(NamedTuple):
    """Readers [W, D] and the levels [S, W] that all scores of a row must exceed, float32."""

    readers: Tensor
    levels: Tensor


def _sets(
    basis: Tensor | None = None, dual: Tensor | None = None, target: Tensor | None = None, gate: Tensor | None = None
) -> Sets | None:
    if basis is None or dual is None or target is None:
        return None
    return Sets(_single(basis), _single(dual), _single(target), None if gate is None else _single(gate))


def _single(t: Tensor) -> Tensor:
    return t.float().contiguous()


def _served(x: Tensor, sets: Sets | None, when: When | None = None) -> bool:
    """Whether kernels do it: for float64 rows only additions, and no sets of many directions."""
    if x.dtype == torch.float64:
        return sets is None and when is None
    return sets is None or len(sets.basis) <= EDIT_RANK


def _edit(
    x: Tensor, out: Tensor, slots: Tensor | None, deltas: Tensor | None, sets: Sets | None, when: When | None = None
) -> None:
    """Edit x [N, D] of unit column stride; out may be x itself."""
    directions = (len(when.readers) if when else 0) + (len(sets.basis) if sets else 0)
    if directions and directions <= EDIT_DIRECTIONS and x.shape[1] <= EDIT_COLUMNS:
        _edit_held(x, out, slots, deltas, sets, when)
        return
    if when:  # score, select, apply
        slots = steer_slots(x, slots, *when)
    if sets:
        edit_wide(x, out, slots, deltas, *sets)
    else:
        add_rows(x, slots, deltas, out)


def _held(dim: int) -> tuple[int, int]:
    """Columns and most rows of a tile of whole rows in registers."""
    block = triton.next_power_of_2(dim)
    return block, EDIT_ELEMENTS * EDIT_WARPS[block > EDIT_FEW_COLUMNS] // block


def _warps(tall: int, block: int) -> int:
    return warps_for(tall * block, EDIT_WARPS[block > EDIT_FEW_COLUMNS])


def _edit_held(
    x: Tensor, out: Tensor, slots: Tensor | None, deltas: Tensor | None, sets: Sets | None, when: When | None
) -> None:
    n, dim = x.shape
    block, most = _held(dim)
    tall = min(most, triton.next_power_of_2(max(1, triton.cdiv(n, EDIT_PROGRAMS))))
    launch(
        steer_edit_kernel,
        (triton.cdiv(n, tall),),
        x,
        slots,
        *(when or (None, None)),
        deltas,
        *(sets or (None, None, None, None)),
        out,
        n,
        1 if slots is None else rows_per_slot(n, slots),
        1 if deltas is None else len(deltas),
        dim,
        len(when.readers) if when else 0,
        len(sets.basis) if sets else 0,
        x.stride(0),
        out.stride(0),
        IN_PLACE=out is x,
        ROWS=tall,
        BLOCK_D=block,
        warps=_warps(tall, block),
    )


# --- the ops; in place, rows of slot 0 are not written, and a strided column axis goes through a copy


def steer_set(x: Tensor, basis: Tensor, dual: Tensor, target: Tensor) -> Tensor:
    """x + (target - x B') B* in a new tensor [N, D]."""
    sets = _sets(basis, dual, target[None])
    if not _served(x, sets):
        return steer_set_ref(x, basis, dual, target)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _edit(lined(x), out, None, None, sets)
    return out


def steer_set_(x: Tensor, basis: Tensor, dual: Tensor, target: Tensor) -> None:
    """x += (target - x B') B*."""
    sets = _sets(basis, dual, target[None])
    if x.stride(-1) == 1 and _served(x, sets):
        _edit(x, x, None, None, sets)
    else:
        x.copy_(steer_set(x, basis, dual, target))


def steer_rows(x: Tensor, slots: Tensor, deltas: Tensor, *sets: Tensor | None) -> Tensor:
    """x + delta_s + g_s (t_s - x B') B* by slot s, in a new tensor [N, D]; sets: B, B*, t, g."""
    given = _sets(*sets)
    if not _served(x, given):
        return steer_rows_ref(x, slots, deltas, *sets)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _edit(lined(x), out, slots, deltas.contiguous(), given)
    return out


def steer_rows_(x: Tensor, slots: Tensor, deltas: Tensor, *sets: Tensor | None) -> None:
    """x += delta_s + g_s (t_s - x B') B*."""
    given = _sets(*sets)
    if x.stride(-1) == 1 and _served(x, given):
        _edit(x, x, slots, deltas.contiguous(), given)
    else:
        x.copy_(steer_rows(x, slots, deltas, *sets))


def steer_when(
    x: Tensor, slots: Tensor, readers: Tensor, levels: Tensor, deltas: Tensor, *sets: Tensor | None
) -> Tensor:
    """What steer_rows makes of the rows whose scores all exceed their slot's levels; the others as they are."""
    given, when = _sets(*sets), When(_single(readers), _single(levels))
    if not _served(x, given, when):
        return steer_when_ref(x, slots, readers, levels, deltas, *sets)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _edit(lined(x), out, slots, deltas.contiguous(), given, when)
    return out


def steer_when_(
    x: Tensor, slots: Tensor, readers: Tensor, levels: Tensor, deltas: Tensor, *sets: Tensor | None
) -> None:
    """The same in place."""
    given, when = _sets(*sets), When(_single(readers), _single(levels))
    if x.stride(-1) == 1 and _served(x, given, when):
        _edit(x, x, slots, deltas.contiguous(), given, when)
    else:
        x.copy_(steer_when(x, slots, readers, levels, deltas, *sets))


# --- what ships


def variants() -> Iterator[Variant]:
    """In place, of bfloat16: sets of every row, sets by slot, and sets by slot above a level.

    Rows as they come in decoding, one a program; more of them are left to the JIT, whose 10 us they do not notice.
    """
    types = {"x_ptr": "*bf16:16", "basis_ptr": "*fp32:16", "dual_ptr": "*fp32:16", "target_ptr": "*fp32"}
    types |= {"out_ptr": "*bf16:16", "n": "i32", "share": "i32", "S": "i32", "D": "i32:16", "W": "i32", "R": "i32"}
    types |= {"x_stride": "i64:16", "out_stride": "i64:16"}
    slots = types | {"slots_ptr": "*i32", "deltas_ptr": "*fp32:16", "gate_ptr": "*fp32"}
    when = slots | {"readers_ptr": "*fp32:16", "levels_ptr": "*fp32"}
    for block in sorted({_held(dim)[0] for dim in WIDTHS}):
        for given in (types, slots, when):
            tile = {"IN_PLACE": True, "ROWS": 1, "BLOCK_D": block}
            yield variant_of(steer_edit_kernel, given, tile, _warps(1, block))
