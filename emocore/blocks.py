"""Blocks: staged rows gathered into blocks of a fixed number of consecutive rows, whatever the batches were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Rows [N, D], label ids [N] int32 (-1: none), weights [N] float64 or None for ones."""

    rows: Tensor
    ids: Tensor
    weights: Tensor | None


class Blocks:
    """Buffer of at most `size` rows; grows by doubling, so that small streams stay small."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pending = 0
        self._rows = torch.empty(0)
        self._ids = torch.empty(0, dtype=torch.int32)
        self._weights: Tensor | None = None

    def __len__(self) -> int:
        return self.pending

    def append(self, rows: Tensor, ids: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Iterator[Block]:
        """Copy rows in as `dtype`; yields each block as it fills, valid until the next step of the iterator."""
        done = 0
        while done < len(rows):
            n = min(self.size - self.pending, len(rows) - done)
            part = slice(done, done + n)
            self._put(rows[part], ids[part], None if weights is None else weights[part], dtype)
            done += n
            if self.pending == self.size:
                yield self.staged()
                self.clear()

    def staged(self) -> Block:
        """What is in the buffer now; shares its memory."""
        n = self.pending
        return Block(self._rows[:n], self._ids[:n], None if self._weights is None else self._weights[:n])

    def clear(self) -> None:
        """Drop the rows, keep the memory."""
        self.pending = 0
        self._weights = None

    def _put(self, rows: Tensor, ids: Tensor, weights: Tensor | None, dtype: torch.dtype) -> None:
        held, need = self.pending, self.pending + len(rows)
        if need > len(self._rows):
            room = min(self.size, max(need, 2 * len(self._rows)))
            grown = rows.new_empty(room, rows.shape[1], dtype=dtype)
            labels = ids.new_empty(room)
            if held:
                grown[:held], labels[:held] = self._rows[:held], self._ids[:held]
            self._rows, self._ids = grown, labels
        self._rows[held:need] = rows
        self._ids[held:need] = ids
        if weights is not None or self._weights is not None:
            ones = torch.ones(self.size, dtype=torch.float64, device=rows.device)
            old = ones if self._weights is None else self._weights
            self._weights = torch.cat([old[:held], ones[: len(rows)] if weights is None else weights])
        self.pending = need
