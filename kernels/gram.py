"""Gram matrices on a GPU: the lower tiles of Y'Y by tensor cores, summed in chains of rows that end in float64. Which
chains are summed together follows from widths and row counts alone, whatever the grid.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..precision import DEVICE_BLOCK_ROWS, DEVICE_CHAIN, TILE, device_chain
from ..reference import gram_ref
from ._launch import Variant, launch
from ._tiles import GRAM_BAND, GRAM_DEEP, GRAM_FOLD_ROWS, GRAM_FOLD_WARPS, GRAM_ODD, GRAM_SHAPE, GRAM_WORKERS
from .gram_rows import exponents, scale_rows

EDGE = tl.constexpr(TILE)  # of a tile
FEW = tl.constexpr(32)  # rows of a tile that are added to the state at once, in float64


@triton.jit
def _triangle(t):
    """The row i of element t of a packed lower triangle, i(i+1)/2 <= t < (i+1)(i+2)/2."""
    i = ((tl.sqrt((8 * t + 1).to(tl.float32)) - 1) * 0.5).to(tl.int32)
    i -= (i * (i + 1) // 2 > t).to(tl.int32)  # a root that was rounded
    return i + ((i + 1) * (i + 2) // 2 <= t).to(tl.int32)


@triton.jit
def _panels(t, panels, BAND: tl.constexpr):
    """Row and column panel of the tile that is summed as number t.

    Bands of panels, each column by column up to its own triangle: tiles summed at a time read few panels, which then
    stay in L2.
    """
    top = _triangle(t) // BAND * BAND
    height = tl.minimum(BAND, panels - top)
    t -= top * (top + 1) // 2
    within = t - top * height  # the number in the triangle
    i = _triangle(tl.maximum(within, 0))
    row = tl.where(within < 0, t % height, i)
    column = tl.where(within < 0, t // height, top + within - i * (i + 1) // 2)
    return top + row, column


@triton.jit
def _add(sums, tiles_ptr, exponent_ptr, hook, i, j, rows, D):
    """tiles[hook, i, j] += 2^(k_r + k_c) sums [R, 128], for rows [R] of a tile, in float64."""
    cols = tl.arange(0, EDGE)
    panels = tl.cdiv(D, EDGE)
    tile = hook.to(tl.int64) * (panels * (panels + 1) // 2) + i * (i + 1) // 2 + j
    at = tiles_ptr + tile * (EDGE * EDGE) + rows[:, None] * EDGE + cols[None, :]
    k_ptr = exponent_ptr + hook.to(tl.int64) * D
    k_rows = tl.load(k_ptr + i * EDGE + rows, mask=i * EDGE + rows < D, other=0)
    k_cols = tl.load(k_ptr + j * EDGE + cols, mask=j * EDGE + cols < D, other=0)
    power = ((k_rows[:, None] + k_cols[None, :] + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    tl.store(at, tl.load(at) + sums.to(tl.float64) * power)


@triton.jit(do_not_specialize=["rows", "wanted", "whole", "cut", "workers"])
def gram_kernel(
    y_ptr,
    cursor_ptr,
    exponent_ptr,
    tiles_ptr,
    parts_ptr,
    D,
    rows,
    wanted,
    whole,
    cut,
    workers,
    PARTS: tl.constexpr,
    CHAIN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """tiles += 2^(k_i + k_j) sum over rows of hi_i hi_j + (hi_i lo_j + lo_i hi_j) 2^-11, y: [S, PARTS, rows, D] fp16.

    PARTS = 1: hi only. Products of CHAIN rows are summed by `tl.dot` in fp32 from zero, chains in fp32 in order, then
    in float64. The first `whole` of all S T tiles are one program's each; the chains of the last `cut` < workers are
    dealt out evenly to `workers`, so that each has chains of at most two tiles, whose sums stay in parts, fp32
    [2 workers + programs, 128, 128].
    """
    STEPS: tl.constexpr = CHAIN // BLOCK_K
    PRODUCTS: tl.constexpr = 2 * PARTS - 1
    pid, programs = tl.program_id(0), tl.num_programs(0)
    chains, panels = tl.cdiv(rows, CHAIN), tl.cdiv(D, EDGE)
    count = panels * (panels + 1) // 2
    mine = tl.cdiv(tl.maximum(whole - pid, 0), programs)
    turns = mine + tl.where(cut > 0, 2 * tl.cdiv(tl.maximum(workers - pid, 0), programs), 0)
    turns = tl.where(tl.load(cursor_ptr) - tl.load(cursor_ptr + 1) >= wanted, turns, 0)
    lanes, span = tl.arange(0, BLOCK_K), tl.arange(0, EDGE)
    # Nothing is hoisted out of this loop: what the end of a turn needs would take registers from the sums.
    for turn in tl.range(turns, disable_licm=True):
        is_whole = turn < mine
        worker = pid + (turn - mine) // 2 * programs
        second = (turn - mine) % 2
        begin = worker * cut * chains // workers
        end = (worker + 1) * cut * chains // workers
        item = begin // chains + second
        first = tl.where(is_whole, 0, tl.maximum(begin - item * chains, 0))
        last = tl.where(is_whole, chains, tl.minimum(end - item * chains, chains))
        item = tl.where(is_whole, pid + turn * programs, whole + item)
        hook = item // count
        i, j = _panels(item % count, panels, BAND)
        left, right = i * EDGE + span, j * EDGE + span
        a_at = left[:, None] + (lanes * D)[None, :]
        b_at = (lanes * D)[:, None] + right[None, :]
        base = y_ptr + hook.to(tl.int64) * PARTS * rows * D
        chain = tl.zeros([EDGE, EDGE], tl.float32)
        total = tl.zeros([EDGE, EDGE], tl.float32)
        # One loop over all chains, so that loads run ahead across their ends, and one running chain in it: wgmma on two
        # is serialised by the assembler.
        for step in range(tl.maximum(last - first, 0) * (PRODUCTS * STEPS)):
            product = step // STEPS % PRODUCTS
            row = (first + step // (STEPS * PRODUCTS)) * CHAIN + step % STEPS * BLOCK_K
            inside = row + lanes < rows  # the last chain may be short
            a_ptr = base + (row + tl.where(product == 2, rows, 0)).to(tl.int64) * D
            b_ptr = base + (row + tl.where(product == 1, rows, 0)).to(tl.int64) * D
            a = tl.load(a_ptr + a_at, mask=(left < D)[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptr + b_at, mask=inside[:, None] & (right < D)[None, :], other=0.0)
            chain = tl.dot(a, b, chain)
            if (step % STEPS == STEPS - 1) & (product != 1):
                total += chain * tl.where(product == 0, 1.0, 1 / 2048)
                chain = tl.zeros([EDGE, EDGE], tl.float32)
        # The sums go out in fp32, then by few rows into the state: in float64 they would not fit beside each other.
        slot = tl.where(is_whole, workers * 2 + pid, worker * 2 + second)
        at = parts_ptr + slot * (EDGE * EDGE) + span[None, :]
        tl.store(at + span[:, None] * EDGE, total, mask=(span < (last - first) * EDGE)[:, None])  # all or none
        if is_whole:
            tl.debug_barrier()
            for few in range(0, EDGE, FEW):
                some = few + tl.arange(0, FEW)
                sums = tl.load(at + some[:, None] * EDGE)
                _add(sums, tiles_ptr, exponent_ptr, hook, i, j, some, D)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["chains", "wanted", "whole", "cut", "workers"])
def gram_fold_kernel(
    parts_ptr,
    cursor_ptr,
    exponent_ptr,
    tiles_ptr,
    D,
    chains,
    wanted,
    whole,
    cut,
    workers,
    ROWS: tl.constexpr,
    DEEP: tl.constexpr,
    BAND: tl.constexpr,
):
    """tiles += 2^(k_i + k_j) sum of the parts of a tile that was cut, by workers in order, in float64.

    parts: [2 workers, 128, 128] fp32; program (t, p): rows p ROWS .. of the cut tile t.
    """
    if tl.load(cursor_ptr) - tl.load(cursor_ptr + 1) < wanted:
        return
    item = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = parts_ptr + rows[:, None] * EDGE + tl.arange(0, EDGE)[None, :]
    begin = item * chains
    first = ((begin + 1) * workers - 1) // (cut * chains)  # who has the tile's first chain, and who its last
    last = ((begin + chains) * workers - 1) // (cut * chains)
    total = tl.zeros([ROWS, EDGE], tl.float64)
    for deep in range(first, last + 1, DEEP):
        for worker in tl.static_range(DEEP):
            worker += deep
            start = worker * cut * chains // workers
            stop = tl.where(worker <= last, (worker + 1) * cut * chains // workers, 0)
            inside = (rows < (stop - start) * EDGE)[:, None]  # all or none
            slot = worker * 2 + (start < begin).to(tl.int32)
            total += tl.load(at + slot * (EDGE * EDGE), mask=inside, other=0.0).to(tl.float64)
    panels = tl.cdiv(D, EDGE)
    count = panels * (panels + 1) // 2
    item += whole
    i, j = _panels(item % count, panels, BAND)
    _add(total, tiles_ptr, exponent_ptr, item // count, i, j, rows, D)


def _cut(items: int, chains: int) -> int:
    """How many of the last tiles are cut, so that all programs end together; none where that saves under three chains,
    about what it costs.
    """
    left = items % GRAM_WORKERS
    return left if chains * (GRAM_WORKERS - left) >= 3 * GRAM_WORKERS else 0


@functools.cache
def _programs(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


_parts = WeakTensorKeyDictionary()  # by the cursor of their rows


def _parts_of(cursor: Tensor, slots: int) -> Tensor:
    """Memory for the sums of `slots` tiles, as long as the cursor lives: a drain allocates nothing."""
    held = _parts.get(cursor)
    if held is None or len(held) < slots:
        held = _parts[cursor] = torch.empty(slots, TILE, TILE, dtype=torch.float32, device=cursor.device)
    return held


def _constants(parts: int, chain: int, block_k: int) -> dict[str, int]:
    return {"PARTS": parts, "CHAIN": chain, "BLOCK_K": block_k, "BAND": GRAM_BAND}


FOLD = {"ROWS": GRAM_FOLD_ROWS, "DEEP": GRAM_DEEP, "BAND": GRAM_BAND}


def _launch(y: Tensor, cursor: Tensor, wanted: int, exponent: Tensor, tiles: Tensor, chain: int) -> None:
    """Launch on y [S, P, rows, D] where cursor [2] holds `wanted` rows or more."""
    hooks, parts, rows, dim = y.shape
    block_k, warps, stages = GRAM_ODD if dim % 16 else GRAM_SHAPE
    chains, panels = triton.cdiv(rows, chain), triton.cdiv(dim, TILE)
    items = hooks * panels * (panels + 1) // 2
    cut = _cut(items, chains)
    programs = min(_programs(y.device), items - cut + (GRAM_WORKERS if cut else 0))
    held = _parts_of(cursor, 2 * GRAM_WORKERS + programs)
    ends = (wanted, items - cut, cut, GRAM_WORKERS)
    args = (y, cursor, exponent, tiles, held, dim, rows, *ends)
    launch(gram_kernel, (programs,), *args, warps=warps, stages=stages, **_constants(parts, chain, block_k))
    args = (held, cursor, exponent, tiles, dim, chains, *ends)
    launch(gram_fold_kernel, (cut, TILE // FOLD["ROWS"]), *args, warps=GRAM_FOLD_WARPS, **FOLD)


def fold_gram(y: Tensor, cursor: Tensor, block: int, exponent: Tensor, tiles: Tensor, chain: int) -> None:
    """tiles [S, T, 128, 128] += the gram of y [S, P, block, D], where cursor [2] holds a full block."""
    _launch(y, cursor, block, exponent, tiles.view(-1), chain)


def gram(rows: Tensor, weights: Tensor | None, shift: Tensor, tiles: Tensor) -> None:
    """tiles [T, 128, 128] += sum w (x - s)(x - s)' over rows [N, D]; float64 rows by the library's product.

    y = (x - s) sqrt(w) is scaled by each column's peak, so that none overflows, and multiplied as `fold_gram` does: in
    one part for 16-bit rows without weights, whose x - s hardly rounds about a shift of few bits, else in two. Errors
    are relative to the sums themselves, whether a huge row is in them or not.
    """
    if rows.dtype == torch.float64:
        gram_ref(rows, weights, shift, tiles)
        return
    n, dim = rows.shape
    if n == 0:
        return
    parts = 1 if weights is None and rows.dtype != torch.float32 else 2
    width = triton.cdiv(dim, 16) * 16
    root, shift = None if weights is None else weights.sqrt(), shift.contiguous()
    exponent = exponents(rows, root, shift, width)
    cursor = torch.zeros(2, dtype=torch.int64, device=rows.device)
    for start in range(0, n, DEVICE_BLOCK_ROWS):
        block = rows[start : start + DEVICE_BLOCK_ROWS]
        length = triton.cdiv(len(block), DEVICE_CHAIN) * DEVICE_CHAIN  # whole chains of either length
        y = torch.empty(1, parts, length, width, dtype=torch.float16, device=rows.device)
        scale_rows(block, None if root is None else root[start:], shift, exponent, y)
        _launch(y, cursor, 0, exponent, tiles.view(-1), device_chain(rows.dtype))


def variants() -> Iterator[Variant]:
    """Widths of multiples of 16 and others, by fp16 parts and by chains of bfloat16 rows and others; then the parts of
    tiles that were cut."""
    held = {"cursor_ptr": "*i64:16", "tiles_ptr": "*fp64:16", "parts_ptr": "*fp32:16"}
    ends = dict.fromkeys(("wanted", "whole", "cut", "workers"), "i32")
    wide = {"y_ptr": "*fp16:16", "exponent_ptr": "*i32:16", "D": "i32:16", "rows": "i32"}
    odd = {"y_ptr": "*fp16", "exponent_ptr": "*i32", "D": "i32", "rows": "i32"}
    half = DEVICE_CHAIN // 2
    for parts, chain in ((1, DEVICE_CHAIN), (1, half), (2, half)):
        for given, (block_k, warps, stages) in ((wide, GRAM_SHAPE), (odd, GRAM_ODD)):
            yield Variant(gram_kernel, held | given | ends, _constants(parts, chain, block_k), warps, stages)
    given = {"exponent_ptr": "*i32", "D": "i32", "chains": "i32"}
    yield Variant(gram_fold_kernel, held | given | ends, FOLD, GRAM_FOLD_WARPS)
