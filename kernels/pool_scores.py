"""Scores pooled by sequence on a GPU: sums and maxima of pieces of a fixed length, then of the pieces in order."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import POOL_COLUMNS, POOL_ROWS, POOL_WARPS


@triton.jit(do_not_specialize=["sequences", "K", "scores_stride"])
def pool_pieces_kernel(
    scores_ptr, starts_ptr, sum_ptr, most_ptr, sequences, K, scores_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """sum, most[p, k] = sum and maximum of the ROWS scores [N, K] of piece p, float32.

    Piece c of sequence b begins ROWS c rows after starts[b], and is number starts[b] // ROWS + b + c: never one of two,
    and at most N / ROWS + sequences of them.
    """
    piece = tl.program_id(0)
    low = tl.zeros((), tl.int32)  # the last sequence whose first piece is not past this one
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts_ptr + middle) // ROWS + middle <= piece
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = tl.load(starts_ptr + low)
    first = start + (piece - start // ROWS - low) * ROWS
    end = tl.load(starts_ptr + low + 1)
    if first >= end:
        return
    rows = first + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < end)[:, None] & (cols < K)[None, :]
    at = scores_ptr + rows.to(tl.int64)[:, None] * scores_stride + cols[None, :]
    scores = tl.load(at, mask=mask, other=0.0)
    at = piece.to(tl.int64) * K + cols
    tl.store(sum_ptr + at, tl.sum(scores, 0), mask=cols < K)
    tl.store(most_ptr + at, tl.max(tl.where(mask, scores, float("-inf")), 0), mask=cols < K)


@triton.jit(do_not_specialize=["K"])
def pool_sequences_kernel(
    starts_ptr, sum_ptr, most_ptr, largest_ptr, mean_ptr, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """largest, mean[b, k] over the pieces of sequence b in order, summed in float64; NaN for none, or where one is."""
    b = tl.program_id(0)
    start = tl.load(starts_ptr + b)
    length = tl.load(starts_ptr + b + 1) - start
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = cols < K
    total = tl.zeros([COLUMNS], tl.float64)
    most = tl.full([COLUMNS], float("-inf"), tl.float32)
    first = (start // ROWS + b).to(tl.int64)
    for piece in range(0, tl.cdiv(length, ROWS)):
        at = (first + piece) * K + cols
        total += tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float64)
        most = tl.maximum(most, tl.load(most_ptr + at, mask=inside, other=0.0))
    mean = tl.where(length > 0, total / tl.maximum(length, 1).to(tl.float64), float("nan")).to(tl.float32)
    at = b.to(tl.int64) * K + cols
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(largest_ptr + at, tl.where(mean == mean, most, mean), mask=inside)


def pool_scores(scores: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and mean [B, K] of scores [N, K] over the rows of each sequence, starts [B + 1] int32."""
    (n, k), sequences = scores.shape, len(starts) - 1
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    pieces = n // POOL_ROWS + sequences if sequences else 0
    sums, most = scores.new_empty(2, pieces, k, dtype=torch.float32)
    largest, mean = (scores.new_empty(sequences, k, dtype=torch.float32) for _ in range(2))
    columns = triton.cdiv(k, POOL_COLUMNS)
    tiles = {"ROWS": POOL_ROWS, "COLUMNS": POOL_COLUMNS, "warps": POOL_WARPS}
    launch(
        pool_pieces_kernel,
        (pieces, columns),
        scores,
        starts,
        sums,
        most,
        sequences,
        k,
        scores.stride(0),
        **tiles,
    )
    launch(pool_sequences_kernel, (sequences, columns), starts, sums, most, largest, mean, k, **tiles)
    return largest, mean


def variants() -> Iterator[Variant]:
    """float32 scores."""
    pieces = {"sum_ptr": "*fp32", "most_ptr": "*fp32"}
    tile = {"ROWS": POOL_ROWS, "COLUMNS": POOL_COLUMNS}
    types = {"scores_ptr": "*fp32", "starts_ptr": "*i32", **pieces, "sequences": "i32", "K": "i32"}
    yield Variant(pool_pieces_kernel, types | {"scores_stride": "i64"}, tile, POOL_WARPS)
    types = {"starts_ptr": "*i32", **pieces, "largest_ptr": "*fp32", "mean_ptr": "*fp32", "K": "i32"}
    yield Variant(pool_sequences_kernel, types, tile, POOL_WARPS)
