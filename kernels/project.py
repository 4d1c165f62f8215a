"""Scores on a GPU: rows against readers by tensor cores in one read of the rows, which may be steered on the way."""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from emocore import packing
from emocore.reference import project_ref
from emocore.reference_steering import project_packed_ref, project_rows_ref, project_steer_ref, rows_per_slot

from . import _launch
from ._launch import Variant, launch
from ._tiles import FEW_COLUMNS, FEW_READERS
from .project_few import project_few
from .project_tiles import form_of, tile_of
from .steering import add_rows, lined, slot_of, variant_of

INTERPRETED = tl.constexpr(_launch.INTERPRETED)


@triton.jit
def _score(acc, x, packed_ptr, first, k, cols, K, D, PARTS: tl.constexpr, EVEN: tl.constexpr):
    """acc [ROWS, C] += x . v_k, x: [ROWS, BLOCK_D], readers k [C], whose first part begins at row `first` of packed."""
    at = packed_ptr + (first + tl.minimum(k, K - 1).to(tl.int64))[None, :] * D + cols[:, None]  # past K: never written
    for p in tl.static_range(PARTS):
        if EVEN:
            v = tl.load(at + p * K.to(tl.int64) * D)
        else:
            v = tl.load(at + p * K.to(tl.int64) * D, mask=(cols < D)[:, None], other=0.0)
        if INTERPRETED:
            acc = tl.dot(x.to(tl.float32), v.to(tl.float32), acc)
        else:
            acc = tl.dot(x, v, acc, input_precision="tf32x3")  # says how float32 is multiplied
    return acc


