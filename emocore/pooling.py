"""Pools: the selected tokens of each sequence of a batch, over one or many forwards, made into one row a sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops


class Pooled(NamedTuple):
    """rows [M, D] float32 of sequences [M]; token norms [n]; how many sequences gave no row, and why."""

    rows: Tensor
    sequence: Tensor
    norms: Tensor
    too_short: int
    nonfinite: int
    overrange: int


class Pool:
    """Running "mean" (float64 sums), "last" or "max" over the tokens of `sequences` sequences of width `dim`."""

    def __init__(self, kind: str, sequences: int, dim: int, device: torch.device) -> None:
        self.kind, self.sequences = kind, sequences
        start = -torch.inf if kind == "max" else 0.0
        self._state = torch.full((sequences, dim), start, dtype=torch.float64, device=device)
        self._count = torch.zeros(sequences, dtype=torch.int64)
        self._bad = torch.zeros(sequences, dtype=torch.bool)
        self._norms: list[tuple[Tensor, Tensor]] = []

    def add(self, rows: Tensor, sequence: Tensor, finite: Tensor, norms: Tensor, counted: Tensor) -> None:
        """Add token rows [N, D] of their sequences [N], in the order shown; one bad token quarantines the whole row."""
        self._bad[sequence[~finite]] = True
        rows, at = rows[finite.to(rows.device)], sequence[finite]
        shown = at.bincount(minlength=self.sequences)
        self._count += shown
        self._norms.append((norms[counted & finite], sequence[counted & finite]))
        at = at.to(rows.device)
        if self.kind == "mean":
            zero = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
            ops.label_sums(rows, at.int(), None, zero, self._state, None)
        elif self.kind == "max":
            self._state.scatter_reduce_(0, at.unsqueeze(1).expand(rows.shape), rows.double(), "amax")
        else:
            last = torch.zeros(self.sequences, dtype=torch.long, device=rows.device)
            last.scatter_reduce_(0, at, torch.arange(len(at), device=rows.device), "amax")
            new = shown.to(rows.device) > 0
            self._state[new] = rows[last[new]].double()

    def close(self) -> Pooled:
        """One float32 row for every sequence that has tokens, no bad one among them, and fits float32."""
        good = (self._count > 0) & ~self._bad
        rows = self._state
        if self.kind == "mean":
            rows = rows / self._count.clamp_min(1).unsqueeze(1).to(rows.device)
        rows = rows.float()
        fits = rows.isfinite().all(1).cpu() | ~good
        kept = good & fits
        norms = [norms[kept[sequence]] for norms, sequence in self._norms]
        return Pooled(
            rows=rows[kept.to(rows.device)],
            sequence=kept.nonzero().squeeze(1),
            norms=torch.cat(norms) if norms else torch.zeros(0, dtype=torch.float64),
            too_short=int(((self._count == 0) & ~self._bad).sum()),
            nonfinite=int(self._bad.sum()),
            overrange=int((~fits).sum()),
        )
