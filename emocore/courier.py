"""Courier: the thread that brings rows from the device to their stores, while the model goes on.

Cursors and ledgers are published after a commit: copied to the host, behind an event. The courier waits for the event,
copies what it then knows to be there on a stream of its own, and frees its place in the ring. No forward waits for a
copy, only for a place.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import native, ops
from .control import Fault, Header, Station
from .errors import ArgumentError, CaptureError, LedgerError
from .faults import overrun
from .forwards import outside_autograd
from .outflow import Arrival, Outflow
from .plans import Plan, recording, refuse_while_recording
from .roll import Roll
from .seats import Seats

COUNTS = 3  # on their way to the host at once


class Count:
    """Cursors [S, 2] and stations [S, 16] as they stood after a commit, on the host once the event has come."""

    def __init__(self, cursors: Tensor, stations: Tensor) -> None:
        pinned = cursors.is_cuda
        self.cursors = torch.empty(cursors.shape, dtype=cursors.dtype, pin_memory=pinned)
        self.stations = torch.empty(stations.shape, dtype=stations.dtype, pin_memory=pinned)
        self.event = torch.cuda.Event(blocking=True) if pinned else None  # a wait for it sleeps
        self.ended: dict[Outflow, int] = {}
        self.left: list[int] = []  # batches that were over

    def take(
        self,
        cursors: Tensor,
        stations: Tensor,
        flows: Sequence[Outflow],
        left: Sequence[int],
        after: torch.cuda.Event | None,
    ) -> None:
        """Begin to copy what stands there in the current stream's order, and after the last commit."""
        if after is not None:
            torch.cuda.current_stream(cursors.device).wait_event(after)
        self.cursors.copy_(cursors, non_blocking=True)
        self.stations.copy_(stations, non_blocking=True)
        self.ended, self.left = {flow: flow.ended for flow in flows}, list(left)
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(cursors.device))

    def wait(self) -> None:
        """Until it is there."""
        if self.event is not None:
            self.event.synchronize()