@triton.jit
def _store(acc, out_ptr, offset_ptr, rows, inside, stride, start, K, scale):
    """out[rows, start + c] = (acc[:, c] + offset[start + c]) scale, 4096 elements at a time to spare registers."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    if ROWS * COLUMNS > 2048:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [ROWS, 2, HALF]), [0, 2, 1]))
        _store(left, out_ptr, offset_ptr, rows, inside, stride, start, K, scale)
        _store(right, out_ptr, offset_ptr, rows, inside, stride, start + HALF, K, scale)
    else:
        k = start + tl.arange(0, COLUMNS)
        offset = tl.load(offset_ptr + k, mask=k < K, other=0.0)
        mask = inside[:, None] & (k < K)[None, :]
        tl.store(out_ptr + rows[:, None] * stride + k[None, :], (acc + offset[None, :]) * scale[:, None], mask=mask)


@triton.jit
def _steered(x, deltas_ptr, slot, cols, mask, D, SHARED: tl.constexpr):
    """x + deltas[slot], x: [ROWS, BLOCK_D], slot: [ROWS]; the very bits where the slot is 0."""
    on = (slot > 0)[:, None]
    if SHARED:  # all rows have one slot
        delta = tl.load(deltas_ptr + tl.max(slot, 0).to(tl.int64) * D + cols, mask=cols < D, other=0.0)[None, :]
    else:
        at = deltas_ptr + slot.to(tl.int64)[:, None] * D + cols[None, :]
        delta = tl.load(at, mask=mask & on, other=0.0)
    return tl.where(on, (x.to(tl.float32) + delta).to(x.dtype), x)


@triton.jit(do_not_specialize=["n", "K", "groups", "share", "S"])
def project_kernel(
    x_ptr,
    packed_ptr,
    offset_ptr,
    centre_ptr,
    count_ptr,
    out_ptr,
    slots_ptr,
    deltas_ptr,
    y_ptr,
    n,
    K,
    D,
    groups,
    share,
    S,
    x_station,
    x_stride,
    out_station,
    out_stride,
    y_stride,
    PARTS: tl.constexpr,
    NORMALISE: tl.constexpr,
    SHARED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """out[s, r, k] = x[s, r] . sum_p packed[s, p, k] + offset[s, k], over |x - c| where NORMALISE; y = x + deltas[slot]

    x: [stations, n, D], packed: [stations, PARTS, K, D] of x's dtype, offset: [stations, K], out: [stations, n, K].
    A program has ROWS rows, all of D, and HEAD + TAIL readers of `groups` such; 16-bit products are exact, float32 rows
    are multiplied in three tf32 products, sums are float32. Rows from count[0] on are left out.
    """
    station = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) // groups
    start = tl.program_id(0) % groups * (HEAD + TAIL)
    if count_ptr is not None:
        n = tl.minimum(tl.load(count_ptr), n).to(tl.int32)
        if tile * ROWS >= n:
            return
    rows = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    head = start + tl.arange(0, HEAD)
    acc = tl.zeros([ROWS, HEAD], tl.float32)
    if TAIL > 0:
        tail = start + HEAD + tl.arange(0, TAIL)
        acc_tail = tl.zeros([ROWS, TAIL], tl.float32)
    if NORMALISE:
        square = tl.zeros([ROWS], tl.float32)
    if slots_ptr is not None:
        slot = slot_of(slots_ptr, rows, inside, share, S)
        written = rows < tl.where(start == 0, n, 0)  # by the first of the programs that share rows
    x_at = x_ptr + station * x_station + rows[:, None] * x_stride
    first = station * PARTS * K
    for begin in range(0, D, BLOCK_D):
        cols = begin + tl.arange(0, BLOCK_D)
        mask = inside[:, None]
        if not EVEN:
            mask = mask & (cols < D)[None, :]
        x = tl.load(x_at + cols[None, :], mask=mask, other=0.0)
        acc = _score(acc, x, packed_ptr, first, head, cols, K, D, PARTS, EVEN)
        if TAIL > 0:
            acc_tail = _score(acc_tail, x, packed_ptr, first, tail, cols, K, D, PARTS, EVEN)
        if NORMALISE:
            z = x.to(tl.float32)
            if centre_ptr is not None:
                z -= tl.load(centre_ptr + cols, mask=cols < D, other=0.0)[None, :]
            square += tl.sum(z * z, 1)
        if y_ptr is not None:
            y = _steered(x, deltas_ptr, slot, cols, mask, D, SHARED)
            tl.store(y_ptr + rows[:, None] * y_stride + cols[None, :], y, mask=mask & written[:, None])
    scale = tl.full([ROWS], 1.0, tl.float32)
    if NORMALISE:
        scale = tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        scale = tl.where(square < float("inf"), scale, float("nan"))  # too long for float32
    out_at = out_ptr + station * out_station
    offset_at = offset_ptr + station * K
    _store(acc, out_at, offset_at, rows, inside, out_stride, start, K, scale)
    if TAIL > 0:
        _store(acc_tail, out_at, offset_at, rows, inside, out_stride, start + HEAD, K, scale)


def _scores(
    x: Tensor,
    packed: Tensor,
    offset: Tensor,
    normalise: bool = False,
    centre: Tensor | None = None,
    count: Tensor | None = None,
    out: Tensor | None = None,
    steer: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Scores [S, n, K] of x [S, n, D] on packed [S, P, K, D]; steer = (slots, deltas, y): y = x + deltas[slot]."""
    (stations, n, dim), (parts, k) = x.shape, packed.shape[1:3]
    out = x.new_empty(stations, n, k, dtype=torch.float32) if out is None else out
    if steer is None and k <= FEW_READERS and dim <= FEW_COLUMNS:
        project_few(x, packed, offset, normalise, centre, count, out)
        return out
    slots, deltas, y = steer or (None, None, None)
    tile = tile_of(form_of(x, plain=not normalise and steer is None), k, parts, x.dtype)
    launch(
        project_kernel,
        (triton.cdiv(n, tile.rows) * tile.groups, stations),
        x,
        packed,
        offset,
        centre,
        count,
        out,
        slots,
        deltas,
        y,
        n,
        k,
        dim,
        tile.groups,
        1 if slots is None else rows_per_slot(n, slots),
        1 if deltas is None else len(deltas),
        *x.stride()[:2],
        *out.stride()[:2],
        0 if y is None else y.stride(0),
        PARTS=parts,
        NORMALISE=normalise,
        SHARED=slots is not None and len(slots) == 1,
        EVEN=dim % tile.block_d == 0,
        ROWS=tile.rows,
        BLOCK_D=tile.block_d,
        HEAD=tile.head,
        TAIL=tile.tail,
        warps=tile.warps,
        stages=tile.stages,
    )
    return out


# --- the ops


