"""The drain of a capture that stays on the device, in plain PyTorch: oracle and fallback of kernels/ (docs/gpu.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .linalg import pack_tiles

RUNS = 32  # of consecutive rows of a block, whose medians set the shift on a device
SHIFT_BITS = {torch.bfloat16: 11, torch.float16: 11, torch.float32: 24}  # most bits of a shift, by row dtype


def block_of(cursor: Tensor, block: int, capacity: int) -> slice | None:
    """The ring's rows that a step of the drain works on, None where no block is full."""
    committed, drained = cursor.tolist()
    start = drained % capacity
    return slice(start, start + block) if committed - drained >= block else None


def freeze_ref(
    rows: Tensor, marks: Tensor, cursor: Tensor, block: int, frozen: Tensor, shift: Tensor, exponent: Tensor
) -> None:
    """Shift s and exponent k [D] of each hook point that is not frozen, from the marked rows of a full block.

    m is the median over runs of consecutive rows of the run's mean, v that of its mean square about m, or the mean of
    those where half of the runs never leave m: k = floor(log2 v^(1/2)), s = 0 where m^2 <= v / 4, else m rounded to a
    multiple of 2^k, and to as many bits as x - s may have. A constant column gives its value and 0.
    """
    at = block_of(cursor, block, rows.shape[1])
    if at is None:
        return
    for s in (frozen == 0).nonzero().flatten().tolist():
        kept = (marks[s, at] > 0).view(RUNS, -1, 1)
        x = rows[s, at].double().view(RUNS, -1, rows.shape[2]).where(kept, 0.0)  # [RUNS, block / RUNS, D]
        n = kept.sum(1)
        mean = x.sum(1) / n  # NaN where no row counts
        square = (x - mean[:, None]).where(kept, 0.0).square().sum(1) / n
        mean = mean.where(square.isfinite(), torch.nan)  # a row with NaN or Inf takes its run out
        m = mean.nanmedian(0).values.nan_to_num(0.0)
        v = (square + (mean - m).square()).nan_to_num(torch.nan, torch.nan)
        typical = v.nanmedian(0).values
        v = torch.where(typical > 0, typical, v.nanmean(0)).nan_to_num(0.0)
        k = torch.where(v > 0, ((v.frexp().exponent - 1) >> 1).clamp(-126, 126), 0)
        grid = torch.exp2(torch.maximum(k, m.frexp().exponent - SHIFT_BITS[rows.dtype]).double())
        near = torch.where(4 * m * m <= v, 0.0, (m / grid + 0.5).floor() * grid)
        shift[s] = torch.where(v > 0, near, m)
        exponent[s] = k


def convert_ref(
    rows: Tensor,
    marks: Tensor,
    cursor: Tensor,
    block: int,
    shift: Tensor,
    exponent: Tensor,
    y: Tensor,
    overrange: Tensor,
) -> None:
    """y = (x - s) 2^-k of a full block, in one fp16 [S, 1, block, D], or two for float32 rows, the second times 2^11.

    Rows that are marked 0 give zeros; so does one with some |y| > 65504 or NaN, which is then marked 0 and counted.
    """
    at = block_of(cursor, block, rows.shape[1])
    if at is None:
        return
    for s in range(len(rows)):
        exact = torch.ldexp(rows[s, at].double() - shift[s], -exponent[s])
        kept = marks[s, at] > 0
        lost = kept & ~(exact.float().abs() <= torch.finfo(torch.float16).max).all(1)
        z = exact.where((kept & ~lost)[:, None], 0.0).float()
        y[s, 0] = z.half()
        if y.shape[1] == 2:
            y[s, 1] = ((z - y[s, 0].float()) * 2048.0).half()
        marks[s, at] = marks[s, at].masked_fill(lost, 0)
        overrange[s] += lost.sum()


def fold_gram_ref(y: Tensor, cursor: Tensor, block: int, exponent: Tensor, tiles: Tensor, chain: int) -> None:
    """Lower tiles of each hook point += 2^(k_i + k_j) sum y_i y_j over a full block y [S, P, block, D].

    Two parts are y = y_0 + y_1 2^-11, without the product of the two y_1.
    """
    if block_of(cursor, block, block) is None:
        return
    for part, k, mine in zip(y.double(), exponent, tiles, strict=True):
        gram = part[0].T @ part[0]
        if len(part) == 2:
            cross = part[0].T @ part[1]
            gram += (cross + cross.T) * 2.0**-11
        mine += pack_tiles(torch.ldexp(gram, k[:, None] + k))


def sort_labels_ref(labels: Tensor, cursor: Tensor, block: int, order: Tensor, starts: Tensor) -> None:
    """order [block]: a full block's rows by label, stable, those of no label 0 .. K - 1 last; starts [K + 2]: how many
    come before each label, before those of none, and in all.
    """
    at = block_of(cursor, block, len(labels))
    if at is None:
        return
    k = len(starts) - 2
    given = labels[at].long()
    given = given.where((given >= 0) & (given < k), k)
    order.copy_(given.argsort(stable=True))
    starts.copy_(torch.cat([given.new_zeros(1), given.bincount(minlength=k + 1).cumsum(0)]))


def fold_labels_ref(
    rows: Tensor,
    marks: Tensor,
    cursor: Tensor,
    block: int,
    order: Tensor,
    starts: Tensor,
    shift: Tensor,
    totals: Tensor,
    squares: Tensor,
    counts: Tensor,
) -> None:
    """totals, squares [S, K + 1, D] += x - s, (x - s)^2, counts [S, K + 1] += 1 for the rows of a full block that are
    marked > 0, by the label that `order` and `starts` give them.
    """
    at = block_of(cursor, block, rows.shape[1])
    if at is None:
        return
    label = torch.arange(len(starts) - 1, device=rows.device).repeat_interleave(starts.diff(), output_size=block)
    for s in range(len(rows)):
        kept = marks[s, at][order] > 0
        y = rows[s, at][order][kept].double() - shift[s]
        totals[s].index_add_(0, label[kept], y)
        squares[s].index_add_(0, label[kept], y * y)
        counts[s] += label[kept].bincount(minlength=len(starts) - 1)


def settle_ref(
    norms: Tensor, marks: Tensor, cursor: Tensor, block: int, frozen: Tensor, norm_sum: Tensor, norm_count: Tensor
) -> None:
    """norm_sum, norm_count [S] of a full block's rows that are marked 2; then all are frozen, the block is drained."""
    at = block_of(cursor, block, norms.shape[1])
    if at is None:
        return
    counted = marks[:, at] == 2
    norm_sum += norms[:, at].double().where(counted, 0.0).sum(1)
    norm_count += counted.sum(1)
    frozen.fill_(1)
    cursor[1] += block
