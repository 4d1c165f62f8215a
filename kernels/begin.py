"""The begin of a forward on a GPU: where every position goes (docs/gpu.md)."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._control import (
    BAD,
    ERRORS,
    FAULT_PADDING,
    FIRES,
    GOES_ON,
    OFFERED,
    OPEN,
    ROLLED_BACK,
    TALLIES,
    TALLY_KEPT,
    TALLY_MASKED,
    TALLY_OFFERED,
    TALLY_RESEEN,
    TALLY_SKIPPED,
    UNMASKED,
    WIDTH,
)
from ._launch import Variant, launch
from ._tiles import SCAN_BLOCK


@triton.jit
def _among(value, list_ptr, COUNT: tl.constexpr):
    """Whether each of value [BLOCK] is in list [COUNT]."""
    found = value != value
    for i in tl.static_range(COUNT):
        found = found | (value == tl.load(list_ptr + i))
    return found


@triton.jit(do_not_specialize=["sequences", "length", "positions", "mask_width", "past", "written"])
def rank_kernel(
    mask_ptr,
    shown_ptr,
    bounds_ptr,
    past_ptr,
    spans_ptr,
    skips_ptr,
    stops_ptr,
    pads_ptr,
    seen_ptr,
    header_ptr,
    rank_ptr,
    sequence_ptr,
    dest_ptr,
    kept_ptr,
    after_ptr,
    counts_ptr,
    sequences,
    length,
    positions,
    mask_width,
    past,
    written,
    mask_stride,
    shown_stride,
    dest_stride,
    kept_stride,
    span_stride,
    SPANS: tl.constexpr,
    STOPS: tl.constexpr,
    PADS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BOUNDS: tl.constexpr,
    HAS_PAST: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence and rule a program: ranks of the real tokens, and the place of each kept one among the sequence's.

    mask [B, mask_width], shown [B, T] ids, bounds [B + 1], spans [R, B, SPANS, 2], skips [R]; writes rank and sequence
    [N], dest [R, N], kept [R, B], after [B]: ranks shown when this forward ends, counts [B, 2]: real tokens, new ones.
    Program B lays out what stands behind the last packed sequence. int32 counts; no rank passes 2^31.
    """
    b = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    if b == sequences:  # padding behind the last packed sequence
        for at in range(tl.load(bounds_ptr + sequences), positions, BLOCK):
            t = at + lanes
            tl.store(dest_ptr + r * dest_stride + t, tl.full((BLOCK,), -1, tl.int32), mask=t < positions)
            tl.store(rank_ptr + t, tl.zeros((BLOCK,), tl.int32), mask=t < positions)
            tl.store(sequence_ptr + t, tl.zeros((BLOCK,), tl.int32), mask=t < positions)
        return
    start = b * length
    tokens = length
    if HAS_BOUNDS:
        start = tl.load(bounds_ptr + b).to(tl.int64)
        tokens = tl.load(bounds_ptr + b + 1) - start.to(tl.int32)
    before = past
    if HAS_PAST:
        before = tl.load(past_ptr).to(tl.int32)
    if HAS_MASK:  # ranks go over all that the mask covers; its last `length` columns are this forward's
        before = 0
        for at in range(0, mask_width - length, BLOCK):
            column = at + lanes
            old = tl.load(mask_ptr + b * mask_stride + column, mask=column < mask_width - length, other=0)
            before += tl.sum((old != 0).to(tl.int32), 0)
    seen = tl.load(seen_ptr + b) * tl.load(header_ptr + GOES_ON).to(tl.int32)
    skip = tl.load(skips_ptr + r)
    reached = seen
    real_count = 0
    new_count = 0
    kept = 0
    padding = 0
    for at in range(0, tokens, BLOCK):
        t = at + lanes
        inside = t < tokens
        real = inside
        if HAS_MASK:
            value = tl.load(mask_ptr + b * mask_stride + mask_width - length + t, mask=inside, other=0)
            real = real & (value != 0)
        rank = before + tl.cumsum(real.to(tl.int32), 0) - 1
        before += tl.sum(real.to(tl.int32), 0)
        if STOPS + PADS > 0:
            ids = tl.load(shown_ptr + b * shown_stride + t, mask=inside, other=0)
            real = real & ~(_among(ids, stops_ptr, STOPS) & (written >= 0) & (t >= written))
            asked = inside & ((t < written) | (written < 0))
            padding = tl.maximum(padding, tl.max((_among(ids, pads_ptr, PADS) & asked).to(tl.int32), 0))
        if PLAIN:
            rank = tl.zeros_like(rank)
        fresh = real & (rank >= seen)
        keep = fresh & (rank >= skip)
        if SPANS > 0:
            table = spans_ptr + (r * span_stride + b) * SPANS * 2
            within = (rank < 0) | (tl.load(table) < 0)  # -1 where the rule names no span
            for p in tl.static_range(SPANS):
                within = within | ((rank >= tl.load(table + 2 * p)) & (rank < tl.load(table + 2 * p + 1)))
            keep = keep & within
        place = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        kept += tl.sum(keep.to(tl.int32), 0)
        tl.store(dest_ptr + r * dest_stride + start + t, tl.where(keep, place, -1), mask=inside)
        if r == 0:
            tl.store(rank_ptr + start + t, rank, mask=inside)
            tl.store(sequence_ptr + start + t, tl.zeros_like(rank) + b.to(tl.int32), mask=inside)
        reached = tl.maximum(reached, tl.max(tl.where(real, rank + 1, 0), 0))
        real_count += tl.sum(real.to(tl.int32), 0)
        new_count += tl.sum(fresh.to(tl.int32), 0)
    tl.store(kept_ptr + r * kept_stride + b, kept)
    if r == 0:
        tl.store(after_ptr + b, reached)
        tl.store(counts_ptr + 2 * b, real_count)
        tl.store(counts_ptr + 2 * b + 1, new_count)
        if padding > 0:
            tl.atomic_or(header_ptr + ERRORS, tl.full((), FAULT_PADDING, tl.int64))