def project(
    rows: Tensor,
    readers: Tensor,
    centre: Tensor | None,
    normalise: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """(x - c) . v_k [N, K], over |x - c| when `normalise`, less mean, over std; float64 by the reference."""
    if torch.float64 in (rows.dtype, readers.dtype):
        return project_ref(rows, readers, centre, normalise, mean, std)
    if mean is not None or std is not None:
        scores = project(rows, readers, centre, normalise)
        scores = scores if mean is None else scores - mean.to(scores)
        return scores if std is None else scores / std.to(scores)
    few = len(readers) <= FEW_READERS and rows.shape[1] <= FEW_COLUMNS
    packed = packing.split(readers, torch.float32 if few else rows.dtype)
    offset = packing.offset(packed, centre)
    c = None if centre is None else centre.float().contiguous()
    return _scores(lined(rows)[None], packed[None], offset[None], normalise, c)[0]


def project_packed(rows: Tensor, packed: Tensor, offset: Tensor, normalise: bool) -> Tensor:
    """x . v_k + offset_k [N, K], over |x| when `normalise`, for readers packed [P, K, D] in the rows' dtype."""
    if rows.dtype == torch.float64:
        return project_packed_ref(rows, packed, offset, normalise)
    return _scores(lined(rows)[None], packed.contiguous()[None], offset[None], normalise)[0]


def project_rows(rows: Tensor, packed: Tensor, offset: Tensor, count: Tensor | None, out: Tensor) -> None:
    """out[s, r] = x . v_k + offset_k of every hook point's first count[0] rows [S, n, D], in one launch."""
    if rows.dtype == torch.float64:
        project_rows_ref(rows, packed, offset, count, out)
    elif out.stride(-1) != 1:
        whole = out.contiguous()
        project_rows(rows, packed, offset, count, whole)
        out.copy_(whole)
    else:
        _scores(lined(rows), packed.contiguous(), offset.contiguous(), count=count, out=out)


def project_steer(x: Tensor, packed: Tensor, offset: Tensor, slots: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of x [N, D] as it was, and x + deltas[slot], in one read."""
    if x.dtype == torch.float64:
        return project_steer_ref(x, packed, offset, slots, deltas)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    steer = (slots, deltas.float().contiguous(), y)
    return _scores(lined(x)[None], packed.contiguous()[None], offset[None], steer=steer)[0], y


def project_steer_(x: Tensor, packed: Tensor, offset: Tensor, slots: Tensor, deltas: Tensor) -> Tensor:
    """Scores of x [N, D] as it was, which becomes x + deltas[slot]; two launches where programs share rows."""
    k, parts = packed.shape[1], packed.shape[0]
    if x.dtype == torch.float64 or x.stride(-1) != 1:
        scores, y = project_steer(x, packed, offset, slots, deltas)
        x.copy_(y)
    elif tile_of(form_of(x[None], plain=False), k, parts, x.dtype).groups == 1:
        steer = (slots, deltas.float().contiguous(), x)
        scores = _scores(x[None], packed.contiguous()[None], offset[None], steer=steer)[0]
    else:
        scores = project_packed(x, packed, offset, False)
        add_rows(x, slots, deltas, x)
    return scores


# --- what ships


def variants() -> Iterator[Variant]:
    """171 readers of bfloat16 rows in one and two parts, of float16 rows in one, of float32 rows; of a group; cosines;
    rows steered by slot. "wide" is left to the JIT: sm_80 lacks the registers, and 32,768 rows do not notice.
    """
    for dtype, form, parts in itertools.product(("bf16", "fp16"), ("short", "low", "tall"), (1, 2)):
        if dtype == "bf16" or parts == 1:
            yield variant(dtype, form, 171, parts)
    for form in ("short", "low"):
        yield variant("fp32", form, 171, 1)
        yield variant("bf16", form, 171, 2, count_ptr="*i64")
    for form in ("short", "tall"):
        yield variant("bf16", form, 171, 2, normalise=True)
        yield variant("bf16", form, 171, 2, slots_ptr="*i32", deltas_ptr="*fp32:16", y_ptr="*bf16:16")


def variant(dtype: str, form: str, k: int, parts: int, normalise: bool = False, **pointers: str) -> Variant:
    """Scores of rows of `dtype` on k readers; `pointers` are the types of those that are not None."""
    tile = tile_of(form, k, parts, torch.float32 if dtype == "fp32" else torch.bfloat16)
    row, word = f"*{dtype}:16", "i64:16"
    types = {"x_ptr": row, "packed_ptr": row, "offset_ptr": "*fp32", "out_ptr": "*fp32:16", **pointers}
    types |= {"n": "i32", "K": "i32", "D": "i32:16", "groups": "i32", "share": "i32", "S": "i32", "x_station": word}
    types |= {"x_stride": word, "out_station": "i64", "out_stride": "i64", "y_stride": word}
    shape = {"PARTS": parts, "NORMALISE": normalise, "SHARED": False, "EVEN": True, "ROWS": tile.rows}
    shape |= {"BLOCK_D": tile.block_d, "HEAD": tile.head, "TAIL": tile.tail}
    return variant_of(project_kernel, types, shape, tile.warps, tile.stages)
