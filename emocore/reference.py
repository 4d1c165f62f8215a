"""Every op in plain PyTorch float64: the oracle of the tests, the fallback, and the benchmarks' baseline, in one.

Shapes: rows [N, D], labels [N] int32, weights [N] float64, shift [D] float64, readers [K, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import pack_tiles
from .precision import DEVICE_CHAIN


def stage_ref(x: Tensor, index: Tensor | None, rows: Tensor, norms: Tensor, finite: Tensor) -> None:
    """rows = x[index] (to rows' dtype), norms = |x|; a row with NaN or Inf becomes zeros with norm 0 and finite
    False.
    """
    taken = x if index is None else x[index]
    finite.copy_(torch.isfinite(taken).all(dim=1))
    rows.copy_(taken.masked_fill(~finite.unsqueeze(1), 0.0))
    norms.copy_(rows.double().norm(dim=1))


def label_sums_ref(
    rows: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    shift: Tensor,
    sums: Tensor,
    squares: Tensor | None,
) -> None:
    """sums[k] += w (x - s), squares[k] += w (x - s)^2 for the rows of label k; label -1 is left out, no labels means
    k = 0.
    """
    y = rows.double() - shift
    w = torch.ones(len(rows), dtype=torch.float64, device=rows.device) if weights is None else weights
    k = torch.zeros(len(rows), dtype=torch.long, device=rows.device) if labels is None else labels.long()
    keep = k >= 0
    y, w, k = y[keep], w[keep].unsqueeze(1), k[keep]
    sums.index_add_(0, k, w * y)
    if squares is not None:
        squares.index_add_(0, k, w * y * y)


def gram_ref(rows: Tensor, weights: Tensor | None, shift: Tensor, tiles: Tensor) -> None:
    """Lower tiles += sum over rows of w (x - s)(x - s)'."""
    y = rows.double() - shift
    if weights is not None:
        y = y * weights.sqrt().unsqueeze(1)
    tiles += pack_tiles(y.T @ y)


def project_ref(rows: Tensor, readers: Tensor, centre: Tensor | None, normalise: bool) -> Tensor:
    """(x - c) . v_k [N, K], divided by |x - c| when `normalise`; a zero row scores 0."""
    y = rows.double()
    if centre is not None:
        y = y - centre
    scores = y @ readers.double().T
    if normalise:
        norms = y.norm(dim=1, keepdim=True)
        scores = torch.where(norms > 0, scores / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return scores.to(score_dtype(rows, readers))


def score_dtype(rows: Tensor, readers: Tensor) -> torch.dtype:
    """float64 where rows or readers are, else float32."""
    return torch.float64 if torch.float64 in (rows.dtype, readers.dtype) else torch.float32


def steer_add_ref(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta [D], rounded once to x's dtype."""
    return (x.double() + delta.double()).to(x.dtype)


def steer_set_ref(x: Tensor, basis: Tensor, dual: Tensor, target: Tensor) -> Tensor:
    """x + (target - x B') B* : moves the scores x B' of basis [R, D] to target [R] along the dual [R, D]."""
    y = x.double()
    return (y + (target.double() - y @ basis.double().T) @ dual.double()).to(x.dtype)


class Tracked(NamedTuple):
    """A monitor's state in fixed memory: M hook points, L slots, of which slot 0 is nothing, K directions; P programs
    advance the directions of a sequence, each with its own copy of what all of them would read and write.
    """

    forward: Tensor  # [1] int64: the forward's number, for the records
    whole: Tensor  # [1] int64: 0 where the forward does not count
    alpha: Tensor  # [1] float64
    serials: Tensor  # [M, L, P] int64: the sequence that a slot holds
    tokens: Tensor  # [M, L, P] int64
    ema: Tensor  # [M, L, K] float64
    rest: Tensor  # [M, L, K] float64: the sum of the last window - 1 scores
    recent: Tensor  # [M, L, window - 1, K] float32: those scores, that of token p in row p % (window - 1)
    largest: Tensor  # [3, M, L, K] float32, like the next two in the order of calibration.STATISTICS
    sums: Tensor | None  # [3, M, L, K] float64
    squares: Tensor | None  # [3, M, L, K] float64, None with the sums
    statistic: Tensor | None  # [M, K] int32: what a direction's rule reads; None, like the next three, without rules
    level: Tensor | None  # [M, K] float64, inf where there is no rule
    release: Tensor | None  # [M, K] float64
    active: Tensor | None  # [M, L, K] int8
    raised: Tensor  # [1] int64: alarms that ever rose
    taken: Tensor  # [1] int64: how many of them have been read
    records: Tensor  # [capacity, 5] int64: forward, hook point, serial, position in the sequence, direction
    values: Tensor  # [capacity] float64
    window: int


def track_ref(
    scores: Tensor, first: Tensor, kept: Tensor, marks: Tensor, slots: Tensor, serial: Tensor, state: Tracked
) -> None:
    """Advance B sequences over scores [M, n, K]: rows first[b] to first[b] + kept[b] - 1 that are not marked [M, n] 0
    belong to sequence serial[b] in slots[b], which begins anew where the slot holds another. Slots that there are not,
    slot 0 and a forward that is not whole change nothing.
    """
    for b, slot in enumerate(slots.tolist()):
        if 0 < slot < state.tokens.shape[1] and bool(state.whole):
            rows = slice(int(first[b]), int(first[b] + kept[b]))
            for m in range(len(scores)):
                z = scores[m, rows][marks[m, rows] != 0]
                _track_one(z.double(), m, slot, int(serial[b]), state)


def _track_one(z: Tensor, m: int, slot: int, serial: int, state: Tracked) -> None:
    """Advance one sequence over scores z [T, K]."""
    here, ring = (m, slot), state.window - 1
    known = int(state.serials[m, slot, 0]) == serial
    tokens = int(state.tokens[m, slot, 0]) if known else 0
    ema = state.ema[here] if known else torch.zeros_like(state.ema[here])
    before = [state.recent[m, slot, p % ring].double() for p in range(max(tokens - ring, 0), tokens)]
    run, emas, means = torch.stack([*before, *z]) if len(before) + len(z) else z, [], []
    for t, x in enumerate(z):
        ema = (1 - state.alpha) * ema + state.alpha * x
        emas.append(ema)
        end = len(before) + t + 1
        means.append(run[max(end - state.window, 0) : end].mean(0))
    values = torch.stack([z, torch.stack(emas), torch.stack(means)]).float() if len(z) else z.new_zeros(3, *z.shape)
    _alarm(values.double(), m, slot, serial, tokens, known, state)
    total = tokens + len(z)
    last = run[len(run) - min(ring, total) :]
    for p, x in zip(range(total - len(last), total), last, strict=True):
        state.recent[m, slot, p % ring] = x
    state.serials[here], state.tokens[here] = serial, total
    state.ema[here], state.rest[here] = ema, last.sum(0)
    old = state.largest[:, m, slot] if known else torch.full_like(state.largest[:, m, slot], -torch.inf)
    state.largest[:, m, slot] = torch.cat([old[:, None], values], 1).amax(1)
    for table, new in ((state.sums, values.double()), (state.squares, values.double().square())):
        if table is not None:
            table[:, m, slot] = new.sum(1) + (table[:, m, slot] if known else 0)


def _alarm(values: Tensor, m: int, slot: int, serial: int, before: int, known: bool, state: Tracked) -> None:
    """Raise and release alarms over every statistic [3, T, K] of one sequence."""
    if state.statistic is None or state.level is None or state.release is None or state.active is None:
        return
    active = (state.active[m, slot] != 0) & known
    for t, every in enumerate(values.unbind(1)):
        value = every.gather(0, state.statistic[m].long()[None])[0]
        above = value > state.level[m]
        for k in (above & ~active).nonzero().flatten().tolist():
            place = int(state.raised - state.taken)
            state.raised.add_(1)
            if place < len(state.values):
                record = (int(state.forward), m, serial, before + t, k)
                state.records[place] = torch.tensor(record, device=values.device)
                state.values[place] = value[k]
        active = above | (active & ~(value < state.release[m]))
    state.active[m, slot] = active.to(torch.int8)


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


def fold_gram_ref(
    y: Tensor, cursor: Tensor, block: int, exponent: Tensor, tiles: Tensor, chain: int = DEVICE_CHAIN
) -> None:
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
