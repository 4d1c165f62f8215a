"""The statistics of a monitor's sequences on a GPU, advanced over the scores of a forward."""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import TRACK_COLUMNS


@triton.jit
def _row(scores_ptr, marks_ptr, row, end, score_row, cols, k):
    """Scores [BLOCK_K] and mark of a row; zeros and 0 from `end` on."""
    z = tl.load(scores_ptr + row.to(tl.int64) * score_row + cols, mask=cols < tl.where(row < end, k, 0), other=0.0)
    return z, tl.load(marks_ptr + row, mask=row < end, other=0)


@triton.jit
def _three(table_ptr, plane, at, mask, other):
    """What a table [3, plane] holds of every statistic."""
    a = tl.load(table_ptr + at, mask=mask, other=other)
    b = tl.load(table_ptr + plane + at, mask=mask, other=other)
    return a, b, tl.load(table_ptr + 2 * plane + at, mask=mask, other=other)


@triton.jit
def _keep_three(table_ptr, plane, at, a, b, c, mask):
    tl.store(table_ptr + at, a, mask=mask)
    tl.store(table_ptr + plane + at, b, mask=mask)
    tl.store(table_ptr + 2 * plane + at, c, mask=mask)


@triton.jit
def _record(records_ptr, values_ptr, place, mask, forward, point, serial, position, direction, value):
    """Write records [capacity, 5] and values [capacity]."""
    at = records_ptr + place * 5
    tl.store(at, forward, mask=mask)
    tl.store(at + 1, point, mask=mask)
    tl.store(at + 2, serial, mask=mask)
    tl.store(at + 3, position, mask=mask)
    tl.store(at + 4, direction, mask=mask)
    tl.store(values_ptr + place, value, mask=mask)


COUNTS = ["score_point", "score_row", "mark_point", "slots", "k", "window", "capacity"]


