"""Seats: where the rows of every hook point and sink of a capture on the device go, and how they come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .batches import Batch
from .control import WIDTH, Station
from .errors import ArgumentError
from .groups import Group
from .moments import Moments
from .outflow import Outflow
from .plans import Plan, recording, refuse_while_recording
from .pooling import DevicePool
from .sinks import Binding
from .tokens import Tokens

ROWS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class Seat:
    """One sink at one hook point: its rule by number, and its place in a group, an outflow, among pools, or with a
    monitor."""

    binding: Binding
    station: int
    rule: int
    kin: tuple[Any, ...]  # what hook points of one group have in common before their first row
    group: Group | None = None
    flow: Outflow | None = None
    index: int = 0  # in the group or outflow, or among the hook points of the monitor
    pool: DevicePool | None = None
    onlooker: Any = None  # of a monitor, shared by its hook points (onlooking.Onlooker)
    recorded: Sequence[int] = (0,) * WIDTH  # the words of its station, as far as the ledger has them

    @property
    def moments(self) -> Moments:
        """The sink, where rows are summed."""
        assert isinstance(self.binding.sink, Moments)
        return self.binding.sink

    def pool_for(self, sequences: int, dim: int, device: torch.device) -> DevicePool:
        """The pool of the seat, with room for so many sequences; made where there is none so large."""
        if self.pool is None or self.pool.sequences < sequences:
            refuse_while_recording(device, "sequences")
            kind = self.binding.rule.pool
            assert kind is not None
            self.pool = DevicePool(kind, sequences, dim, device)
        return self.pool

    @property
    def receiver(self) -> Any:
        """The store that the sink belongs to, None for a sink of another kind (outflow.Receiver)."""
        return getattr(self.binding.sink, "receiver", None)

    def record(self, words: Sequence[int]) -> Sequence[int]:
        """Add what is new in the words of the station to the ledger, and return it."""
        words, self.recorded = [now - then for now, then in zip(words, self.recorded, strict=True)], words
        ledger, at = self.binding.ledger, Station
        ledger.tokens.add(
            offered=words[at.OFFERED],
            selected=words[at.SELECTED],
            masked=words[at.MASKED],
            skipped=words[at.SKIPPED],
            reseen=words[at.RESEEN],
            nonfinite=words[at.NONFINITE],
            rolled_back=words[at.ROLLED_BACK],
        )
        ledger.fires.add(expected=words[at.EXPECTED], seen=words[at.SEEN])
        ledger.forwards += words[at.FORWARDS]
        ledger.unmasked += words[at.UNMASKED]
        if self.onlooker is not None:  # it has read what was selected
            ledger.rows.add(formed=words[at.SELECTED], accumulated=words[at.SELECTED])
        return words


class Seats:
    """The seats of a capture, by station and by hook point, and the groups and outflows that they form."""

    def __init__(
        self, model: nn.Module, points: Mapping[str, Sequence[Binding]], optional: bool, device: torch.device
    ) -> None:
        self.device = device
        modules = dict(model.named_modules())
        bindings = [binding for point in points.values() for binding in point]
        self.rules: list[Tokens] = list(dict.fromkeys(binding.rule for binding in bindings))
        self.all = [
            Seat(b, station, self.rules.index(b.rule), _kin(b, modules[b.hook_point], optional))
            for station, b in enumerate(bindings)
        ]
        self.labels = {seat.binding.labels for seat in self.all} - {()}
        self.of_point: list[list[Seat]] = []
        for point in points.values():
            before = sum(map(len, self.of_point))
            self.of_point.append(self.all[before : before + len(point)])
        self.watched: list[Seat] = []  # the first of every monitor
        self._place_onlookers()
        self.groups: list[Group] = []
        self.flows: list[Outflow] = []
        self.cursors = torch.zeros(len(self.all), 2, dtype=torch.int64, device=device)
        self.leaders = torch.zeros(0, dtype=torch.int64, device=device)  # a station of every group and outflow
        self._waiting: list[int] = []  # most rows that can wait in each group
        self._recorded = False  # into a graph: what the host knows of the rows is then no longer all

    def _place_onlookers(self) -> None:
        places: dict[int, int] = {}
        for seat in self.all:
            seat.onlooker = getattr(seat.binding.sink, "onlooker", None)
            if seat.onlooker is not None:
                seat.index = places.get(id(seat.onlooker), 0)
                places[id(seat.onlooker)] = seat.index + 1
                if seat.index == 0:
                    self.watched.append(seat)

    # --- the rows of a forward

    def stage(self, seat: Seat, flat: Tensor, plan: Plan) -> None:
        """Gather the kept rows of flat [N, D] for a seat; touches no sum."""
        if seat.binding.rule.pool is not None:
            self._stage_pool(seat, flat, plan)
        elif seat.receiver is not None:
            flow = self.flow_of(seat, flat, plan.positions)
            self._stage_rows(seat, flat, plan, flow.cursor, flow.room(seat.index, plan.positions))
        elif seat.onlooker is not None:
            self._stage_rows(seat, flat, plan, seat.onlooker.cursor, seat.onlooker.room(seat.index))
            seat.onlooker.score(seat.index, plan, seat.rule)
        else:
            group, i = self.group_of(seat, flat, plan.positions), seat.index
            self._stage_rows(seat, flat, plan, group.cursor, (group.rows[i], group.marks[i], group.norms[i]))

    def _stage_rows(
        self, seat: Seat, flat: Tensor, plan: Plan, cursor: Tensor, to: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        rows = to[0]
        if rows.dtype != flat.dtype or rows.shape[1] != flat.shape[1]:
            raise ArgumentError(
                f"hook point {seat.binding.hook_point!r}: rows",
                expected=f"{rows.shape[1]} wide, {rows.dtype}, like the first ones",
                got=f"{flat.shape[1]} wide, {flat.dtype}",
                way_out="Run the model in one precision while it is captured, or use resident=False.",
            )
        station = plan.stations[seat.station]
        step = ops.step("stage_rows", self.device)
        step(flat, plan.dest[seat.rule], plan.rank, plan.ranked, cursor, station, *to)

    def _stage_pool(self, seat: Seat, flat: Tensor, plan: Plan) -> None:
        """Sum the kept positions by sequence, beside what earlier forwards of the batch brought."""
        pool = seat.pool_for(plan.sequences, flat.shape[1], self.device)
        counted = plan.rank > 0 if plan.ranked else torch.ones_like(plan.rank, dtype=torch.bool)
        keep = plan.dest[seat.rule] >= 0
        station = plan.stations[seat.station]
        station[Station.BAD] += pool.stage(flat, keep, plan.sequence, counted)
        station[Station.FIRES] += 1

    def group_of(self, seat: Seat, flat: Tensor, positions: int) -> Group:
        """The group of a seat, made with its kin at the first rows flat [N, D], with room for so many positions."""
        if seat.group is None:
            refuse_while_recording(self.device, f"hook point {seat.binding.hook_point!r}")
            kin = [other for other in self.all if other.kin == seat.kin and other.group is None] if seat.kin else [seat]
            self._make_group(kin, flat)
        group = seat.group
        assert group is not None
        if group.room_for(positions) > group.capacity:
            refuse_while_recording(self.device, "rows")
            group.reserve(positions)
        return group

    def flow_of(self, seat: Seat, flat: Tensor, positions: int) -> Outflow:
        """The outflow of a seat, made with its kin at the first rows flat [N, D], in a forward of so many positions."""
        if seat.flow is None:
            refuse_while_recording(self.device, f"hook point {seat.binding.hook_point!r}")
            kin = [other for other in self.all if other.kin == seat.kin and other.flow is None] if seat.kin else [seat]
            line, cursor = self._next_line(kin, flat)
            stations = [seat.station for seat in kin]
            flow = Outflow(stations, seat.rule, seat.binding.labels, seat.receiver, line, cursor)
            flow.reserve(positions, flat)
            flow.begun = positions
            self._lead(kin)
            for index, other in enumerate(kin):
                other.flow, other.index = flow, index
            self.flows.append(flow)
        assert seat.flow is not None
        return seat.flow

    def _next_line(self, kin: Sequence[Seat], flat: Tensor) -> tuple[int, Tensor]:
        """The number of the cursor of new kin, and the cursor; raises where their sinks do not take such rows."""
        if flat.dtype not in ROWS:
            raise ArgumentError(
                f"hook point {kin[0].binding.hook_point!r}: dtype of the rows",
                expected="bfloat16, float16 or float32",
                got=flat.dtype,
                way_out="Use capture(resident=False), which accumulates float64 rows in float64.",
            )
        for seat in kin:
            seat.binding.sink.check_rows(flat.shape[1], flat.dtype)  # type: ignore[attr-defined]
        return len(self.leaders), self.cursors[len(self.leaders)]

    def _lead(self, kin: Sequence[Seat]) -> None:
        """The next cursor follows the first of kin from now on."""
        self.leaders = torch.cat([self.leaders, self.leaders.new_tensor([kin[0].station])])

    def _make_group(self, kin: Sequence[Seat], flat: Tensor) -> None:
        _, cursor = self._next_line(kin, flat)
        dim, like = flat.shape[1], kin[0].moments
        stations = [seat.station for seat in kin]
        group = Group(stations, len(like.labels), like.keeps_covariance, like.device_block_rows, cursor, dim, flat)
        for index, seat in enumerate(kin):
            seat.group, seat.index = group, index
        self.groups.append(group)
        self._lead(kin)
        self._waiting.append(0)

    # --- pooled rows

    @property
    def pooling(self) -> list[Seat]:
        """The seats that have pools by now."""
        return [seat for seat in self.all if seat.pool is not None]

    def reset_pools(self) -> None:
        """Forget every sequence: a batch begins."""
        for seat in self.pooling:
            assert seat.pool is not None
            seat.pool.reset()

    def form_pools(self, batch: Batch, keep: bool, sequences: int) -> None:
        """Form the pooled rows of a batch's sequences, or drop them; waits for the device."""
        for seat in self.pooling:
            assert seat.pool is not None
            pooled = seat.pool.close(sequences)
            with seat.binding.held:
                seat.binding.form(pooled, batch.ids(seat.binding.labels), keep, batch.requests, batch)

    # --- how they come back

    def drain(self, positions: int) -> None:
        """Fold what blocks a forward of so many positions may have filled; the device knows which."""
        self._recorded |= recording(self.device)
        for i, group in enumerate(self.groups):
            self._waiting[i] += positions
            for _ in range(group.most_blocks(positions)):
                if self._recorded or self._waiting[i] >= group.block:
                    group.drain()
            self._waiting[i] = min(self._waiting[i], group.block - 1)

    def hand_over(self) -> None:
        """Give all that the groups hold to their sinks, and count it; waits for the device."""
        for i, group in enumerate(self.groups):
            self._waiting[i] = 0
            for station, taken in zip(group.stations, group.take(*group.cursor.tolist()), strict=True):
                seat = self.all[station]
                seat.moments.adopt(taken)
                formed = int(taken.sums.count) + len(taken.rows) + taken.overrange
                seat.binding.ledger.rows.add(formed=formed, overrange=taken.overrange)


def _kin(binding: Binding, module: nn.Module, optional: bool) -> tuple[Any, ...]:
    """What tells which hook points advance in step and have one width; empty for one that stands alone."""
    sink = binding.sink
    if optional or binding.rule.pool is not None:
        return ()
    shapes = tuple(tuple(p.shape) for p in module.parameters())
    if isinstance(sink, Moments):
        return (binding.rule, type(module), shapes, sink.labels, sink.keeps_covariance, sink.device_block_rows)
    receiver = getattr(sink, "receiver", None)
    return () if receiver is None else (binding.rule, type(module), shapes, id(receiver))
