"""Outflows: rows of hook points on their way from the device to a store, in a ring that a courier empties."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .control import PLACE_WIDTH, Station
from .sinks import Whose

LEAST = 64 << 20  # bytes of rows that a ring holds at least
RUN = 1 << 20  # bytes of one hook point that are worth a copy: the link is slow with less


class Arrival(NamedTuple):
    """Rows [N, D] that have come for a sink; `kept` [n] says which of the n places given with them are theirs."""

    sink: Any
    rows: Tensor
    kept: Tensor | None


class Receiver(Protocol):
    """What takes rows of many hook points at once: an activation store. It is held by its `lock` while it is given any.

    `waits` says whether a forward waits for room, or its rows are dropped.
    """

    lock: threading.RLock

    @property
    def waits(self) -> bool: ...

    def receive(self, arrivals: Sequence[Arrival], whose: Sequence[Whose]) -> None:
        """Take finite rows of whole forwards and count them: all are formed, those it did not get to are dropped."""

    def settle(self) -> None:
        """No forward is half handed over."""

    def discard(self) -> None:
        """Drop what is pending: it is not to be trusted."""


class Outflow:
    """Rows of S hook points that advance in step: row n since the capture began stands at n % capacity.

    rows [S, capacity, D], marks [S, capacity] int8, norms [S, capacity] float32 as in a group; places [capacity, 8]
    int32: whose they are (control.Place); cursor [2]: rows committed, and rows fetched as far as the device was told.
    The host counts positions that were begun, of which at most as many rows come.
    """

    def __init__(
        self, stations: Sequence[int], rule: int, labels: tuple[str, ...], receiver: Receiver, line: int, cursor: Tensor
    ) -> None:
        self.stations, self.rule, self.labels, self.receiver = tuple(stations), rule, labels, receiver
        self.line, self.cursor = line, cursor  # its number among the cursors of the capture
        self._at = torch.tensor(self.stations, device=cursor.device)
        self._before = torch.zeros_like(cursor[0])
        self._selected, self._dropped = torch.zeros(2, *self._at.shape, dtype=torch.int64, device=cursor.device)
        self.noted = False  # what a commit does is to be undone
        self.capacity = 0
        self.begun = self.ended = 0  # positions, of all forwards and of those that are not open
        self.published = 0  # `ended` at the last count that was asked for
        self.fetched = self.told = 0  # rows, by the courier and as the device knows
        self.known = (0, 0)  # rows committed in the last count that came back, `ended` then
        self.recorded = 0  # positions of the largest forward that was recorded into a graph
        self.dropping = False  # the open forward finds no room

    # --- memory

    def reserve(self, positions: int, like: Tensor) -> None:
        """A ring for rows like [N, D], two forwards of so many positions at least; nothing may wait in the old one."""
        s, dim = len(self.stations), like.shape[1]
        each = dim * like.element_size()
        capacity = max(2 * positions, LEAST // (s * each))
        made = (  # all or none
            like.new_zeros(s, capacity, dim),
            like.new_zeros(s, capacity, dtype=torch.int8),
            like.new_zeros(s, capacity, dtype=torch.float32),
            like.new_zeros(capacity, PLACE_WIDTH, dtype=torch.int32),
        )
        self.rows, self.marks, self.norms, self.places = made
        self.capacity, self.unit = capacity, min(max(RUN // each, 1), capacity // 2)  # rows worth a copy
        self._scrap: tuple[Tensor, Tensor, Tensor] | None = None

    def room(self, index: int, positions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the rows, marks and norms of hook point `index` go in the open forward of so many positions."""
        own = self.rows[index], self.marks[index], self.norms[index]
        if not self.dropping:
            return own
        if self._scrap is None or len(self._scrap[0]) < positions:  # shared by all: nobody reads it
            rows, marks, norms = (t.new_zeros(positions, *t.shape[1:]) for t in own)
            self._scrap = rows, marks, norms
        return self._scrap

    def holds(self, positions: int) -> bool:
        """Whether the ring is large enough for forwards of so many positions."""
        return 2 * positions <= self.capacity

    def fits(self, positions: int) -> bool:
        """Whether a forward of so many positions writes over nothing, whatever the forwards before it kept."""
        committed, ended = self.known
        return committed + self.begun - ended + positions <= self.fetched + self.capacity

    def tell(self) -> None:
        """Let the device know what was fetched: it sets Fault.OVERRUN where a forward had no room after all."""
        if self.told != self.fetched:
            self.told = self.fetched
            self.cursor[1:].fill_(self.told)

    # --- a forward that finds no room

    def note(self, words: Tensor) -> None:
        """Before the commit: where cursor and stations [.., 16] stand."""
        self._before.copy_(self.cursor[0])
        torch.index_select(words[:, Station.SELECTED], 0, self._at, out=self._selected)
        torch.index_select(words[:, Station.DROPPED], 0, self._at, out=self._dropped)
        self.noted = True

    def drop(self, words: Tensor) -> None:
        """After it: the rows that it has selected are dropped, and take no place. Twice is as once."""
        now = words[:, Station.SELECTED].index_select(0, self._at)
        words[:, Station.DROPPED].index_copy_(0, self._at, self._dropped + now - self._selected)
        self.cursor[0].copy_(self._before)
        self.noted = False

    # --- for the courier

    def spans(self, committed: int) -> Iterator[slice]:
        """Where in the ring the rows stand that were committed and not fetched."""
        start, count = self.fetched % max(self.capacity, 1), committed - self.fetched
        first = min(count, self.capacity - start)
        for begin, length in ((start, first), (0, count - first)):
            if length:
                yield slice(begin, begin + length)
