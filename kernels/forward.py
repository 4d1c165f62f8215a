"""The steps of a forward on a GPU: begin, stage_rows, place_labels, commit (docs/gpu.md)."""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import ROW_BLOCK, ROW_ELEMENTS, SCAN_BLOCK, STATION_BLOCK, WIDTHS

# The words of emocore/control.py; a test holds the two together.
WIDTH, TALLIES = tl.constexpr(16), tl.constexpr(5)
OPEN, FORWARDS, ERRORS, GOES_ON, UNMASKED = (tl.constexpr(i) for i in range(5))
FIRES, BAD, MISSED, COMMITTED, COMMITTED_UNMASKED, EXPECTED, SEEN = (tl.constexpr(i) for i in range(7))
OFFERED, SELECTED, MASKED, SKIPPED, RESEEN, NONFINITE, ROLLED_BACK = (tl.constexpr(i) for i in range(7, 14))
TALLY_OFFERED, TALLY_KEPT, TALLY_MASKED, TALLY_SKIPPED, TALLY_RESEEN = (tl.constexpr(i) for i in range(5))
FAULT_MISSED, FAULT_PADDING, FAULT_UNLABELLED = (tl.constexpr(1 << i) for i in range(3))
SOURCE_NONE, SOURCE_SEQUENCE = tl.constexpr(0), tl.constexpr(1)


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


