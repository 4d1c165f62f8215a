"""Pools: the selected tokens of each sequence of a batch, over one or many forwards, made into one row a sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops


class Pooled(NamedTuple):
    """rows [M, D] float32 of sequences [M]; token norms [n]; how many sequences were too short or held a non-finite token."""

    rows: Tensor
    sequence: Tensor
    norms: Tensor
    too_short: int
    nonfinite: int


class Pool:
    """Running "mean" (float64 sums), "last" or "max" over the tokens of `sequences` sequences of width `dim`."""

    def __init__(self, kind: str, sequences: int, dim: int, device: torch.device) -> None:
        self.kind = kind
        start = -torch.inf if kind == "max" else 0.0
        self._state = torch.full((sequences, dim), start, dtype=torch.float64, device=device)
        self._count = torch.zeros(sequences, dtype=torch.int64)
        self._bad = torch.zeros(sequences, dtype=torch.bool)
        self._norms: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, sequence: Tensor, finite: Tensor, norms: Tensor, counted: Tensor) -> None:
        """Add token rows [N, D] of their sequences [N], in the order shown; one bad token quarantines its whole row."""
        self._bad[sequence[~finite]] = True
        rows, at = rows[finite.to(rows.device)], sequence[finite]
        self._count += at.bincount(minlength=len(self._count))
        self._norms.append((norms[counted & finite], sequence[counted & finite]))
        at = at.to(rows.device)
        if self.kind == "mean":
            zero = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            ops.label_sums(rows, at.int(), None, zero, self._state, None)
        elif self.kind == "max":
            self._state.index_reduce_(0, at, rows.double(), "amax")
        else:
            last = torch.zeros(len(self._count), dtype=torch.long, device=rows.device)
            last.scatter_reduce_(0, at, torch.arange(len(at), device=rows.device), "amax")
            shown = at.unique()
            self._state[shown] = rows[last[shown]].double()

    def close(self) -> Pooled:
        """One float32 row for every sequence that has tokens and no bad one."""
        good = (self._count > 0) & ~self._bad
        at = good.nonzero().squeeze(1)
        rows = self._state[at.to(self._state.device)]
        if self.kind == "mean":
            rows = rows / self._count[at].unsqueeze(1).to(rows.device)
        kept = [norms[good[sequence]] for norms, sequence in self._norms]
        return Pooled(
            rows=rows.float(),
            sequence=at,
            norms=torch.cat(kept) if kept else torch.zeros(0, dtype=torch.float64),
            too_short=int(((self._count == 0) & ~self._bad).sum()),
            nonfinite=int(self._bad.sum()),
        )
