"""Additive sums of rows about a shift, in float64: what a Moments holds, folds rows into, and merges exactly."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import ops
from .linalg import pack_tiles, tile_count, tile_diagonal, unpack_tiles
from .precision import TILE


@dataclass
class Sums:
    """Counts and sums of y = x - s over rows x [D], and per label k.

    shift s [D]; total [1, D] = sum w y; square [1, D] = sum w y^2 (without tiles); tiles [T, 128, 128] = sum w y y',
    lower triangle; label_total, label_square [K, D]; all float64. count, label_count [K] are int64, weights float64.
    `frozen` says that the shift came from enough rows to stay.
    """

    shift: Tensor
    count: Tensor
    weight: Tensor
    total: Tensor
    square: Tensor
    tiles: Tensor
    label_count: Tensor
    label_weight: Tensor
    label_total: Tensor
    label_square: Tensor
    frozen: bool = False

    @classmethod
    def zeros(cls, dim: int, labels: int, covariance: bool, device: torch.device | str = "cpu") -> Sums:
        """Empty sums; exactly one of `square` and `tiles` is kept."""

        def f64(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(
            shift=f64(dim),
            count=torch.zeros((), dtype=torch.int64),
            weight=torch.zeros((), dtype=torch.float64),
            total=f64(1, dim),
            square=f64(0 if covariance else 1, dim),
            tiles=f64(tile_count(dim) if covariance else 0, TILE, TILE),
            label_count=torch.zeros(labels, dtype=torch.int64),
            label_weight=torch.zeros(labels, dtype=torch.float64),
            label_total=f64(labels, dim),
            label_square=f64(labels, dim),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "frozen"}

    def clone(self) -> Sums:
        """A copy that shares nothing."""
        return Sums(**{name: t.clone() for name, t in self.tensors().items()}, frozen=self.frozen)

    def fold(self, rows: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Add rows [N, D] of labels [N] (-1: none) and weights [N] (None: ones), in row order."""
        ops.label_sums(rows, None, weights, self.shift, self.total, self.square if len(self.square) else None)
        if len(self.tiles):
            ops.gram(rows, weights, self.shift, self.tiles)
        self.count += len(rows)
        self.weight += len(rows) if weights is None else weights.cumsum(0)[-1]
        k = len(self.label_count)
        if k == 0:
            return
        ops.label_sums(rows, labels, weights, self.shift, self.label_total, self.label_square)
        kept = labels[labels >= 0].long()
        self.label_count += kept.bincount(minlength=k)
        self.label_weight += kept.bincount(None if weights is None else weights[labels >= 0], minlength=k)

    def move_shift(self, shift: Tensor) -> None:
        """Express the sums about another shift: exact algebra, rounded in float64."""
        d = self.shift - shift  # y about the new shift is y + d
        if bool(d.any()):
            if len(self.tiles):
                cross = torch.outer(self.total[0], d)
                self.tiles += pack_tiles(cross + cross.T + self.weight * torch.outer(d, d))
            if len(self.square):
                self.square += 2 * self.total * d + self.weight * d * d
            w = self.label_weight.unsqueeze(1)
            self.label_square += 2 * self.label_total * d + w * d * d
            self.label_total += w * d
            self.total += self.weight * d
        self.shift = shift.clone()

    def add(self, other: Sums, sign: int = 1) -> None:
        """Add (or take away) sums over other rows, re-expressed about this shift."""
        other = other.clone()
        if int(self.count) == 0 and sign > 0:
            self.shift, self.frozen = other.shift.clone(), other.frozen
        other.move_shift(self.shift)
        theirs = other.tensors()
        for name, mine in self.tensors().items():
            if name != "shift":
                mine += sign * theirs[name]

    def relabel(self, groups: Tensor, labels: int) -> Sums:
        """The same rows under new labels: old label k becomes groups[k] [K] (-1: none)."""
        keep = groups >= 0
        new = self.clone()
        for name in ("label_count", "label_weight", "label_total", "label_square"):
            old = getattr(self, name)
            gathered = old.new_zeros(labels, *old.shape[1:])
            setattr(new, name, gathered.index_add_(0, groups[keep], old[keep]))
        return new

    # --- what the sums say; every one is free of the shift

    def mean(self) -> Tensor:
        """[D]; NaN where no row was seen."""
        return self.shift + self.total[0] / self.weight

    def label_mean(self) -> Tensor:
        """[K, D]; NaN for a label that no row had."""
        return self.shift + self.label_total / self.label_weight.unsqueeze(1)

    def scatter(self) -> Tensor:
        """Total scatter [D, D] = sum w (x - mean)(x - mean)'."""
        raw = unpack_tiles(self.tiles, len(self.shift))
        return raw - torch.outer(self.total[0], self.total[0]) / self.weight

    def within(self) -> Tensor:
        """Within-label scatter [D, D] = sum w y y' - sum_k (sum_k w y)(sum_k w y)' / w_k; needs every row labelled."""
        seen = self.label_weight > 0
        scaled = self.label_total[seen] / self.label_weight[seen].sqrt().unsqueeze(1)
        return unpack_tiles(self.tiles, len(self.shift)) - scaled.T @ scaled

    def squares(self) -> Tensor:
        """Diagonal of the total scatter [D], never negative."""
        if len(self.tiles):
            raw = tile_diagonal(self.tiles, len(self.shift))
        else:
            raw = self.square[0]
        return (raw - self.total[0] ** 2 / self.weight).clamp_min(0.0)

    def label_squares(self) -> Tensor:
        """Diagonal of each label's own scatter [K, D], never negative."""
        w = self.label_weight.unsqueeze(1)
        return (self.label_square - self.label_total**2 / w).clamp_min(0.0)


def shift_of(rows: Tensor) -> Tensor:
    """Shift [D] from rows [N, D]: their mean rounded to float32, or the value itself where a column is constant."""
    total = torch.zeros(1, rows.shape[1], dtype=torch.float64, device=rows.device)
    zero = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    ops.label_sums(rows, None, None, zero, total, None)
    mean = (total[0] / len(rows)).float().double()
    first = rows[0].double()
    return torch.where((rows == rows[0]).all(0), first, mean)
