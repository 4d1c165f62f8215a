"""Watching: a monitor's state in fixed device memory, advanced by one step a forward and read only when asked."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import ops
from .alarms import Alarm
from .calibration import STATISTICS
from .errors import ArgumentError, CalibrationError, LedgerError, ShapeError
from .kernels._tiles import TRACK_COLUMNS
from .reference_track import Tracked

Rule: TypeAlias = tuple[str, int, int, float, float]  # name, statistic and direction by place, level, release
PENDING = 4096  # forgotten sequences whose names wait for the alarms to be read


class Totals(NamedTuple):
    """What the statistics did over the tokens of the n sequences held: their sum and sum of squares [3, K], and the
    largest of each sequence [3, n, K], all float64 in the order of STATISTICS.
    """

    tokens: int
    sums: Tensor
    squares: Tensor
    largest: Tensor


class Watch:
    """The state of `slots` - 1 sequences at every hook point, over K directions; slot 0 is nothing.

    `rules` by hook point, at most one a direction. A slot takes (25 + 4 window) K bytes a hook point, 48 K more where
    `sums` are kept for a reference. `forward` [1] and `whole` [1] int64 are the number of a forward and whether it
    counts, where a capture keeps them on the device; else every step counts, and is numbered here.
    Raises ArgumentError.
    """

    def __init__(
        self,
        k: int,
        hook_points: Sequence[str],
        rules: Mapping[str, Sequence[Rule]],
        alpha: float,
        window: int,
        slots: int,
        device: torch.device,
        record_capacity: int = 4096,
        sums: bool = True,
        forward: Tensor | None = None,
        whole: Tensor | None = None,
    ) -> None:
        if slots < 2 or record_capacity < 1:
            raise ArgumentError(
                "slots, record_capacity", expected="slots >= 2, record_capacity >= 1", got=(slots, record_capacity)
            )
        self.k, self.hook_points, self.device, self.evicted = k, tuple(hook_points), device, 0
        self.rules = [{rule[2]: rule for rule in rules.get(point, ())} for point in self.hook_points]
        self._check_rules(rules)
        self._held: OrderedDict[str, tuple[int, int]] = OrderedDict()  # slot and serial, the longest unseen first
        self._names: dict[int, str] = {}  # by serial: those held, and the forgotten whose alarms may wait
        self._begun = self._lost = 0
        self._found: list[Alarm] = []
        self._numbers = forward is None
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside
            self.state = self._memory(alpha, window, slots, record_capacity, sums, forward, whole)

    def _check_rules(self, rules: Mapping[str, Sequence[Rule]]) -> None:
        if unknown := set(rules) - set(self.hook_points):
            raise ArgumentError("rules", expected=f"hook points of {self.hook_points}", got=sorted(unknown))
        for point, one in zip(self.hook_points, self.rules, strict=True):
            given = rules.get(point, ())
            if len(one) != len(given):
                raise ArgumentError(
                    f"rules at {point!r}",
                    expected="one a direction",
                    got=sorted(direction for _, _, direction, *_ in given),
                )

    def _memory(
        self,
        alpha: float,
        window: int,
        slots: int,
        capacity: int,
        sums: bool,
        forward: Tensor | None,
        whole: Tensor | None,
    ) -> Tracked:
        m, k = len(self.hook_points), self.k

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        copies = -(-k // TRACK_COLUMNS)
        statistic, level, release = self._levels() if any(self.rules) else (None, None, None)
        return Tracked(
            forward=zeros(1, dtype=torch.int64) if forward is None else forward,
            whole=zeros(1, dtype=torch.int64) + 1 if whole is None else whole,
            alpha=torch.full((1,), alpha, dtype=torch.float64, device=self.device),
            serials=zeros(m, slots, copies, dtype=torch.int64),
            tokens=zeros(m, slots, copies, dtype=torch.int64),
            ema=zeros(m, slots, k),
            rest=zeros(m, slots, k),
            recent=zeros(m, slots, window - 1, k, dtype=torch.float32),
            largest=zeros(3, m, slots, k, dtype=torch.float32),
            sums=zeros(3, m, slots, k) if sums else None,
            squares=zeros(3, m, slots, k) if sums else None,
            statistic=statistic,
            level=level,
            release=release,
            active=None if statistic is None else zeros(m, slots, k, dtype=torch.int8),
            raised=zeros(1, dtype=torch.int64),
            taken=zeros(1, dtype=torch.int64),
            records=zeros(capacity, 5, dtype=torch.int64),
            values=zeros(capacity),
            window=window,
        )

    def _levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rules as tables [M, K]."""
        shape = (len(self.hook_points), self.k)
        statistic = torch.zeros(shape, dtype=torch.int32)
        level, release = torch.full((2, *shape), torch.inf, dtype=torch.float64)
        for m, rules in enumerate(self.rules):
            for direction, (_, read, _, rise, end) in rules.items():
                statistic[m, direction], level[m, direction], release[m, direction] = read, rise, end
        return statistic.to(self.device), level.to(self.device), release.to(self.device)

    # --- sequences

    def slot(self, name: str) -> tuple[int, int]:
        """The slot of a sequence, now the last seen, and its serial; where there is no room the longest unseen is
        forgotten."""
        if name not in self._held:
            self._begun += 1
            self._held[name] = (self._free(), self._begun)
            self._names[self._begun] = name
        self._held.move_to_end(name)
        return self._held[name]

    def _free(self) -> int:
        if len(self._held) + 1 < self.state.tokens.shape[1]:
            return len(self._held) + 1
        slot, serial = self._held.popitem(last=False)[1]
        self.evicted += 1
        if not any(self.rules):
            del self._names[serial]
        elif len(self._names) >= len(self._held) + PENDING:
            self._collect()
        return slot

    def places(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Slots [B] int32 and serials [B] int64 of the sequences of a batch, on the host; ArgumentError where they do
        not all fit at once, or one is named twice."""
        room = self.state.tokens.shape[1] - 1
        if len(set(names)) != len(names) or len(names) > room:
            raise ArgumentError(
                "sequences of a batch",
                expected=f"at most {room} names, none twice",
                got=f"{len(names)}, {len(set(names))} of them different",
                way_out="Give slots for one more than the sequences of the largest batch.",
            )
        found = [self.slot(name) for name in names]
        slots = torch.tensor([slot for slot, _ in found], dtype=torch.int32)
        return slots, torch.tensor([serial for _, serial in found], dtype=torch.int64)

    def step(self, scores: Tensor, first: Tensor, kept: Tensor, marks: Tensor, slots: Tensor, serials: Tensor) -> None:
        """Advance by one forward; nothing is waited for. Everything is on the device.

        scores [M, n, K] float32 and marks [M, n] int8, 0 for a row to leave out; sequence b has rows first[b] to
        first[b] + kept[b] - 1 (int32 [B]) in the order of its tokens, and its slot and serial from `slot`. No slot but
        0 may come twice.
        """
        m, k = len(self.hook_points), self.k
        if scores.dim() != 3 or (scores.shape[0], scores.shape[2]) != (m, k) or marks.shape != scores.shape[:2]:
            raise ShapeError("scores, marks", expected=f"[{m}, n, {k}], [{m}, n]", got=(scores.shape, marks.shape))
        if self._numbers:
            self.state.forward.add_(1)
        ops.step("track", self.device)(scores, first, kept, marks, slots, serials, self.state)

    # --- what the device knows; these wait for it

    def _wait(self) -> None:
        """For the forwards of every stream, not only of the one that this runs in."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def alarms(self) -> list[Alarm]:
        """The alarms that rose since they were last asked for, by forward, hook point, sequence, position and rule.

        LedgerError where more rose than there was room for; the next call returns those that were recorded.
        """
        self._collect()
        if self._lost:
            capacity, risen = len(self.state.values), len(self._found) + self._lost
            lost, self._lost = self._lost, 0
            raise LedgerError(
                f"alarms: {lost} were not recorded",
                expected=f"at most {capacity} between two readings",
                got=risen,
                way_out="Read them more often, or give record_capacity=...",
            )
        found, self._found = self._found, []
        return found

    def _collect(self) -> None:
        """Take what was recorded off the device, and forget the names that waited for it."""
        if not any(self.rules):
            return
        self._wait()
        state = self.state
        risen = int(state.raised - state.taken)
        written = min(risen, len(state.values))
        records, values = state.records[:written].tolist(), state.values[:written].tolist()
        for (_, m, serial, position, direction), value in sorted(zip(records, values, strict=True)):
            name, _, _, level, _ = self.rules[m][direction]
            self._found.append(Alarm(name, self._names[serial], position, value, level, self.hook_points[m]))
        self._lost += risen - written
        state.taken.add_(risen)
        self._names = {serial: name for name, (_, serial) in self._held.items()}

    def _live(self, m: int) -> tuple[list[str], Tensor]:
        """The sequences that have tokens at hook point m, and their slots on the device."""
        self._wait()
        serials, tokens = self.state.serials[m, :, 0].tolist(), self.state.tokens[m, :, 0].tolist()
        live = {name: at for name, (at, serial) in self._held.items() if serials[at] == serial and tokens[at]}
        return list(live), torch.tensor(list(live.values()), dtype=torch.int64, device=self.device)

    def _read(self, table: Tensor) -> dict[str, dict[str, Tensor]]:
        found = {}
        for m, point in enumerate(self.hook_points):
            names, at = self._live(m)
            found[point] = dict(zip(names, table[m].index_select(0, at).double().cpu(), strict=True))
        return found

    def scores(self) -> dict[str, dict[str, Tensor]]:
        """{hook point: {sequence: EMA of z scores [K] at its last token}}."""
        return self._read(self.state.ema)

    def peaks(self) -> dict[str, dict[str, Tensor]]:
        """{hook point: {sequence: largest EMA [K] so far}}."""
        return self._read(self.state.largest[STATISTICS.index("ema")])

    def totals(self, hook_point: str) -> Totals:
        """What the statistics did at a hook point, for a reference; CalibrationError where no sums are kept."""
        state, m = self.state, self.hook_points.index(hook_point)
        if state.sums is None or state.squares is None:
            raise CalibrationError("reference: no sums are kept", way_out="Give Watch(sums=True).")
        _, at = self._live(m)
        sums, squares, largest = (
            table[:, m].index_select(1, at).double().cpu() for table in (state.sums, state.squares, state.largest)
        )
        return Totals(int(state.tokens[m, at, 0].sum()), sums.sum(1), squares.sum(1), largest)
