"""Pools: the selected tokens of each sequence of a batch, over one or many forwards, made into one row a sequence.

`Pool` is given gathered rows; `DevicePool` takes whole forwards as they are and asks the device only when it closes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops


class Pooled(NamedTuple):
    """rows [M, D] float32 of sequences [M]; token norms [n], or their sum and number; how many sequences gave no row,
    and why; how many sequences there are."""

    rows: Tensor
    sequence: Tensor
    norms: Tensor
    too_short: int
    nonfinite: int
    overrange: int
    norm_sum: float = 0.0
    norm_count: int = 0
    sequences: int = 0


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
            sequences=self.sequences,
        )


class DevicePool:
    """As Pool, over the positions [N] of whole forwards, in memory on the device that stays where it is.

    What a forward brings waits until it is committed. sums [B, D] float64: the sum, the last or the largest; words
    [B, 4] float64: tokens, bad ones, the sum of the norms that count and their number.
    """

    TOKENS, BAD, NORM, NORMS = range(4)

    def __init__(self, kind: str, sequences: int, dim: int, device: torch.device) -> None:
        self.kind, self.sequences = kind, sequences
        start = -torch.inf if kind == "max" else 0.0
        self._empty = torch.full((1, dim), start, dtype=torch.float64, device=device)
        self._sums, self._new = self._empty.repeat(sequences, 1), self._empty.repeat(sequences, 1)
        self._words, self._new_words = torch.zeros(2, sequences, 4, dtype=torch.float64, device=device)
        self._zero = torch.zeros(dim, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Forget every sequence."""
        self._sums.copy_(self._empty)
        self._words.zero_()

    def stage(self, x: Tensor, keep: Tensor, sequence: Tensor, counted: Tensor) -> Tensor:
        """Take the kept positions of x [N, D]; sequence [N], and whether a position's norm counts [N].

        Returns how many of them are not finite [].
        """
        good = keep & torch.isfinite(x).all(1)
        bad = keep & ~good
        labels = torch.where(good, sequence, -1).int()
        norms = torch.where(good & counted, torch.linalg.vector_norm(x, dim=1, dtype=torch.float64), 0.0)
        words = torch.stack([good, bad, norms, good & counted], 1).double()
        at = torch.where(keep, sequence, 0).int()
        self._new_words.zero_()
        ops.label_sums(words, at, None, self._zero.new_zeros(4), self._new_words, None)
        self._new.copy_(self._empty)
        if self.kind == "mean":
            ops.label_sums(x, labels, None, self._zero, self._new, None)
            return bad.sum()
        place = torch.where(good, sequence, self.sequences).long()  # one place more, for what is not kept
        room = torch.cat([self._new, self._empty])
        if self.kind == "max":
            room.scatter_reduce_(0, place.unsqueeze(1).expand(x.shape), x.double(), "amax")
        else:
            last = place.new_full((self.sequences + 1,), -1)
            last.scatter_reduce_(0, place, torch.arange(len(x), device=x.device), "amax")
            room = torch.where((last >= 0).unsqueeze(1), x[last.clamp_min(0)].double(), 0.0)
        self._new.copy_(room[:-1])
        return bad.sum()

    def commit(self, whole: Tensor) -> None:
        """Keep what the last forward brought, where `whole` is 1 and not 0."""
        if self.kind == "mean":
            added = self._sums + self._new
        elif self.kind == "max":
            added = self._sums.maximum(self._new)
        else:
            added = torch.where(self._new_words[:, :1] > 0, self._new, self._sums)
        self._sums.copy_(torch.where(whole > 0, added, self._sums))
        self._words.add_(self._new_words * whole)

    def close(self, sequences: int) -> Pooled:
        """One float32 row for every one of the first `sequences` that has tokens, no bad one, and fits float32."""
        words = self._words[:sequences].cpu()
        tokens, bad = words[:, self.TOKENS], words[:, self.BAD] > 0
        good = (tokens > 0) & ~bad
        rows = self._sums[:sequences]
        if self.kind == "mean":
            rows = rows / self._words[:sequences, :1].clamp_min(1.0)
        rows = rows.float()
        fits = rows.isfinite().all(1).cpu() | ~good
        kept = good & fits
        return Pooled(
            rows=rows[kept.to(rows.device)],
            sequence=kept.nonzero().squeeze(1),
            norms=torch.zeros(0, dtype=torch.float64),
            too_short=int(((tokens == 0) & ~bad).sum()),
            nonfinite=int(bad.sum()),
            overrange=int((~fits).sum()),
            norm_sum=float(words[kept, self.NORM].sum()),
            norm_count=int(words[kept, self.NORMS].sum()),
            sequences=sequences,
        )
