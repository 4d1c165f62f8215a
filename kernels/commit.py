"""The end of a forward on a GPU: all of it counts, or none (docs/gpu.md)."""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._control import (
    BAD,
    COMMITTED,
    COMMITTED_UNMASKED,
    ERRORS,
    EXPECTED,
    FAULT_MISSED,
    FIRES,
    FORWARDS,
    GOES_ON,
    MASKED,
    MISSED,
    NONFINITE,
    OFFERED,
    OPEN,
    RESEEN,
    ROLLED_BACK,
    SEEN,
    SELECTED,
    SKIPPED,
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
from ._tiles import STATION_BLOCK


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
    """The one form."""
    words, ints = "*i64:16", "*i32:16"
    yield Variant(
        commit_kernel,
        {
            **dict.fromkeys(("header_ptr", "station_ptr", "tally_ptr", "leaders_ptr", "cursor_ptr"), words),
            **dict.fromkeys(("rules_ptr", "optional_ptr", "seen_ptr", "after_ptr"), ints),
            **dict.fromkeys(("stations", "groups", "sequences"), "i32"),
        },
        {"BLOCK": STATION_BLOCK},
    )
