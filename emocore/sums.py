"""Additive sums of rows about a shift, in float64: what a Moments holds, folds rows into, and merges exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import ops, precision
from .blocks import Block
from .errors import ShapeError
from .linalg import pack_tiles, tile_count, tile_diagonal, unpack_tiles
from .precision import TILE

RUNS = 31  # of a block, whose medians set the shift
NEAR_ZERO = 0.75  # deviations that the mean of a bfloat16 column may lie from a shift of zero
PIECE_ROWS = 64  # fewest float64 rows that are summed on their own
PIECE_SUMS = 2048  # most sums [D] that the pieces of a block may take


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
        """Empty sums; exactly one of `square` and `tiles` is kept. `count` and `weight` stay on the CPU."""

        def f64(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(
            shift=f64(dim),
            count=torch.zeros((), dtype=torch.int64),
            weight=torch.zeros((), dtype=torch.float64),
            total=f64(1, dim),
            square=f64(0 if covariance else 1, dim),
            tiles=f64(tile_count(dim) if covariance else 0, TILE, TILE),
            label_count=torch.zeros(labels, dtype=torch.int64, device=device),
            label_weight=f64(labels),
            label_total=f64(labels, dim),
            label_square=f64(labels, dim),
        )

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], labels: int, covariance: bool, frozen: bool) -> Sums:
        """Sums from a copy of `tensors`; raises ShapeError for one that is missing or does not fit the others."""
        dim = tensors["shift"].numel() if "shift" in tensors else 0
        for name, like in cls.zeros(dim, labels, covariance, device="meta").tensors().items():
            t = tensors.get(name)
            if t is None or t.shape != like.shape or t.dtype != like.dtype:
                got = "nothing" if t is None else f"{list(t.shape)} {t.dtype}"
                raise ShapeError(f"state: {name}", expected=f"{list(like.shape)} {like.dtype}", got=got)
        return cls(**{f.name: tensors[f.name].clone() for f in fields(cls) if f.name != "frozen"}, frozen=frozen)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "frozen"}

    def clone(self, device: torch.device | None = None) -> Sums:
        """A copy that shares nothing, on `device`."""
        copies = {k: t.to(device if t.dim() else "cpu", copy=True) for k, t in self.tensors().items()}
        return Sums(**copies, frozen=self.frozen)

    def fold(self, block: Block) -> None:
        """Add a block, in row order. A large one freezes the shift; until then it is that of the heaviest."""
        rows, ids, weights = block
        few = len(rows) < precision.FREEZE_ROWS
        added = float(len(rows) if weights is None else weights.cumsum(0)[-1])
        if not self.frozen and (not few or added > float(self.weight)):
            self.move_shift(shift_of(rows, weights))
            self.frozen = not few
        if few:
            rows = rows.double()  # no rounding averages out, and exact sums cost little
        if precision.accumulator(rows.dtype) == torch.float32:
            self.move_shift(self.shift.float().double())  # what float32 kernels subtract
        self._add_sums(rows, None, weights, self.total, self.square)
        if len(self.tiles):
            ops.gram(rows, weights, self.shift, self.tiles)
        self.count += len(rows)
        self.weight += added
        if k := len(self.label_count):
            self._add_sums(rows, ids, weights, self.label_total, self.label_square)
            kept = ids >= 0
            at = ids[kept].long()
            self.label_count += at.bincount(minlength=k)
            self.label_weight += at.bincount(None if weights is None else weights[kept], minlength=k)

    def _add_sums(
        self, rows: Tensor, ids: Tensor | None, weights: Tensor | None, total: Tensor, square: Tensor
    ) -> None:
        # A block is summed on its own first: rounding then grows with the blocks, not with the rows.
        labels, n = len(total), len(rows)
        pieces = 1
        if rows.dtype == torch.float64:  # and as a tree, where products have no bits to spare
            most = max(1, min(n // PIECE_ROWS, PIECE_SUMS // labels))
            pieces = 1 << (most.bit_length() - 1)
            piece = torch.arange(n, device=rows.device) * pieces // n * labels
            ids = (piece if ids is None else torch.where(ids >= 0, piece + ids, -1)).int()
        sums = total.new_zeros(pieces, *total.shape)
        squares = sums.new_zeros(pieces, *square.shape)
        flat = squares.flatten(0, 1) if len(square) else None
        ops.label_sums(rows, ids, weights, self.shift, sums.flatten(0, 1), flat)
        for mine, parts in ((total, sums), (square, squares)):
            while len(parts) > 1:
                parts = parts[0::2] + parts[1::2]
            mine += parts[0]

    def move_shift(self, shift: Tensor) -> None:
        """Express the sums about another shift: exact algebra, rounded in float64."""
        d = self.shift - shift  # y about the new shift is y + d
        if int(self.count) and bool(d.any()):
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
        """Add (or take away) sums over other rows, about the better shift of the two.

        A frozen shift is better than one that is not, then the one that more weight stands behind; where neither is
        frozen, the mean of all is better still.
        """
        theirs = other.clone(self.shift.device)
        if sign > 0 and (other.frozen, float(other.weight)) > (self.frozen, float(self.weight)):
            self.move_shift(theirs.shift)
            self.frozen = other.frozen
        theirs.move_shift(self.shift)
        alone = int(self.count) == 0 or int(other.count) == 0
        mine = self.tensors()
        for name, t in theirs.tensors().items():
            if name != "shift":
                mine[name] += sign * t
        if sign < 0:
            self._clear_emptied()
        if not (alone or self.frozen) and float(self.weight) > 0:
            self.move_shift(self.mean())

    def _clear_emptied(self) -> None:
        """Leave no rounding where no row is left."""
        if int(self.count) == 0:
            for t in self.tensors().values():
                t.zero_()
            self.frozen = False
        for t in (self.label_weight, self.label_total, self.label_square):
            t[self.label_count == 0] = 0.0

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
        return self._about_shift() - torch.outer(self.total[0], self.total[0]) / self.weight

    def within(self) -> Tensor:
        """Within-label scatter [D, D] = sum w y y' - sum_k (sum_k w y)(sum_k w y)' / w_k; needs every row labelled."""
        return self._about_shift() - self._between_shift()

    def between(self) -> Tensor:
        """Between-label scatter [D, D] = sum_k w_k (mean_k - mean)(mean_k - mean)'; needs every row labelled."""
        return self._between_shift() - torch.outer(self.total[0], self.total[0]) / self.weight

    def _about_shift(self) -> Tensor:
        return unpack_tiles(self.tiles, len(self.shift))

    def _between_shift(self) -> Tensor:
        seen = self.label_weight > 0
        scaled = self.label_total[seen] / self.label_weight[seen].sqrt().unsqueeze(1)
        return scaled.T @ scaled

    def squares(self) -> Tensor:
        """Diagonal of the total scatter [D], never negative."""
        raw = tile_diagonal(self.tiles, len(self.shift)) if len(self.tiles) else self.square[0]
        return (raw - self.total[0] ** 2 / self.weight).clamp_min(0.0)

    def label_squares(self) -> Tensor:
        """Diagonal of each label's own scatter [K, D], never negative."""
        w = self.label_weight.unsqueeze(1)
        return (self.label_square - self.label_total**2 / w).clamp_min(0.0)

    def offset(self) -> float:
        """max over columns of ((mean - s)/std)^2, 0 for a constant column; infinite where a sum overflowed.

        A column whose mean square about s is under float32's smallest number has lost its squares there: it counts as
        constant, as dead dimensions of a network are.
        """
        squares = self.squares()
        moved = self.total[0] ** 2 / self.weight
        moved = moved.where(moved / self.weight > torch.finfo(torch.float32).tiny, 0.0)
        worst = torch.where(squares > 0, moved / squares, torch.where(moved > 0, moved * torch.inf, 0.0)).max()
        return float(worst) if bool(squares.isfinite().all() & moved.isfinite().all()) else float("inf")