@triton.jit(do_not_specialize=COUNTS)
def track_kernel(
    scores_ptr,
    first_ptr,
    kept_ptr,
    marks_ptr,
    slot_ptr,
    serial_ptr,
    forward_ptr,
    whole_ptr,
    alpha_ptr,
    serials_ptr,
    tokens_ptr,
    ema_ptr,
    rest_ptr,
    recent_ptr,
    largest_ptr,
    sums_ptr,
    squares_ptr,
    statistic_ptr,
    level_ptr,
    release_ptr,
    active_ptr,
    raised_ptr,
    taken_ptr,
    records_ptr,
    values_ptr,
    score_point,
    score_row,
    mark_point,
    slots,
    k,
    window,
    capacity,
    BLOCK_K: tl.constexpr,
):
    """For every marked row of sequence b in order, at hook point s: scores: [S, n, K], marks: [S, n], the rest as in
    `reference_track.Tracked`;

    ema = (1 - a) ema + a z; mean = (rest + z) / min(tokens, window), rest the sum of the last window - 1 scores; the
    largest and the sums of z, ema and mean; an alarm rises where its statistic > level and it is not active, as it then
    is until the statistic < release.

    ema, rest and sums in float64: in float32 an ema is off by up to 2^-24 |y| / a (6e-5 at a = .001), and rest would
    drift, as what leaves it was rounded when it came. A statistic is rounded to float32 before it is compared: a level
    taken from `largest` is then not passed by the sequence that it comes from.

    A program walks its sequence token by token, a lane a direction: the same bits however forwards cut a sequence, and
    for a step of one token no more than its loads and stores. A rule is the business of its direction's lane, which has
    every statistic at hand. A long walk is bound by latency: scores are loaded four rows ahead, and what leaves the
    window is read by a second reader of the same rows, window - 1 tokens behind. So the table `recent` is read only
    before that reader starts, and written once, at the end.
    """
    b, block, s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    if (slot <= 0) | (slot >= slots) | (tl.load(whole_ptr) == 0):
        return
    serial, first, kept = tl.load(serial_ptr + b), tl.load(first_ptr + b), tl.load(kept_ptr + b)
    cell = s * slots + slot
    copy = cell * tl.num_programs(1) + block
    known = tl.load(serials_ptr + copy) == serial
    position = tl.load(tokens_ptr + copy, mask=known, other=0)
    cols = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = cols < k
    at, plane = cell * k + cols, tl.num_programs(2).to(tl.int64) * slots * k
    old = cols < tl.where(known, k, 0)
    ema = tl.load(ema_ptr + at, mask=old, other=0.0)
    rest = tl.load(rest_ptr + at, mask=old, other=0.0)
    top_z, top_ema, top_mean = _three(largest_ptr, plane, at, old, -float("inf"))
    if sums_ptr is not None:
        sum_z, sum_ema, sum_mean = _three(sums_ptr, plane, at, old, 0.0)
        square_z, square_ema, square_mean = _three(squares_ptr, plane, at, old, 0.0)
    if active_ptr is not None:
        rule = s * k + cols
        statistic = tl.load(statistic_ptr + rule, mask=inside, other=0)
        level = tl.load(level_ptr + rule, mask=inside, other=float("inf"))
        release = tl.load(release_ptr + rule, mask=inside, other=float("inf"))
        active = tl.load(active_ptr + at, mask=old, other=0) != 0
        forward, taken = tl.load(forward_ptr), tl.load(taken_ptr)
    alpha = tl.load(alpha_ptr)
    fade = 1.0 - alpha

    ring = window - 1
    turn = tl.maximum(ring, 1)
    start = (position % turn).to(tl.int32)
    recent_ptr += cell * ring * k
    scores_ptr += s * score_point
    marks_ptr += s * mark_point
    end = first + kept
    z0, m0 = _row(scores_ptr, marks_ptr, first, end, score_row, cols, k)
    z1, m1 = _row(scores_ptr, marks_ptr, first + 1, end, score_row, cols, k)
    z2, m2 = _row(scores_ptr, marks_ptr, first + 2, end, score_row, cols, k)
    z3, m3 = _row(scores_ptr, marks_ptr, first + 3, end, score_row, cols, k)
    late, late_z, late_m = first, z0, m0  # the second reader: the oldest row of this forward in the window
    t = 0  # tokens of this forward
    for i in range(kept):
        row = first + i
        z, m = z0, m0
        z0, m0, z1, m1, z2, m2 = z1, m1, z2, m2, z3, m3
        z3, m3 = _row(scores_ptr, marks_ptr, row + 4, end, score_row, cols, k)
        if m != 0:
            if t < ring:
                place = start + t
                place = tl.where(place < ring, place, place - ring).to(tl.int64)
                leaves = tl.load(recent_ptr + place * k + cols, mask=cols < tl.where(position >= ring, k, 0), other=0.0)
            else:
                while (late_m == 0) & (late < row):
                    late += 1
                    late_z, late_m = _row(scores_ptr, marks_ptr, late, end, score_row, cols, k)
                leaves = late_z
                late += 1
                late_z, late_m = _row(scores_ptr, marks_ptr, late, end, score_row, cols, k)
            x = z.to(tl.float64)
            ema = fade * ema + alpha * x
            smooth = ema.to(tl.float32)
            mean = tl.div_rn((rest + x).to(tl.float32), tl.minimum(position + 1, window).to(tl.float32))
            rest += x - leaves.to(tl.float64)
            top_z, top_ema, top_mean = tl.maximum(top_z, z), tl.maximum(top_ema, smooth), tl.maximum(top_mean, mean)
            if sums_ptr is not None:
                y, w = smooth.to(tl.float64), mean.to(tl.float64)
                sum_z, sum_ema, sum_mean = sum_z + x, sum_ema + y, sum_mean + w
                square_z, square_ema, square_mean = square_z + x * x, square_ema + y * y, square_mean + w * w
            if active_ptr is not None:
                value = tl.where(statistic == 0, z, tl.where(statistic == 1, smooth, mean)).to(tl.float64)
                above = value > level
                rises = above & ~active
                # integers: their sum does not depend on the order, which the reader mends
                one = tl.full([BLOCK_K], 1, tl.int64)
                there = tl.atomic_add(raised_ptr + cols * 0, one, mask=rises, sem="relaxed") - taken
                room = rises & (there < capacity)
                _record(records_ptr, values_ptr, there, room, forward, s, serial, position, cols, value)
                active = above | (active & ~(value < release))
            position += 1
            t += 1

    tl.debug_barrier()  # no lane writes what another has yet to read
    place = (start + tl.maximum(t - ring, 0)) % turn
    for i in range(end - late):
        z, m = _row(scores_ptr, marks_ptr, late + i, end, score_row, cols, k)
        if m != 0:
            tl.store(recent_ptr + place.to(tl.int64) * k + cols, z, mask=inside)
            place = (place + 1) % turn
    tl.store(serials_ptr + copy, serial)
    tl.store(tokens_ptr + copy, position)
    tl.store(ema_ptr + at, ema, mask=inside)
    tl.store(rest_ptr + at, rest, mask=inside)
    _keep_three(largest_ptr, plane, at, top_z, top_ema, top_mean, inside)
    if sums_ptr is not None:
        _keep_three(sums_ptr, plane, at, sum_z, sum_ema, sum_mean, inside)
        _keep_three(squares_ptr, plane, at, square_z, square_ema, square_mean, inside)
    if active_ptr is not None:
        tl.store(active_ptr + at, active.to(tl.int8), mask=inside)


