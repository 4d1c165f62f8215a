"""Registers: the numbers that an activation store gives to sequences and requests, and the places made of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .places import COLUMNS, table
from .sinks import Whose


class Register:
    """Numbers sequences over the whole store, no two ranks alike, and requests within the shards that are open."""

    def __init__(self, sequences: int, rank: int, world: int) -> None:
        self.sequences = sequences  # numbered so far
        self.requests: dict[str, int] = {}
        self._kept = 0  # so many of the first requests
        self._rank, self._world = rank, world
        self._first: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # by batch
        self._last: tuple[Whose, Tensor] | None = None  # asked for, and answered
        self._seen: Tensor | None = None  # the places that were kept last

    def places(self, whose: Whose) -> Tensor:
        """Whose the rows are, as a table [N, 5] that nobody changes."""
        if self._last is None or self._last[0] is not whose:
            self._last = whose, self._table(whose)
        return self._last[1]

    def _table(self, whose: Whose) -> Tensor:
        sequence = None
        if whose.batch is not None:
            sequence = (self._number(whose) + whose.sequence) * self._world + self._rank
        request = None if whose.requests is None else self._requests(whose.requests)[whose.sequence]
        columns = {"sequence": sequence, "request": request, "position": whose.rank}
        return table(len(whose), **columns, token=whose.tokens, label=whose.ids)

    def given(self, n: int, requests: Sequence[str] | None, columns: Mapping[str, Tensor | None]) -> Tensor:
        """Places [n, 5] of rows whose numbers are known; sequences that come later get others."""
        sequence = columns["sequence"]
        if sequence is not None and n:
            self.sequences = max(self.sequences, int(sequence.max()) // self._world + 1)
        return table(n, request=None if requests is None else self._requests(requests), **columns)

    def keep(self, where: Tensor) -> None:
        """The rows at these places [n, 5] are stored."""
        if not self.requests or where is self._seen:
            return
        self._seen = where
        self._kept = max(self._kept, int(where[:, COLUMNS.index("request")].max()) + 1)

    def forget(self) -> None:
        """Forget requests that came last and have no stored row: where rows are dropped, there may be ever more."""
        while len(self.requests) > self._kept:
            self.requests.popitem()
            self._last = None

    def clear(self) -> None:
        """Begin the next shards, without requests."""
        self.requests.clear()
        self._kept, self._last, self._seen = 0, None, None

    def _requests(self, names: Sequence[str]) -> Tensor:
        ids = [self.requests.setdefault(str(name), len(self.requests)) for name in names]
        return torch.tensor(ids, dtype=torch.long)

    def _number(self, whose: Whose) -> int:
        """That of a batch's first sequence, the same in every forward of it and at every hook point."""
        first = self._first.get(whose.batch)
        if first is None:
            first = self._first[whose.batch] = self.sequences
            self.sequences += whose.sequences
        return first
