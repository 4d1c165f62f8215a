"""The rows of a forward on a GPU: gathered into the ring as a hook point fires, and their labels when it ends."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._control import BAD, ERRORS, FAULT_UNLABELLED, FIRES, SOURCE_NONE, SOURCE_SEQUENCE
from ._launch import Variant, launch
from ._tiles import ROW_BLOCK, ROW_ELEMENTS, SCAN_BLOCK, WIDTHS


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


def variants() -> Iterator[Variant]:
    """Rows of the usual widths, and labels."""
    words, ints = "*i64:16", "*i32:16"
    for dtype, dim in (*(("bf16", d) for d in WIDTHS), ("fp16", 4096), ("fp32", 384), ("fp32", 4096)):
        block = min(triton.next_power_of_2(dim), ROW_BLOCK)
        yield Variant(
            stage_rows_kernel,
            {
                "x_ptr": f"*{dtype}:16",
                **dict.fromkeys(("dest_ptr", "rank_ptr"), ints),
                **dict.fromkeys(("cursor_ptr", "station_ptr"), words),
                "rows_ptr": f"*{dtype}:16",
                "marks_ptr": "*i8:16",
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
