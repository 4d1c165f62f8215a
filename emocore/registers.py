"""Registers: the numbers that an activation store gives to sequences and requests, and the places made of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .places import COLUMNS, table
from .sinks import Observed


class Register:
    """Numbers sequences over the whole store, no two ranks alike, and requests within the shards that are open."""

    def __init__(self, sequences: int, rank: int, world: int) -> None:
        self.sequences = sequences  # numbered so far
        self.requests: dict[str, int] = {}
        self._kept = 0  # so many of the first requests
        self._rank, self._world = rank, world
        self._first: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # by batch

    def places(self, observed: Observed) -> Tensor:
        """Whose the rows are, as a table [N, 5]."""
        sequence = None
        if observed.batch is not None:
            sequence = (self._number(observed) + observed.sequence) * self._world + self._rank
        request = None if observed.requests is None else self._requests(observed.requests)[observed.sequence]
        columns = {"sequence": sequence, "request": request, "position": observed.rank}
        return table(len(observed.rows), **columns, token=observed.tokens, label=observed.ids)

    def given(self, n: int, requests: Sequence[str] | None, columns: Mapping[str, Tensor | None]) -> Tensor:
        """Places [n, 5] of rows whose numbers are known; sequences that come later get others."""
        sequence = columns["sequence"]
        if sequence is not None and n:
            self.sequences = max(self.sequences, int(sequence.max()) // self._world + 1)
        return table(n, request=None if requests is None else self._requests(requests), **columns)

    def keep(self, where: Tensor) -> None:
        """The rows at these places [n, 5] are stored."""
        self._kept = max(self._kept, int(where[:, COLUMNS.index("request")].max()) + 1)

    def forget(self) -> None:
        """Forget requests that came last and have no stored row: where rows are dropped, there may be ever more."""
        while len(self.requests) > self._kept:
            self.requests.popitem()

    def clear(self) -> None:
        """Begin the next shards, without requests."""
        self.requests.clear()
        self._kept = 0

    def _requests(self, names: Sequence[str]) -> Tensor:
        ids = [self.requests.setdefault(str(name), len(self.requests)) for name in names]
        return torch.tensor(ids, dtype=torch.long)

    def _number(self, observed: Observed) -> int:
        """That of a batch's first sequence, the same in every forward of it and at every hook point."""
        first = self._first.get(observed.batch)
        if first is None:
            first = self._first[observed.batch] = self.sequences
            self.sequences += observed.sequences
        return first
