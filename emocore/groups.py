"""Groups: the fixed memory of hook points that advance in step, and its drain into float64 (docs/gpu.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .linalg import tile_count
from .precision import TILE, device_chain
from .sums import Sums

WORKSPACE = 1 << 30  # most bytes of converted rows at once


class Taken(NamedTuple):
    """What a hook point of a group held: whole blocks as sums; later rows with label ids and the norms that count."""

    sums: Sums
    norm_sum: float
    norm_count: int
    overrange: int
    rows: Tensor
    ids: Tensor
    norms: Tensor


class Group:
    """Rows of S hook points of one width, dtype, token rule and labels; see the table in docs/gpu.md."""

    def __init__(
        self, stations: Sequence[int], labels: int, covariance: bool, block: int, cursor: Tensor, dim: int, like: Tensor
    ) -> None:
        self.stations, self.labels, self.covariance, self.block = tuple(stations), labels, covariance, block
        self.cursor, self.dim, self.dtype, self.device = cursor, dim, like.dtype, like.device
        s, k, self.capacity = len(stations), labels, 0

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.rows = zeros(s, 0, dim, dtype=like.dtype)
        self.marks = zeros(s, 0, dtype=torch.int8)
        self.norms = zeros(s, 0, dtype=torch.float32)
        self.label_ids = zeros(0, dtype=torch.int32)
        self.frozen = zeros(s, dtype=torch.int32)
        self.shift = zeros(s, dim, dtype=torch.float64)
        self.exponent = zeros(s, dim, dtype=torch.int32)
        self.order = zeros(block, dtype=torch.int32)
        self.starts = zeros(k + 2, dtype=torch.int32)
        self.totals = zeros(s, k + 1, dim, dtype=torch.float64)
        self.squares = zeros(s, k + 1, dim, dtype=torch.float64)
        self.counts = zeros(s, k + 1, dtype=torch.int64)
        self.tiles = zeros(s, tile_count(dim) if covariance else 0, TILE, TILE, dtype=torch.float64)
        self.overrange = zeros(s, dtype=torch.int64)
        self.norm_sum = zeros(s, dtype=torch.float64)
        self.norm_count = zeros(s, dtype=torch.int64)
        parts = 2 if like.dtype == torch.float32 else 1
        self._abreast = min(s, max(1, WORKSPACE // (2 * parts * block * dim)))  # hook points converted at once
        self.y = zeros(self._abreast if covariance else 0, parts, block, dim, dtype=torch.float16)

    def room_for(self, positions: int) -> int:
        """Rows the ring needs for a forward of so many positions beside a block that is nearly full."""
        return -(-(self.block - 1 + positions) // self.block) * self.block

    def reserve(self, positions: int) -> None:
        """Make that room; what waits in the ring is kept."""
        capacity = self.room_for(positions)
        waiting = self.cursor[1] + torch.arange(self.block, device=self.device)
        grown = {}
        for name in ("rows", "marks", "norms", "label_ids"):
            old = getattr(self, name)
            shape = (capacity, *old.shape[1:]) if old.dim() == 1 else (old.shape[0], capacity, *old.shape[2:])
            new = old.new_full(shape, -1) if name == "label_ids" else old.new_zeros(shape)
            if self.capacity:
                axis = old.dim() > 1
                kept = old.index_select(int(axis), waiting % self.capacity)
                new.index_copy_(int(axis), waiting % capacity, kept)
            grown[name] = new
        for name, new in grown.items():
            setattr(self, name, new)
        self.capacity = capacity

    def most_blocks(self, positions: int) -> int:
        """How many blocks a forward of so many positions can fill at most."""
        return (self.block - 1 + positions) // self.block

    def drain(self) -> None:
        """Fold one block of every hook point, if it is full; the device knows."""

        def step(name: str, *args: object) -> None:
            ops.step(name, self.device)(*args)

        cursor, block = self.cursor, self.block
        step("freeze", self.rows, self.marks, cursor, block, self.frozen, self.shift, self.exponent)
        for start in range(0, len(self.stations) if self.covariance else 0, self._abreast):
            part = slice(start, start + self._abreast)
            y = self.y[: len(self.shift[part])]
            step(
                "convert",
                self.rows[part],
                self.marks[part],
                cursor,
                block,
                self.shift[part],
                self.exponent[part],
                y,
                self.overrange[part],
            )
            step("fold_gram", y, cursor, block, self.exponent[part], self.tiles[part], device_chain(self.dtype))
        step("sort_labels", self.label_ids, cursor, block, self.order, self.starts)
        step(
            "fold_labels",
            self.rows,
            self.marks,
            cursor,
            block,
            self.order,
            self.starts,
            self.shift,
            self.totals,
            self.squares,
            self.counts,
        )
        step("settle", self.norms, self.marks, cursor, block, self.frozen, self.norm_sum, self.norm_count)

    def take(self, committed: int, drained: int) -> list[Taken]:
        """Hand over all that was committed and hold nothing: sums of whole blocks, and the rows that wait."""
        ring = torch.arange(drained, committed, device=self.device) % max(self.capacity, 1)
        ids = self.label_ids[ring]
        norm_sum, norm_count, overrange = self.norm_sum.tolist(), self.norm_count.tolist(), self.overrange.tolist()
        found = []
        for s in range(len(self.stations)):
            marks = self.marks[s, ring]
            alive = marks > 0
            rows, norms = self.rows[s, ring], self.norms[s, ring]
            sums = self._sums(s)
            found.append(
                Taken(
                    sums, norm_sum[s], norm_count[s], overrange[s], rows[alive], ids[alive], norms[marks > 1].double()
                )
            )
        for held in (
            self.totals,
            self.squares,
            self.counts,
            self.tiles,
            self.overrange,
            self.norm_sum,
            self.norm_count,
        ):
            held.zero_()
        self.cursor[1].copy_(self.cursor[0])
        return found

    def _sums(self, s: int) -> Sums:
        k, count = self.labels, self.counts[s]
        one = Sums.zeros(self.dim, k, self.covariance, self.device)
        one.shift = self.shift[s].clone()
        one.count = count.sum().cpu()
        one.weight = one.count.double()
        one.total = self.totals[s].sum(0, keepdim=True)
        one.square = one.square if self.covariance else self.squares[s].sum(0, keepdim=True)
        one.tiles = self.tiles[s].clone()
        one.label_count, one.label_weight = count[:k].clone(), count[:k].double()
        one.label_total, one.label_square = self.totals[s, :k].clone(), self.squares[s, :k].clone()
        one.frozen = int(one.count) > 0
        return one
