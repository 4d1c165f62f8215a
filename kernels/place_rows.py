"""Whose the rows of a forward on a GPU are, written beside them on their way to a store (docs/gpu.md)."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._control import (
    BATCH,
    ERRORS,
    FAULT_OVERRUN,
    FAULT_UNLABELLED,
    FORWARDS,
    LABELS,
    PLACE_BATCH,
    PLACE_FORWARD,
    PLACE_LABEL,
    PLACE_RANK,
    PLACE_SEQUENCE,
    PLACE_SEQUENCES,
    PLACE_TOKEN,
    PLACE_WIDTH,
    SOURCE_NONE,
    SOURCE_SEQUENCE,
)
from ._launch import Variant, launch
from ._tiles import SCAN_BLOCK


@triton.jit(do_not_specialize=["n", "given_count", "labelled", "sequences", "capacity"])
def place_rows_kernel(
    header_ptr,
    given_ptr,
    dest_ptr,
    rank_ptr,
    sequence_ptr,
    tokens_ptr,
    cursor_ptr,
    places_ptr,
    n,
    given_count,
    labelled,
    sequences,
    capacity,
    BLOCK: tl.constexpr,
):
    """places[(committed + dest) % capacity] = a kept row's words; FAULT_OVERRUN where it takes the place of one that
    was not fetched: cursor is (committed, fetched)."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dest = tl.load(dest_ptr + t, mask=t < n, other=-1)
    kept = dest >= 0
    row = tl.load(cursor_ptr) + dest
    over = tl.max((kept & (row - tl.load(cursor_ptr + 1) >= capacity)).to(tl.int32), 0)
    sequence = tl.load(sequence_ptr + t, mask=kept, other=0)
    source = tl.load(header_ptr + LABELS)
    at = tl.where(source == SOURCE_SEQUENCE, sequence.to(tl.int64), t)
    label = tl.load(given_ptr + at, mask=kept & (at < given_count), other=-1)
    label = tl.where((source == SOURCE_NONE) | (labelled == 0), -1, label)
    to = places_ptr + row % capacity * PLACE_WIDTH
    every = tl.zeros_like(sequence)
    tl.store(to + PLACE_BATCH, every + tl.load(header_ptr + BATCH).to(tl.int32), mask=kept)
    tl.store(to + PLACE_FORWARD, every + tl.load(header_ptr + FORWARDS).to(tl.int32), mask=kept)
    tl.store(to + PLACE_SEQUENCES, every + sequences, mask=kept)
    tl.store(to + PLACE_SEQUENCE, sequence, mask=kept)
    tl.store(to + PLACE_RANK, tl.load(rank_ptr + t, mask=kept, other=0), mask=kept)
    tl.store(to + PLACE_TOKEN, tl.load(tokens_ptr + t, mask=kept, other=0), mask=kept)
    tl.store(to + PLACE_LABEL, label, mask=kept)
    unlabelled = (labelled > 0) & (source == SOURCE_NONE) & (tl.program_id(0) == 0)
    fault = tl.where(over > 0, FAULT_OVERRUN, 0) | tl.where(unlabelled, FAULT_UNLABELLED, 0)
    if fault > 0:
        tl.atomic_or(header_ptr + ERRORS, fault.to(tl.int64))


def place_rows(
    header: Tensor,
    given: Tensor,
    labelled: bool,
    dest: Tensor,
    rank: Tensor,
    sequence: Tensor,
    tokens: Tensor,
    sequences: int,
    cursor: Tensor,
    places: Tensor,
) -> None:
    """Write the words (control.Place) of the kept positions to the ring places [capacity, 8]; `given` are labels."""
    n = len(dest)
    launch(
        place_rows_kernel,
        (triton.cdiv(n, SCAN_BLOCK),),
        header,
        given,
        dest,
        rank,
        sequence,
        tokens,
        cursor,
        places,
        n,
        len(given),
        int(labelled),
        sequences,
        len(places),
        BLOCK=SCAN_BLOCK,
    )


def variants() -> Iterator[Variant]:
    """The one form."""
    ints = ("given_ptr", "dest_ptr", "rank_ptr", "sequence_ptr", "tokens_ptr", "places_ptr")
    yield Variant(
        place_rows_kernel,
        {
            "header_ptr": "*i64:16",
            **dict.fromkeys(ints, "*i32:16"),
            "cursor_ptr": "*i64:16",
            **dict.fromkeys(("n", "given_count", "labelled", "sequences", "capacity"), "i32"),
        },
        {"BLOCK": SCAN_BLOCK},
    )