@triton.jit(do_not_specialize=["n", "capacity", "ranked"])
def stage_rows_kernel(
    x_ptr,
    dest_ptr,
    rank_ptr,
    cursor_ptr,
    station_ptr,
    rows_ptr,
    marks_ptr,
    norms_ptr,
    n,
    capacity,
    ranked,
    x_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows[(committed + dest) % capacity] = x for the kept rows of x [n, D]; marks, norms beside; squares in float64.

    A row with NaN or Inf becomes zeros, marked 0 and counted in BAD. A tile is ROWS whole rows; where D is wider than
    BLOCK_D a row is read twice, the second time from the cache.
    """
    if tl.program_id(0) == 0:
        tl.atomic_add(station_ptr + FIRES, tl.full((), 1, tl.int64))
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dest = tl.load(dest_ptr + row, mask=row < n, other=-1)
    kept = dest >= 0
    to = (tl.load(cursor_ptr) + dest) % capacity
    cols = tl.arange(0, BLOCK_D)
    infinite = float("inf")
    bad = tl.zeros((ROWS,), tl.int32)
    square = tl.zeros((ROWS,), tl.float64)
    if D <= BLOCK_D:
        whole = kept[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + cols[None, :], mask=whole, other=0.0)
        wide = x.to(tl.float32)
        bad = tl.max((~(tl.abs(wide) < infinite)).to(tl.int32), 1)
        value = tl.where(bad[:, None] > 0, 0.0, x)
        square = tl.sum(value.to(tl.float64) * value.to(tl.float64), 1)
        tl.store(rows_ptr + to[:, None] * D + cols[None, :], value.to(x.dtype), mask=whole)
    else:
        for at in range(0, D, BLOCK_D):
            whole = kept[:, None] & (at + cols < D)[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + at + cols[None, :], mask=whole, other=0.0)
            wide = x.to(tl.float32)
            bad = tl.maximum(bad, tl.max((~(tl.abs(wide) < infinite)).to(tl.int32), 1))
            square += tl.sum(wide.to(tl.float64) * wide.to(tl.float64), 1)
        square = tl.where(bad > 0, 0.0, square)
        for at in range(0, D, BLOCK_D):
            whole = kept[:, None] & (at + cols < D)[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + at + cols[None, :], mask=whole, other=0.0)
            value = tl.where(bad[:, None] > 0, 0.0, x)
            tl.store(rows_ptr + to[:, None] * D + at + cols[None, :], value.to(x.dtype), mask=whole)
    counted = (tl.load(rank_ptr + row, mask=kept, other=0) > 0) | (ranked == 0)
    mark = tl.where(bad > 0, 0, tl.where(counted, 2, 1))
    tl.store(marks_ptr + to, mark.to(tl.int8), mask=kept)
    tl.store(norms_ptr + to, tl.sqrt(square).to(tl.float32), mask=kept)
    lost = tl.sum((kept & (bad > 0)).to(tl.int64), 0)
    if lost > 0:
        tl.atomic_add(station_ptr + BAD, lost)


def stage_rows(
    x: Tensor,
    dest: Tensor,
    rank: Tensor,
    ranked: bool,
    cursor: Tensor,
    station: Tensor,
    rows: Tensor,
    marks: Tensor,
    norms: Tensor,
) -> None:
    """Gather the kept rows of x [N, D] into the ring rows [capacity, D], with marks and norms [capacity]."""
    n, dim = x.shape
    x = x if x.stride(1) == 1 or dim == 1 else x.contiguous()
    block = min(triton.next_power_of_2(dim), ROW_BLOCK)
    tile = max(1, ROW_ELEMENTS // block)
    launch(
        stage_rows_kernel,
        (max(triton.cdiv(n, tile), 1),),  # one at least: the module fired
        x,
        dest,
        rank,
        cursor,
        station,
        rows,
        marks,
        norms,
        n,
        len(rows),
        int(ranked),
        x.stride(0),
        D=dim,
        ROWS=tile,
        BLOCK_D=block,
    )


@triton.jit(do_not_specialize=["n", "given_count", "capacity"])
def place_labels_kernel(
    given_ptr,
    source_ptr,
    dest_ptr,
    sequence_ptr,
    cursor_ptr,
    header_ptr,
    labels_ptr,
    n,
    given_count,
    capacity,
    BLOCK: tl.constexpr,
):
    """labels[(committed + dest) % capacity] = the label given for the sequence, or for the position, of a kept row."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dest = tl.load(dest_ptr + t, mask=t < n, other=-1)
    source = tl.load(source_ptr)
    place = t
    if source == SOURCE_SEQUENCE:
        place = tl.load(sequence_ptr + t, mask=t < n, other=0).to(tl.int64)
    label = tl.load(given_ptr + place, mask=(t < n) & (place < given_count), other=-1)
    label = tl.where(source == SOURCE_NONE, -1, label)
    tl.store(labels_ptr + (tl.load(cursor_ptr) + dest) % capacity, label, mask=dest >= 0)
    if tl.program_id(0) == 0 and source == SOURCE_NONE:
        tl.atomic_or(header_ptr + ERRORS, tl.full((), FAULT_UNLABELLED, tl.int64))


def place_labels(
    header: Tensor, given: Tensor, source: Tensor, dest: Tensor, sequence: Tensor, cursor: Tensor, labels: Tensor
) -> None:
    """Write the kept positions' labels to the ring labels [capacity]."""
    n = len(dest)
    launch(
        place_labels_kernel,
        (triton.cdiv(n, SCAN_BLOCK),),
        given,
        source,
        dest,
        sequence,
        cursor,
        header,
        labels,
        n,
        len(given),
        len(labels),
        BLOCK=SCAN_BLOCK,
    )


@triton.jit(do_not_specialize=["stations", "groups", "sequences"])
def commit_kernel(
    header_ptr,
    station_ptr,
    tally_ptr,
    rules_ptr,
    optional_ptr,
    leaders_ptr,
    cursor_ptr,
    seen_ptr,
    after_ptr,
    stations,
    groups,
    sequences,
    BLOCK: tl.constexpr,
):
    """One program: where every hook point fired as declared, cursors and ledgers advance; else FAULT_MISSED is set."""
    lanes = tl.arange(0, BLOCK)
    opened = tl.load(header_ptr + OPEN) > 0
    wrong = 0
    for at in range(0, stations, BLOCK):
        s = at + lanes
        fires = tl.load(station_ptr + s * WIDTH + FIRES, mask=s < stations, other=1)
        free = tl.load(optional_ptr + s, mask=s < stations, other=0) > 0
        missed = tl.where(free, fires > 1, fires != 1) & (s < stations)
        count = station_ptr + s * WIDTH + MISSED
        tl.store(count, tl.load(count, mask=s < stations, other=0) + missed.to(tl.int64), mask=s < stations)
        wrong += tl.sum(missed.to(tl.int32), 0)
    whole = (opened & (wrong == 0)).to(tl.int64)
    for at in range(0, groups, BLOCK):
        g = at + lanes
        leader = tl.load(leaders_ptr + g, mask=g < groups, other=0)
        fires = tl.load(station_ptr + leader * WIDTH + FIRES, mask=g < groups, other=0)
        rule = tl.load(rules_ptr + leader, mask=g < groups, other=0)
        kept = tl.load(tally_ptr + rule * TALLIES + TALLY_KEPT, mask=g < groups, other=0)
        row = cursor_ptr + 2 * g
        tl.store(row, tl.load(row, mask=g < groups, other=0) + whole * fires * kept, mask=g < groups)
    tl.debug_barrier()  # the leaders' fires are read before they are cleared
    unmasked = tl.load(header_ptr + UNMASKED)
    for at in range(0, stations, BLOCK):
        s = at + lanes
        here = s < stations
        word = station_ptr + s * WIDTH
        fires = tl.load(word + FIRES, mask=here, other=0)
        bad = tl.load(word + BAD, mask=here, other=0)
        free = (tl.load(optional_ptr + s, mask=here, other=0) > 0).to(tl.int64)
        tally = tally_ptr + tl.load(rules_ptr + s, mask=here, other=0) * TALLIES
        offered = tl.load(tally + TALLY_OFFERED, mask=here, other=0)
        kept = tl.load(tally + TALLY_KEPT, mask=here, other=0)
        used = fires * whole
        lost = fires * (1 - whole) * offered
        _add(word + OFFERED, used * offered + lost, here)
        _add(word + ROLLED_BACK, lost, here)
        _add(word + SELECTED, used * (kept - bad), here)
        _add(word + NONFINITE, used * bad, here)
        _add(word + MASKED, used * tl.load(tally + TALLY_MASKED, mask=here, other=0), here)
        _add(word + SKIPPED, used * tl.load(tally + TALLY_SKIPPED, mask=here, other=0), here)
        _add(word + RESEEN, used * tl.load(tally + TALLY_RESEEN, mask=here, other=0), here)
        _add(word + SEEN, used, here)
        _add(word + EXPECTED, free * used + (1 - free) * whole, here)
        _add(word + COMMITTED, whole + tl.zeros_like(used), here)
        _add(word + COMMITTED_UNMASKED, whole * unmasked + tl.zeros_like(used), here)
        tl.store(word + FIRES, tl.zeros_like(fires), mask=here)
        tl.store(word + BAD, tl.zeros_like(bad), mask=here)
    if (whole > 0) & (tl.load(header_ptr + GOES_ON) > 0):
        for at in range(0, sequences, BLOCK):
            b = at + lanes
            tl.store(seen_ptr + b, tl.load(after_ptr + b, mask=b < sequences, other=0), mask=b < sequences)
    if wrong > 0:
        tl.store(header_ptr + ERRORS, tl.load(header_ptr + ERRORS) | FAULT_MISSED)
    tl.store(header_ptr + FORWARDS, tl.load(header_ptr + FORWARDS) + whole)
    tl.store(header_ptr + OPEN, tl.zeros((), tl.int64))


@triton.jit
def _add(count_ptr, value, here):
    """*count += value."""
    tl.store(count_ptr, tl.load(count_ptr, mask=here, other=0) + value, mask=here)


def commit(plan: Any, leaders: Tensor, cursors: Tensor) -> None:
    """Close the forward; group g follows the firing and the rule of hook point leaders[g]."""
    launch(
        commit_kernel,
        (1,),
        plan.header,
        plan.stations,
        plan.tally,
        plan.rules,
        plan.optional,
        leaders,
        cursors,
        plan.seen,
        plan.shown,
        len(plan.stations),
        len(leaders),
        plan.sequences,
        BLOCK=STATION_BLOCK,
    )


def variants() -> Iterator[Variant]:
    """The forms that ship: padded with and without a mask, packed; rows of the usual widths."""
    words, ints, marks = "*i64:16", "*i32:16", "*i8:16"
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
    for dtype, dim in (*(("bf16", d) for d in WIDTHS), ("fp16", 4096), ("fp32", 384), ("fp32", 4096)):
        block = min(triton.next_power_of_2(dim), ROW_BLOCK)
        yield Variant(
            stage_rows_kernel,
            {
                "x_ptr": f"*{dtype}:16",
                **dict.fromkeys(("dest_ptr", "rank_ptr"), ints),
                **dict.fromkeys(("cursor_ptr", "station_ptr"), words),
                "rows_ptr": f"*{dtype}:16",
                "marks_ptr": marks,
                "norms_ptr": "*fp32:16",
                **dict.fromkeys(("n", "capacity", "ranked"), "i32"),
                "x_stride": "i32:16",
            },
            {"D": dim, "ROWS": max(1, ROW_ELEMENTS // block), "BLOCK_D": block},
        )
    yield Variant(
        place_labels_kernel,
        {
            **dict.fromkeys(("given_ptr", "dest_ptr", "sequence_ptr", "labels_ptr"), ints),
            **dict.fromkeys(("cursor_ptr", "header_ptr"), words),
            "source_ptr": "*i64",  # a word of the header
            **dict.fromkeys(("n", "given_count", "capacity"), "i32"),
        },
        {"BLOCK": SCAN_BLOCK},
    )
    yield Variant(
        commit_kernel,
        {
            **dict.fromkeys(("header_ptr", "station_ptr", "tally_ptr", "leaders_ptr", "cursor_ptr"), words),
            **dict.fromkeys(("rules_ptr", "optional_ptr", "seen_ptr", "after_ptr"), ints),
            **dict.fromkeys(("stations", "groups", "sequences"), "i32"),
        },
        {"BLOCK": STATION_BLOCK},
    )