@triton.jit(do_not_specialize=["sequences", "length", "positions", "unmasked", "stations"])
def place_kernel(
    kept_ptr,
    counts_ptr,
    bounds_ptr,
    rules_ptr,
    dest_ptr,
    first_ptr,
    tally_ptr,
    header_ptr,
    station_ptr,
    sequences,
    length,
    positions,
    unmasked,
    stations,
    dest_stride,
    kept_stride,
    HAS_BOUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence and rule a program: places among the sequence's become places in the forward, dest += kept before.

    Program (0, 0) first counts what an open forward had staged as rolled back, and tallies this one: tally [R, 5].
    """
    b = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1)
    lanes = tl.arange(0, BLOCK)
    if b == 0 and r == 0:
        opened = tl.load(header_ptr + OPEN)
        for at in range(0, stations, BLOCK):
            s = at + lanes
            word = station_ptr + s * WIDTH
            fires = tl.load(word + FIRES, mask=s < stations, other=0)
            rule = tl.load(rules_ptr + s, mask=s < stations, other=0)
            lost = opened * fires * tl.load(tally_ptr + rule * TALLIES + TALLY_OFFERED, mask=s < stations, other=0)
            for i in tl.static_range(2):
                count = word + (OFFERED if i == 0 else ROLLED_BACK)
                tl.store(count, tl.load(count, mask=s < stations, other=0) + lost, mask=s < stations)
            tl.store(word + FIRES, tl.zeros((BLOCK,), tl.int64), mask=s < stations)
            tl.store(word + BAD, tl.zeros((BLOCK,), tl.int64), mask=s < stations)
        tl.debug_barrier()  # the old tally is read before the new one is written
        for rule in range(tl.num_programs(1)):
            real = tl.zeros((), tl.int64)
            new = tl.zeros((), tl.int64)
            kept = tl.zeros((), tl.int64)
            for at in range(0, sequences, BLOCK):
                i = at + lanes
                real += tl.sum(tl.load(counts_ptr + 2 * i, mask=i < sequences, other=0).to(tl.int64), 0)
                new += tl.sum(tl.load(counts_ptr + 2 * i + 1, mask=i < sequences, other=0).to(tl.int64), 0)
                own = tl.load(kept_ptr + rule * kept_stride + i, mask=i < sequences, other=0)
                kept += tl.sum(own.to(tl.int64), 0)
            tally = tally_ptr + rule * TALLIES
            tl.store(tally + TALLY_OFFERED, positions.to(tl.int64))
            tl.store(tally + TALLY_KEPT, kept)
            tl.store(tally + TALLY_MASKED, positions - real)
            tl.store(tally + TALLY_SKIPPED, new - kept)
            tl.store(tally + TALLY_RESEEN, real - new)
        tl.store(header_ptr + OPEN, tl.full((), 1, tl.int64))
        tl.store(header_ptr + UNMASKED, unmasked.to(tl.int64))
    before = 0
    for at in range(0, b.to(tl.int32), BLOCK):
        i = at + lanes
        before += tl.sum(tl.load(kept_ptr + r * kept_stride + i, mask=i < b, other=0), 0)
    tl.store(first_ptr + r * kept_stride + b, before)
    start = b * length
    tokens = length
    if HAS_BOUNDS:
        start = tl.load(bounds_ptr + b).to(tl.int64)
        tokens = tl.load(bounds_ptr + b + 1) - start.to(tl.int32)
    for at in range(0, tokens, BLOCK):
        t = at + lanes
        row = dest_ptr + r * dest_stride + start + t
        place = tl.load(row, mask=t < tokens, other=-1)
        tl.store(row, place + before, mask=(t < tokens) & (place >= 0))


def begin(plan: Any, mask: Tensor | None, shown: Tensor | None, past: Tensor | int, written: int) -> None:
    """Open a forward: undo one that was left open, lay out the positions of this one (see plans.Plan)."""
    b, rules, packed = plan.sequences, len(plan.skips), plan.bounds is not None
    if not plan.ranked:
        mask = shown = None
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask = mask if mask.stride(1) == 1 else mask.contiguous()
    ids = shown if shown is not None and not packed else None
    ids = ids if ids is None or ids.stride(1) == 1 else ids.contiguous()
    stops = plan.stops if ids is not None and written >= 0 else None
    pads = plan.pads if ids is not None and mask is None else None
    header, nothing = plan.header, plan.header  # an address for what is not read
    spans = plan.spans
    launch(
        rank_kernel,
        (b + packed, rules),
        nothing if mask is None else mask,
        nothing if ids is None else ids,
        plan.bounds if packed else nothing,
        past if isinstance(past, Tensor) else nothing,
        nothing if spans is None else spans,
        plan.skips,
        nothing if stops is None else stops,
        nothing if pads is None else pads,
        plan.seen,
        header,
        plan.rank,
        plan.sequence,
        plan.dest,
        plan.kept,
        plan.shown,
        plan.counts,
        b,
        1 if not plan.ranked else plan.length,
        plan.positions,
        0 if mask is None else mask.shape[1],
        0 if isinstance(past, Tensor) else past,
        written,
        0 if mask is None else mask.stride(0),
        0 if ids is None else ids.stride(0),
        plan.dest.stride(0),
        plan.kept.stride(0),
        0 if spans is None else spans.stride(0) // max(spans.stride(1), 1),
        SPANS=0 if spans is None else spans.shape[2],
        STOPS=0 if stops is None else len(stops),
        PADS=0 if pads is None else len(pads),
        HAS_MASK=mask is not None,
        HAS_BOUNDS=packed,
        HAS_PAST=isinstance(past, Tensor),
        PLAIN=not plan.ranked,
        BLOCK=SCAN_BLOCK,
    )
    launch(
        place_kernel,
        (b, rules),
        plan.kept,
        plan.counts,
        plan.bounds if packed else nothing,
        plan.rules,
        plan.dest,
        plan.first,
        plan.tally,
        header,
        plan.stations,
        b,
        1 if not plan.ranked else plan.length,
        plan.positions,
        int(mask is None and not packed),
        len(plan.stations),
        plan.dest.stride(0),
        plan.kept.stride(0),
        HAS_BOUNDS=packed,
        BLOCK=SCAN_BLOCK,
    )


def variants() -> Iterator[Variant]:
    """Padded with and without a mask, and packed."""
    words, ints = "*i64:16", "*i32:16"
    places = {"rank_ptr": ints, "sequence_ptr": ints, "dest_ptr": ints, "kept_ptr": ints}
    counts = dict.fromkeys(("sequences", "length", "positions", "mask_width", "past", "written"), "i32")
    strides = dict.fromkeys(("mask_stride", "shown_stride", "dest_stride", "kept_stride", "span_stride"), "i32")
    for has_mask, packed in ((True, False), (False, False), (False, True)):
        yield Variant(
            rank_kernel,
            {
                "mask_ptr": words,
                "shown_ptr": words,
                "bounds_ptr": ints,
                "past_ptr": words,
                "spans_ptr": ints,
                "skips_ptr": ints,
                "stops_ptr": words,
                "pads_ptr": words,
                "seen_ptr": ints,
                "header_ptr": words,
                **places,
                "after_ptr": ints,
                "counts_ptr": ints,
                **counts,
                **strides,
            },
            {
                "SPANS": 0,
                "STOPS": 0,
                "PADS": 0,
                "HAS_MASK": has_mask,
                "HAS_BOUNDS": packed,
                "HAS_PAST": False,
                "PLAIN": False,
                "BLOCK": SCAN_BLOCK,
            },
        )
    for packed in (False, True):
        yield Variant(
            place_kernel,
            {
                **dict.fromkeys(("kept_ptr", "counts_ptr", "bounds_ptr", "rules_ptr", "dest_ptr", "first_ptr"), ints),
                **dict.fromkeys(("tally_ptr", "header_ptr", "station_ptr"), words),
                **dict.fromkeys(("sequences", "length", "positions", "unmasked", "stations"), "i32"),
                **dict.fromkeys(("dest_stride", "kept_stride"), "i32"),
            },
            {"HAS_BOUNDS": packed, "BLOCK": SCAN_BLOCK},
        )
