"""Lanes: a capture whose rows and sums stay on the device, without a host synchronisation in the forward.

Hooks call the ops `lane_begin`, `lane_stage` and `lane_commit`, whose implementations find the lane by its handle: so
hooks trace under torch.compile, and the same steps run eagerly, in a compiled graph and while a CUDA graph is recorded.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .batches import Batch, Call
from .control import Fault, Header, Station
from .courier import Courier
from .errors import CaptureError, DeviceError, ShapeError
from .faults import error_of
from .forwards import in_backward, outside_autograd
from .hookpoints import token_ids
from .plans import Plan, Plans, recording, refuse_while_recording
from .resident import hooks
from .seats import Seats
from .showings import Showing, check_sizes
from .sinks import Binding
from .tags import Tags
from .ways import Way

_handles = itertools.count(1)


@dataclass
class Open:
    """The open forward as the host knows it."""

    plan: Plan
    call: Call
    thread: int


class Lane(Way):
    """The device memory of one capture, and the steps of a forward on it."""

    resident = True

    @outside_autograd()
    def __init__(
        self,
        model: nn.Module,
        points: Mapping[str, Sequence[Binding]],
        optional: bool,
        device: torch.device,
        training: bool | None,
        current: Callable[[], Batch | None],
    ) -> None:
        super().__init__(model, points, optional, training, current)
        self.device = device
        self.handle = next(_handles)
        self.order = torch.zeros(1, dtype=torch.int64, device=device)  # what a compiled graph orders the ops by
        self._names = list(points)
        self.seats = Seats(model, points, optional, device)
        stops, pads = token_ids(model, "eos", "pad"), token_ids(model, "pad") - token_ids(model, "eos")
        rules = [seat.rule for seat in self.seats.all]
        self.plans = Plans(self.seats.rules, rules, optional, stops, pads, device)
        receiving = any(seat.receiver is not None for seat in self.seats.all)
        self._courier = Courier(self.seats, self.plans.stations, self.plans.header) if receiving else None
        self._numbers: dict[Batch, int] = {}  # of open batches, for the courier
        self._number = 0  # of the batch that the device knows of
        self._tags = Tags(self.plans.header)
        self._open: Open | None = None
        self._ignored = False
        self._last: Plan | None = None  # of the last forward
        self._before = torch.zeros((), dtype=torch.int64, device=device)  # forwards before the open one
        self._fired = torch.zeros(len(rules), dtype=torch.int64, device=device)
        self._row_dtype = next(model.parameters()).dtype
        self._entered = torch.zeros((), dtype=torch.int64, device=device)  # forwards before the open batch
        self._word = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._heard = self._word.numpy()  # the same memory, read without torch
        self._collecting = 0  # the thread that hands rows over
        self._steps = threading.RLock()  # of begin, stage, commit, and of whoever looks at what they write
        self._batch: Batch | None = None
        ops.LANES[self.handle] = self
        if device.type == "cuda":
            from . import aot  # with what it needs, not for a CPU

            with contextlib.suppress(DeviceError):  # without Triton the reference serves
                aot.attach(device)

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Put the hooks on the model, and have the sinks ask for their rows when they are read."""
        for binding in self.bindings:
            if hasattr(binding.sink, "residents"):
                binding.sink.residents.append(self.collect)
            else:
                binding.sink._resident = self.collect  # type: ignore[attr-defined]
        return hooks(self, self.model, self._modules)

    # --- a batch

    @outside_autograd()
    def enter(self, batch: Batch) -> None:
        """Copy what a batch says of its sequences into the lane's memory, which is for one batch at a time."""
        if self._batch is not None:
            raise CaptureError(
                "tap.batch: another batch is open in this capture, which stays on the device",
                way_out="Close it first, open one capture a thread, or use capture(resident=False).",
            )
        if batch.cu_seqlens is not None:
            self.plans.set_bounds(batch.cu_seqlens)
        if batch.spans is not None:
            self.plans.set_spans(batch.spans)
        if batch.mask is not None:
            batch.mask = batch.mask.to(self.device, non_blocking=True)
        self.plans.header[Header.GOES_ON] = 1
        if self._courier is not None:
            self._numbers[batch] = self._courier.roll.enter(batch)
            self._name(batch)
        self._reset_pools()
        for seat in self.seats.watched:
            seat.onlooker.enter(batch)
        if len(self.plans.seen):
            self.plans.seen.zero_()
        self._tags.enter(batch, self.seats.labels)
        self._batch = batch

    @outside_autograd()
    def leave(self, batch: Batch) -> None:
        """The batch has ended: tokens begin anew, and labels are wanted again."""
        if self._batch is not batch:
            return  # it was refused
        self._batch = None
        self.plans.header[Header.GOES_ON] = 0
        self._tags.leave()
        if self._courier is not None:
            self._courier.roll.leave(self._numbers.pop(batch))
            self._name(None)
            self._courier.publish()

    def _name(self, batch: Batch | None) -> None:
        """Tell the device which batch the next rows belong to."""
        number = 0 if batch is None else self._numbers.get(batch, 0)
        if number != self._number:
            self._number = number
            self.plans.header[Header.BATCH] = number

    @outside_autograd()
    def gate(self, forwards: int) -> None:
        """Make room for replays of a forward that was recorded."""
        self.raise_faults()
        if self._courier is not None:
            self._name(self._current())
            self._courier.gate(forwards)

    # --- begin, stage, commit

    @outside_autograd()
    def begin(self, mask: Tensor | None, shown: Tensor | None, past_at: Tensor | None, past: int) -> None:
        """Open a forward over positions `shown` [B, T] (or of another first argument [B, T, D] or [N, D])."""
        if in_backward():
            return
        self._ignored = self._training not in (None, self.model.training)
        if self._ignored:
            return
        with self._steps:
            self.raise_faults()
            self._refuse_two_at_once()
            self._begin(mask, shown, past_at, past)

    def _begin(self, mask: Tensor | None, shown: Tensor | None, past_at: Tensor | None, past: int) -> None:
        batch = self._current() or Batch()
        for names in self.seats.labels:
            batch.ids(names)
        showing = Showing.of(shown, mask, past, batch, self.device)
        self.plans.check_rules(showing.kind, batch.spans, showing.sequences)
        plan = self.plans.fit(showing.sequences, showing.length, showing.kind)
        check_sizes(batch, plan, self.seats.labels)
        if self._courier is not None:
            self._courier.begin(plan.positions)
            self._name(batch)
            self._tags.keep_tokens(plan, showing.ids)
        step, before = ops.step("begin", self.device), past if past_at is None else past_at
        self._open, self._last = Open(plan, showing.call, threading.get_ident()), plan
        try:
            step(plan, showing.mask, showing.ids, before, showing.written(batch))
            self._begin_watched(plan, past)
        except BaseException:
            self._open = None
            raise

    def _refuse_two_at_once(self) -> None:
        thread = None if self._open is None else self._open.thread
        if thread not in (None, threading.get_ident()) and any(t.ident == thread for t in threading.enumerate()):
            raise CaptureError(
                "capture: two forwards at once in one capture on the device",
                way_out="Open one capture a thread, or capture(resident=False).",
            )

    def _begin_watched(self, plan: Plan, past: int) -> None:
        for seat in self.seats.watched:
            if not seat.onlooker.fits(plan):
                refuse_while_recording(self.device, "rows")
                seat.onlooker.reserve(plan, self._row_dtype)
            seat.onlooker.begin(self._current(), plan, past, recording(self.device))

    @outside_autograd()
    def stage(self, point: int, hidden: Tensor) -> None:
        """Gather the kept rows of hidden [B, T, D] or [N, D] for every sink of a hook point; touches no sum."""
        if self._ignored:
            return
        if in_backward():
            n = hidden.shape[:-1].numel()
            for seat in self.seats.of_point[point]:
                seat.binding.ledger.tokens.add(offered=n, recomputed=n)
            return
        if self._open is None:
            raise CaptureError(
                f"hook point {self._names[point]!r}: ran outside a forward of the captured model",
                expected=f"a call of {type(self.model).__name__} itself",
                way_out=f"Call the {type(self.model).__name__} that was given to capture.",
            )
        plan = self._open.plan
        if hidden.shape[:-1].numel() != plan.positions or hidden.dim() not in (2, 3):
            raise ShapeError(
                f"hook point {self._names[point]!r}: output",
                expected=f"{plan.positions} rows, one a position of the model's input",
                got=list(hidden.shape),
                way_out="Use capture(resident=False) for modules that see other rows.",
            )
        flat = hidden.reshape(-1, hidden.shape[-1])
        with self._steps:
            for seat in self.seats.of_point[point]:
                self.seats.stage(seat, flat, plan)

    @outside_autograd()
    def commit(self) -> None:
        """Close the forward on the device: all of it counts, or none."""
        if self._open is None or in_backward():
            return
        with self._steps:
            self._commit(self._open.plan, self._open.call)

    def _commit(self, plan: Plan, call: Call) -> None:
        try:
            self._before_commit(plan)
            ops.step("commit", self.device)(plan, self.seats.leaders, self.seats.cursors)
        finally:
            self._open = None
        self._after_commit(plan)
        self._word.copy_(plan.header[Header.ERRORS : Header.ERRORS + 1], non_blocking=True)
        self.seats.drain(plan.positions)
        batch = self._current()
        if batch is not None:
            batch.advance(call, None)
        elif self.seats.pooling:
            refuse_while_recording(self.device, "pooled rows of a forward outside tap.batch")
            self._form_pools(Batch(), True)

    def _before_commit(self, plan: Plan) -> None:
        """Note what the commit clears and others need to know, and say whose the rows are."""
        if self.seats.pooling or self.seats.watched:
            self._fired.copy_(plan.stations[:, Station.FIRES])
            self._before.copy_(plan.header[Header.FORWARDS])
        for group in self.seats.groups:
            self._tags.place(plan, group, self.seats.all[group.stations[0]])
        if self._courier is not None:
            self._courier.place(plan, self._tags.labels, self._tags.tokens)

    def _after_commit(self, plan: Plan) -> None:
        """Have stores, pools and monitors take what the forward brought, where it was committed."""
        if self._courier is not None:
            self._courier.commit(plan)
        for seat in self.seats.pooling:
            assert seat.pool is not None
            seat.pool.commit(self._fired[seat.station] * (plan.header[Header.FORWARDS] - self._before))
        for seat in self.seats.watched:
            seat.onlooker.commit(plan, seat.rule, self._before, plan.header[Header.FORWARDS])

    def _reset_pools(self) -> None:
        self._entered.copy_(self.plans.header[Header.FORWARDS])
        self.seats.reset_pools()

    def close(self, batch: Batch, keep: bool) -> None:
        """Form the pooled rows of a batch that has ended, or drop them; waits for the device."""
        if self.seats.pooling:
            with self._holding():
                self._form_pools(batch, keep)
            self._settle()

    def _tells(self, binding: Binding) -> bool:
        """Other rows are brought by another thread, which tells their sinks."""
        return super()._tells(binding) and binding.rule.pool is not None

    def _form_pools(self, batch: Batch, keep: bool) -> None:
        if not self.seats.pooling or self._last is None or self.committed == int(self._entered):
            return
        self.seats.form_pools(batch, keep, self._last.sequences)
        self._reset_pools()

    def abandon(self, every: bool = False) -> None:
        """Forget this thread's forward, or `every` one's, which ended without its commit; the device undoes it."""
        if self._open is not None and (every or self._open.thread == threading.get_ident()):
            self._open = None

    # --- what the device found

    def raise_faults(self) -> None:
        """Raise what the last forwards found wrong, as far as the host has heard of it; nothing is waited for."""
        word = int(self._heard[0])
        if not word:
            return
        if not word & Fault.OVERRUN:  # that is for good: it cannot be told what came after
            self._heard[0] = 0
            self.plans.header[Header.ERRORS].bitwise_and_(int(Fault.OVERRUN))
        raise error_of(word, [seat.binding.hook_point for seat in self.seats.all], self.plans.stations)

    @property
    def committed(self) -> int:
        """Forwards committed; waits for the device."""
        return int(self.plans.header[Header.FORWARDS])

    def collect(self) -> None:
        """Hand everything committed to the sinks, and their counts to the ledgers; waits for device and stores, and
        raises what failed on the way there.

        A point where summation is split: what comes later is summed on its own and added.
        """
        if self._collecting != threading.get_ident():
            with self._holding():
                self._collect()

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """For one who hands rows to the sinks: they must not ask for them meanwhile."""
        with self._lock:
            self._collecting = threading.get_ident()
            try:
                with outside_autograd():
                    yield
            finally:
                self._collecting = 0

    def _collect(self) -> None:
        with self._steps:
            self._undo()
            asked = 0 if self._courier is None else self._courier.ask()
        try:
            if self._courier is not None:
                self._courier.wait(asked)
        finally:
            self._take()

    def _take(self) -> None:
        """Hand over what the lane holds itself."""
        with self._steps:
            words = self.plans.stations.tolist()
            self.seats.hand_over()
            for seat, word in zip(self.seats.all, words, strict=True):
                if seat.flow is None:
                    with seat.binding.held:
                        seat.record(word)
            self._word.copy_(self.plans.header[Header.ERRORS : Header.ERRORS + 1])

    def end(self, well: bool) -> None:
        """Collect, and let the sinks go; the memory ends with the last reference to the lane."""
        try:
            with contextlib.nullcontext() if well else contextlib.suppress(Exception):
                self.collect()
            if well:
                self.raise_faults()
        finally:
            if self._courier is not None:
                self._courier.close()
            for binding in self.bindings:
                if hasattr(binding.sink, "residents"):
                    binding.sink.residents.remove(self.collect)
                else:
                    binding.sink._resident = None  # type: ignore[attr-defined]

    def _undo(self) -> None:
        """Count a forward that was left open as rolled back."""
        if self._open is None and self._last is not None and int(self.plans.header[Header.OPEN]):
            ops.step("undo", self.device)(self._last)
            self.plans.header[Header.OPEN].zero_()