def shift_of(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """Shift [D] from rows [N, D]: a typical value of each column, written in few bits; rows of weight 0 have no say.

    The median over runs of consecutive rows of the run's mean, so that a few huge rows cannot move it, rounded to a
    multiple of a power of two g <= std: at most std/2 away. x - s is then short too, and sums of squares of 16-bit rows
    hardly round. A constant column gives its value. bfloat16 rows, whose products are exact as they come, stay about
    zero up to NEAR_ZERO deviations.
    """
    n, dim = rows.shape
    runs = min(RUNS, 1 + n // 16)
    ids = torch.arange(n, device=rows.device) * runs // n
    first = 0
    if weights is not None and bool((weights > 0).any()):
        ids = ids.where(weights > 0, -1)
        first = int((weights > 0).long().argmax())
    base = rows[first].double()
    sums, squares = torch.zeros(2, runs, dim, dtype=torch.float64, device=rows.device)
    ops.label_sums(rows, ids.int(), None, base, sums, squares)
    size = ids[ids >= 0].bincount(minlength=runs).unsqueeze(1)
    mean = base + (sums / size).nanmedian(0).values
    variance = (squares / size - (sums / size) ** 2).clamp_min(0.0).nanmedian(0).values
    grid = torch.exp2(variance.sqrt().log2().floor())
    shift = torch.where(grid > 0, (mean / grid).round() * grid, mean)
    if rows.dtype == torch.bfloat16:
        shift = shift.where(mean**2 > NEAR_ZERO**2 * variance, 0.0)
    if precision.accumulator(rows.dtype) == torch.float32:
        shift = shift.float().double()
    return torch.where((squares == 0).all(0), base, shift)
