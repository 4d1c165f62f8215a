"""A ring of staged rows as docs/gpu.md lays it out: what the steps of the drain read and write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from emocore.linalg import tile_count, unpack_tiles
from emocore.precision import TILE, device_chain

from .machine import Machine
from .ours import step

FULL = 1 << 40  # rows committed: a block is always there to be drained


@dataclass
class Ring:
    """Blocks of rows of S hook points, staged and labelled, and the state that they are folded into."""

    machine: Machine
    block: int
    rows: Tensor
    marks: Tensor
    norms: Tensor
    labels: Tensor
    cursor: Tensor
    frozen: Tensor
    shift: Tensor
    exponent: Tensor
    y: Tensor
    order: Tensor
    starts: Tensor
    totals: Tensor
    squares: Tensor
    counts: Tensor
    tiles: Tensor
    overrange: Tensor
    norm_sum: Tensor
    norm_count: Tensor

    @classmethod
    def of(cls, machine: Machine, rows: Tensor, labels: Tensor, k: int, block: int, gram: bool = True) -> Ring:
        """Of rows [S, capacity, D] and labels [capacity] int32, about the shift 0, with empty sums."""
        s, capacity, dim = rows.shape
        parts = 2 if rows.dtype == torch.float32 else 1

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=machine.device)

        return cls(
            machine=machine,
            block=block,
            rows=rows,
            marks=torch.full((s, capacity), 2, dtype=torch.int8, device=machine.device),
            norms=rows.float().norm(dim=2),
            labels=labels,
            cursor=torch.tensor([FULL * block, 0], device=machine.device),
            frozen=torch.ones(s, dtype=torch.int32, device=machine.device),
            shift=zeros(s, dim),
            exponent=zeros(s, dim, dtype=torch.int32),
            y=zeros(s if gram else 0, parts, block, dim, dtype=torch.float16),
            order=zeros(block, dtype=torch.int32),
            starts=zeros(k + 2, dtype=torch.int32),
            totals=zeros(s, k + 1, dim),
            squares=zeros(s, k + 1, dim),
            counts=zeros(s, k + 1, dtype=torch.int64),
            tiles=zeros(s, tile_count(dim) if gram else 0, TILE, TILE),
            overrange=zeros(s, dtype=torch.int64),
            norm_sum=zeros(s),
            norm_count=zeros(s, dtype=torch.int64),
        )

    def clear(self) -> None:
        """Empty sums, the first block next, and NaN or nonsense in what a step must overwrite."""
        for sums in (
            self.totals,
            self.squares,
            self.counts,
            self.tiles,
            self.norm_sum,
            self.norm_count,
            self.overrange,
        ):
            sums.zero_()
        self.cursor[1] = 0
        self.y.fill_(torch.nan)
        self.order.fill_(-1)
        self.starts.fill_(-1)

    def freeze(self) -> None:
        at = (self.rows, self.marks, self.cursor, self.block)
        step(self.machine, "freeze")(*at, self.frozen, self.shift, self.exponent)

    def convert(self) -> None:
        at = (self.rows, self.marks, self.cursor, self.block)
        step(self.machine, "convert")(*at, self.shift, self.exponent, self.y, self.overrange)

    def fold_gram(self) -> None:
        step(self.machine, "fold_gram")(self.y, self.cursor, self.block, self.exponent, self.tiles, self.chain)

    @property
    def chain(self) -> int:
        """Rows that a tensor core sums in float32."""
        return device_chain(self.rows.dtype)

    def sort_labels(self) -> None:
        step(self.machine, "sort_labels")(self.labels, self.cursor, self.block, self.order, self.starts)

    def fold_labels(self) -> None:
        at = (self.rows, self.marks, self.cursor, self.block, self.order, self.starts)
        step(self.machine, "fold_labels")(*at, self.shift, self.totals, self.squares, self.counts)

    def settle(self) -> None:
        at = (self.norms, self.marks, self.cursor, self.block)
        step(self.machine, "settle")(*at, self.frozen, self.norm_sum, self.norm_count)

    def drain(self) -> None:
        """The whole drain of one block; the next block is next."""
        self.freeze()
        if len(self.y):
            self.convert()
            self.fold_gram()
        self.sort_labels()
        self.fold_labels()
        self.settle()

    def scatter(self, s: int = 0) -> Tensor:
        """Sum of y y' [D, D] float64 of a hook point."""
        return unpack_tiles(self.tiles[s], self.rows.shape[2])
