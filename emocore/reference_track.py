"""A monitor's step on the device in plain PyTorch: oracle and fallback of kernels/track.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