def track(
    scores: Tensor, first: Tensor, kept: Tensor, marks: Tensor, slots: Tensor, serial: Tensor, state: Any
) -> None:
    """Advance a `reference_track.Tracked` as `track_ref` does; scores [S, n, K] and marks [S, n] have unit stride in
    their last axis."""
    points, _, k = scores.shape
    blocks = state.tokens.shape[2]
    block = max(32, triton.next_power_of_2(triton.cdiv(k, blocks)))
    launch(
        track_kernel,
        (len(slots), blocks, points),
        scores,
        first,
        kept,
        marks,
        slots,
        serial,
        *state[:-1],
        scores.stride(0),
        scores.stride(1),
        marks.stride(0),
        state.tokens.shape[1],
        k,
        state.window,
        len(state.values),
        warps=min(block // 32, 32),
        BLOCK_K=block,
    )


TYPES = {
    "scores_ptr": "*fp32:16",
    "first_ptr": "*i32",
    "kept_ptr": "*i32",
    "marks_ptr": "*i8",
    "slot_ptr": "*i32",
    "serial_ptr": "*i64",
    "forward_ptr": "*i64",
    "whole_ptr": "*i64",
    "alpha_ptr": "*fp64",
    "serials_ptr": "*i64:16",
    "tokens_ptr": "*i64:16",
    "ema_ptr": "*fp64:16",
    "rest_ptr": "*fp64:16",
    "recent_ptr": "*fp32:16",
    "largest_ptr": "*fp32:16",
    "raised_ptr": "*i64:16",
    "taken_ptr": "*i64:16",
    "records_ptr": "*i64:16",
    "values_ptr": "*fp64:16",
    **dict.fromkeys(COUNTS, "i32"),
    "score_point": "i64",
    "mark_point": "i64",
}
SUMS = {"sums_ptr": "*fp64:16", "squares_ptr": "*fp64:16"}
RULES = {"statistic_ptr": "*i32:16", "level_ptr": "*fp64:16", "release_ptr": "*fp64:16", "active_ptr": "*i8:16"}


def variants() -> Iterator[Variant]:
    """Few directions and many; with and without sums, with and without rules."""
    for block in (32, TRACK_COLUMNS):
        for sums in (SUMS, {}):
            for rules in (RULES, {}):
                absent = {name: None for name in {**SUMS, **RULES} if name not in {**sums, **rules}}
                types = {**TYPES, **sums, **rules}
                yield Variant(track_kernel, types, {**absent, "BLOCK_K": block}, warps=block // 32)
