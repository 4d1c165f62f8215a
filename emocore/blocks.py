"""Blocks: rows gathered into blocks of a fixed number of consecutive rows, whatever the batches were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, ShapeError
from .precision import check_dtype


class Block(NamedTuple):
    """Rows [N, D], label ids [N] int32 (-1: none), weights [N] float64 or None for ones."""

    rows: Tensor
    ids: Tensor
    weights: Tensor | None

    def part(self, start: int, end: int) -> Block:
        """Rows start .. end - 1; shares their memory."""
        weights = None if self.weights is None else self.weights[start:end]
        return Block(self.rows[start:end], self.ids[start:end], weights)


class Blocks:
    """Buffer of at most `size` rows, to be written in place; grows by doubling, so that small streams stay small.

    >>> blocks = Blocks(2, torch.zeros(0, 1))
    >>> for block in blocks.append(Block(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3), None)):
    ...     block.rows.tolist()
    [[1.0], [2.0]]
    >>> len(blocks), blocks.staged().rows.tolist()
    (1, [[3.0]])
    """

    def __init__(self, size: int, like: Tensor) -> None:
        """Rows will have the width, dtype and device of `like` [0, D]."""
        self.size = size
        self._held = 0
        self._rows = like
        self._ids = like.new_empty(0, dtype=torch.int32)
        self._weights = like.new_empty(0, dtype=torch.float64)
        self._weighted = False

    def __len__(self) -> int:
        return self._held

    def room(self, wanted: int) -> Tensor:
        """Free rows [1 .. wanted, D] of the buffer to write into; `take` then says how many of them count."""
        need = min(self._held + wanted, self.size)
        if need > len(self._rows):
            grown = min(self.size, max(need, 2 * len(self._rows)))
            self._rows, self._ids, self._weights = (
                self._grow(t, grown) for t in (self._rows, self._ids, self._weights)
            )
        return self._rows[self._held : need]

    def take(self, ids: Tensor, weights: Tensor | None) -> Iterator[Block]:
        """Count the next len(ids) rows of the room, with ids and weights; yields the block that they fill, if any."""
        end = self._held + len(ids)
        self._ids[self._held : end] = ids
        if weights is not None and not self._weighted:
            self._weighted = True
            self._weights[: self._held] = 1.0
        if self._weighted:
            self._weights[self._held : end] = 1.0 if weights is None else weights
        self._held = end
        if self._held == self.size:
            yield self.staged()
            self.clear()

    def append(self, block: Block) -> Iterator[Block]:
        """Copy rows in; yields each block as it fills, valid until the next step; passes on whole blocks uncopied."""
        alike = (block.rows.dtype, block.rows.device) == (self._rows.dtype, self._rows.device)
        start = 0
        while start < len(block.rows):
            end = min(start + self.size - self._held, len(block.rows))
            part = block.part(start, end)
            if alike and end - start == self.size:
                yield part
            else:
                self.room(end - start).copy_(part.rows)
                yield from self.take(part.ids, part.weights)
            start = end

    def staged(self) -> Block:
        """What is in the buffer now; shares its memory."""
        return Block(self._rows, self._ids, self._weights if self._weighted else None).part(0, self._held)

    def clear(self) -> None:
        """Drop the rows, keep the memory."""
        self._held = 0
        self._weighted = False

    def _grow(self, old: Tensor, rows: int) -> Tensor:
        new = old.new_empty(rows, *old.shape[1:])
        new[: self._held] = old[: self._held]
        return new


def as_rows(x: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Rows [..., D] of floating point as a tensor of at least two axes, without gradient; shares memory where it may.

    Raises ArgumentError for other dtypes and ShapeError for a scalar.
    """
    if not isinstance(x, Tensor):
        x = np.asarray(x)
        if x.dtype.kind != "f" or x.dtype.itemsize > 8:
            raise ArgumentError("x: rows must be floating point", expected="float16, float32 or float64", got=x.dtype)
        # torch reads no foreign byte order and no negative strides, and warns of read-only memory
        x = torch.from_numpy(np.require(x, x.dtype.newbyteorder("="), ["C", "W"]))
    check_dtype(x.dtype)
    if x.dim() == 0:
        raise ShapeError("x", expected="rows [..., D]", got="a scalar")
    return x.detach() if x.dim() > 1 else x.detach().unsqueeze(0)