class Courier:
    """Empties the outflows of a capture; `roll` numbers the batches that their rows belong to."""

    def __init__(self, seats: Seats, stations: Tensor, header: Tensor) -> None:
        self._seats, self._stations, self._header = seats, stations, header
        self.roll = Roll()
        self._changed = threading.Condition()
        self._free = [Count(seats.cursors, stations) for _ in range(COUNTS)]
        self._published: deque[Count] = deque()
        self._failures: deque[BaseException] = deque()
        self._committed = torch.cuda.Event() if header.is_cuda else None  # the last commit, on whatever stream
        self._asked = self._brought = 0  # counts, so far
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="emocore courier", daemon=True)

    # --- what the model's thread calls

    def begin(self, positions: int) -> None:
        """Make room for a forward, or have its rows dropped; what is recorded into a graph finds room at a `gate`."""
        self._finish_drops()
        for flow in self._seats.flows:
            if recording(self._header.device):
                if not flow.holds(positions):
                    refuse_while_recording(self._header.device, "rows")
                flow.recorded, flow.dropping = max(flow.recorded, positions), False
            else:
                self.admit(flow, positions)

    def place(self, plan: Plan, given: Callable[[tuple[str, ...]], Tensor], tokens: Tensor) -> None:
        """Before the commit: whose the rows are that a forward has staged; `given` are labels by name."""
        for flow in self._seats.flows:
            if flow.dropping:
                flow.note(plan.stations)
                continue
            labels, cursor, rest = flow.labels, flow.cursor, (tokens[: plan.positions], plan.sequences)
            step = ops.step("place_rows", self._header.device)
            whose = (plan.dest[flow.rule], plan.rank, plan.sequence)
            step(plan.header, given(labels), bool(labels), *whose, *rest, cursor, flow.places)

    def commit(self, plan: Plan) -> None:
        """After it."""
        for flow in self._seats.flows:
            flow.ended = flow.begun
        if self._committed is not None and not recording(self._header.device):
            self._committed.record(torch.cuda.current_stream(self._header.device))
        self.publish()

    def _finish_drops(self) -> None:
        """Undo what a commit has done for forwards that found no room, whatever came after it."""
        for flow in self._seats.flows:
            if flow.noted:
                flow.drop(self._stations)

    def admit(self, flow: Outflow, positions: int) -> None:
        """Make room for a forward of so many positions: wait for it, or let the forward's rows be dropped.

        Raises what the courier has failed with since the last call.
        """
        self.raise_failure()
        flow.ended = flow.begun
        if not flow.holds(positions):
            if flow.recorded:
                raise CaptureError(
                    "capture: a forward larger than there is memory for, and a graph was recorded that uses it",
                    expected=f"at most {flow.capacity // 2} positions",
                    got=positions,
                    way_out="Run one forward of the largest shape before recording.",
                )
            self.flush()
            flow.reserve(positions, flow.rows[0])
        if not flow.fits(positions):
            self.publish(force=True, wait=flow.receiver.waits)
            if flow.receiver.waits:
                self._until(lambda: flow.fits(positions))
        flow.dropping = not flow.fits(positions)
        if not flow.dropping:
            flow.begun += positions
            flow.tell()

    def gate(self, forwards: int) -> None:
        """Make room for so many replays of the largest forward that was recorded; raises as `admit`, ArgumentError."""
        if forwards < 1:
            raise ArgumentError("forwards", expected="at least 1", got=forwards)
        self._finish_drops()
        for flow in self._seats.flows:
            positions, flow.ended = forwards * flow.recorded, flow.begun
            if positions > flow.capacity:
                raise ArgumentError("forwards", expected=f"at most {flow.capacity // flow.recorded}", got=forwards)
            self.raise_failure()
            if not flow.fits(positions):
                self.publish(force=True, wait=True)
                self._until(lambda: flow.fits(positions))  # noqa: B023 (called here)
            flow.begun += positions
            flow.tell()

    def publish(self, force: bool = False, wait: bool = False) -> None:
        """Let the courier know what is committed by now, where that is worth a copy, or must be.

        Where as many counts as there are have not been seen yet, the next commit tells more; or it waits.
        """
        self._finish_drops()
        flows = self._seats.flows
        worth = force or any(flow.ended - flow.published >= flow.unit for flow in flows)
        if not flows or not worth or recording(self._header.device):
            return
        if self._thread.ident is None:
            self._thread.start()
        with self._changed:
            if not wait and not self._free:
                return
            self._until(lambda: bool(self._free), failing=False)
            self._free[-1].take(self._seats.cursors, self._stations, flows, self.roll.left, self._committed)
            for flow in flows:
                flow.published = flow.ended
            self._published.append(self._free.pop())
            self._asked += 1
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all that is committed by now has been brought; raises what failed since the last call."""
        self.wait(self.ask())

    def ask(self) -> int:
        """Ask for all that is committed by now; the number of the request."""
        if not self._ending:  # else it was the last thing done
            self.publish(force=True, wait=True)
        return self._asked

    def wait(self, asked: int) -> None:
        """Wait until what was asked for has been brought; raises what failed since the last call."""
        self._until(lambda: self._brought >= asked, failing=False)
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what has failed and was not raised yet, one at a call."""
        with self._changed:
            failed = self._failures.popleft() if self._failures else None
        if failed is not None:
            raise failed

    def close(self) -> None:
        """End the thread, once it has brought what was published."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _until(self, ready: Callable[[], bool], failing: bool = True) -> None:
        """Wait; a failure of the courier ends the wait and is raised, if it is `failing`."""
        with self._changed:
            while not ready():
                if failing:
                    self.raise_failure()
                if not self._thread.is_alive():
                    raise CaptureError(
                        "capture: the thread that brings its rows to a store is gone",
                        way_out="Open the capture in the process that runs the model, and again after a fork.",
                    )
                self._changed.wait(0.1)

    # --- what its own thread does

    def _run(self) -> None:
        with outside_autograd(), self._own_stream():
            if self._header.is_cuda:
                torch.cuda.current_stream().query()  # gives the thread its context
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._published or self._ending)
                    if not self._published:
                        return
                    count = self._published[0]
                try:
                    count.wait()
                    failed = self._bring(count)
                except BaseException as error:
                    failed = [error]
                with self._changed:
                    self._failures.extend(failed)
                    self._free.append(self._published.popleft())
                    self._brought += 1
                    self._changed.notify_all()

    def _own_stream(self) -> contextlib.AbstractContextManager[object]:
        device = self._header.device
        if device.type != "cuda":
            return contextlib.nullcontext()
        native.extension().driver_relax()
        return torch.cuda.stream(torch.cuda.Stream(device))

    def _bring(self, count: Count) -> list[BaseException]:
        """Empty every outflow as far as the count goes; what fails is dropped, and returned, and the others go on."""
        failed: list[BaseException] = []
        flows = list(count.ended)
        cursors, words = count.cursors.tolist(), count.stations.tolist()
        receivers = {id(flow.receiver): flow.receiver for flow in flows}
        with contextlib.ExitStack() as held:
            for _, receiver in sorted(receivers.items()):  # until it is known that nothing was written over
                held.enter_context(receiver.lock)
            for flow in flows:
                try:
                    self._empty(flow, cursors[flow.line][0], words)
                except BaseException as error:
                    failed.append(error)
                with self._changed:
                    flow.fetched, flow.known = cursors[flow.line][0], (cursors[flow.line][0], count.ended[flow])
                    self._changed.notify_all()
            self.roll.forget(count.left)
            spoilt = any(flow.recorded for flow in flows) and self._overrun()
            untrue = spoilt or any(isinstance(error, LedgerError) for error in failed)
            for receiver in receivers.values():
                try:
                    receiver.discard() if untrue else receiver.settle()
                except BaseException as error:
                    failed.append(error)
        return [*failed, overrun()] if spoilt else failed

    def _empty(self, flow: Outflow, committed: int, words: Sequence[Sequence[int]]) -> None:
        """Hand over the rows of an outflow and count what the device has counted."""
        seats = [self._seats.all[station] for station in flow.stations]
        due = []
        for seat in seats:
            new = seat.record(words[seat.station])
            due.append(new[Station.SELECTED] - new[Station.DROPPED])
            seat.binding.ledger.rows.add(formed=new[Station.DROPPED], dropped=new[Station.DROPPED])
        try:
            if committed - flow.fetched > flow.capacity:
                raise overrun()
            spans = list(flow.spans(committed))
            for span in spans if spans or flow.fetched else [slice(0, 0)]:  # a store lists what never had a row, too
                arrivals = self._arrivals(flow, span)
                whose = self.roll.whose(flow.places[span].cpu(), bool(flow.labels))
                due = [n - len(arrival.rows) for n, arrival in zip(due, arrivals, strict=True)]
                flow.receiver.receive(arrivals, whose)
        except BaseException:
            for seat, n in zip(seats, due, strict=True):  # those that it did not come to
                seat.binding.ledger.rows.add(formed=n, dropped=n)
            raise
        if any(due):
            raise LedgerError(
                f"hook point {seats[0].binding.hook_point!r}: rows brought from the device",
                expected=f"{due[0]} more, as were selected",
                way_out="Rows were lost or counted twice: do not trust this store.",
            )

    def _arrivals(self, flow: Outflow, span: slice) -> list[Arrival]:
        finite = flow.marks[:, span].cpu() > 0
        found = []
        for i, station in enumerate(flow.stations):
            rows, good = flow.rows[i, span], finite[i]
            kept = None if bool(good.all()) else good
            rows = rows if kept is None else rows[kept.to(rows.device)]
            found.append(Arrival(self._seats.all[station].binding.sink, rows, kept))
        return found

    def _overrun(self) -> bool:
        """Whether a forward that has staged anything by now wrote over rows that were not fetched.

        It says so before it ends; the model's stream is not asked, as it may be recording.
        """
        before = None
        for _ in range(1000):  # of a second: one that was abandoned does not end, and had room
            opened, forwards, errors = self._header[Header.OPEN : Header.ERRORS + 1].tolist()
            if errors & Fault.OVERRUN:
                return True
            if not opened or before not in (None, forwards):
                return False
            before = forwards
            time.sleep(0.001)
        return False
