"""Moments: count, mean, per-label mean and full covariance of a stream of rows, exactly enough to trust."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops, precision
from .blocks import Block, Blocks
from .errors import ArgumentError, FitError, LabelError, PrecisionError, PrecisionWarning, ShapeError
from .labels import Labels, encode_labels, label_names, spread_labels
from .ledger import Ledger
from .linalg import shrink
from .sums import Sums, shift_of
from .tokens import Tokens


class Moments:
    """Mutable, mergeable, resumable statistics of rows [N, D]; width, device and dtype are inferred at the first row.

    `labels` (names, or a count) keeps a mean and a variance per label; `covariance` keeps the full [D, D] scatter, without
    it the cost is O(K D). Rows are staged and folded in blocks of `block_rows` consecutive rows, so results are bitwise the
    same for any batch boundaries and thread counts. `strict` turns precision warnings into PrecisionError.

    >>> m = Moments(labels=["calm", "sad"], covariance=True)
    >>> m.update(torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]]), labels=["calm", "calm", "sad"])
    >>> m.count, m.mean.tolist(), m.label_mean.tolist()
    (3, [3.0, 3.0], [[2.0, 2.0], [5.0, 5.0]])
    >>> m.covariance(ddof=0).diag().tolist()
    [2.6666666666666665, 2.0]
    """

    def __init__(
        self,
        labels: int | Sequence[str] | None = None,
        covariance: bool = False,
        *,
        dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        block_rows: int = precision.BLOCK_ROWS,
        strict: bool = False,
    ) -> None:
        if block_rows < precision.FREEZE_ROWS or block_rows % precision.CHAIN:
            raise ArgumentError(
                "block_rows",
                expected=f"a multiple of {precision.CHAIN}, at least {precision.FREEZE_ROWS}",
                got=block_rows,
            )
        self.labels = label_names(labels)
        self.keeps_covariance = bool(covariance)
        self.block_rows = block_rows
        self.strict = strict
        self.tokens: Tokens | None = None
        self.ledger = Ledger()
        self._dtype = None if dtype is None else precision.check_dtype(dtype, "dtype")
        self._device = None if device is None else torch.device(device)
        self._sums: Sums | None = None
        self._read: Sums | None = None
        self._clear()
        if dim is not None:
            self._sums = self._zeros(dim)

    def _clear(self) -> None:
        self._blocks = Blocks(self.block_rows)
        self._norm_sum = torch.zeros(1, dtype=torch.float64)
        self._norm_count = 0

    def _zeros(self, dim: int) -> Sums:
        return Sums.zeros(dim, len(self.labels), self.keeps_covariance, self._device or "cpu")

    # --- accumulate

    def update(
        self, x: Tensor | np.ndarray[Any, Any], labels: Labels | None = None, weights: Tensor | None = None
    ) -> None:
        """Add rows x [..., D], with `labels` one a row or one a leading index, and `weights` >= 0 of the rows' shape.

        A row with a NaN or Inf is left out and counted in `ledger.rows.nonfinite`. Raises ShapeError, LabelError or
        ArgumentError before anything is accumulated.
        """
        x = self._checked(x)
        flat = x.reshape(-1, x.shape[-1])
        ids = self._ids_of(labels, x.shape[:-1])
        if weights is not None:
            weights = weights.detach().to("cpu", torch.float64).reshape(-1)
            if len(weights) != len(flat) or not bool((weights.isfinite() & (weights >= 0)).all()):
                raise ArgumentError("weights", expected=f"{len(flat)} finite values >= 0", got=weights[:8])
        rows = flat.new_empty(flat.shape, dtype=self._row_dtype(flat.dtype))
        norms = flat.new_empty(len(flat), dtype=torch.float64)
        finite = flat.new_empty(len(flat), dtype=torch.bool)
        ops.stage(flat, None, rows, norms, finite)
        bad = len(flat) - int(finite.sum())
        if bad:
            rows, norms, ids = rows[finite], norms[finite], ids[finite.cpu()]
            weights = None if weights is None else weights[finite.cpu()]
        self.ledger.rows.add(formed=len(flat), nonfinite=bad)
        self.absorb(rows, ids, norms, weights)

    def absorb(
        self, rows: Tensor, ids: Tensor | None, norms: Tensor, weights: Tensor | None = None
    ) -> None:
        """Add rows [N, D] already staged: finite, formed in the ledger, of label ids [N] and token norms (any number)."""
        dtype, sums = self._start(rows)
        self._norm_sum = torch.cat([self._norm_sum, norms.cpu()]).cumsum(0)[-1:]  # in order: the same for any split
        self._norm_count += len(norms)
        ids = torch.full((len(rows),), -1, dtype=torch.int32) if ids is None else ids
        self.ledger.rows.add(accumulated=len(rows))
        weights = None if weights is None else weights.to(rows.device)
        for block in self._blocks.append(rows, ids.to(rows.device), weights, dtype):
            _fold(sums, block)
        self._read = None

    def _checked(self, x: Tensor | np.ndarray[Any, Any]) -> Tensor:
        x = x if isinstance(x, Tensor) else torch.tensor(np.asarray(x))
        if x.dim() < 1:
            raise ShapeError("x", expected="rows [..., D]", got="a scalar")
        precision.check_dtype(x.dtype)
        self._check_width(x.shape[-1])
        return x.detach()

    def _check_width(self, dim: int) -> None:
        if dim < 1 or (self._sums is not None and dim != self.dim):
            raise ShapeError(
                "x: width", expected=f"D = {self.dim}" if self._sums is not None else "D >= 1", got=dim
            )

    def _ids_of(self, labels: Labels | None, shape: Sequence[int]) -> Tensor:
        if labels is None:
            return torch.full((int(np.prod(shape)),), -1, dtype=torch.int32)
        if not self.labels:
            raise LabelError("labels: this Moments keeps none", way_out="Construct it with Moments(labels=...).")
        return spread_labels(encode_labels(labels, self.labels), shape)

    def _row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype the rows are held in: the first rows' own; float16 as float32, pooled rows as float64."""
        if self._dtype is not None:
            if torch.promote_types(dtype, self._dtype) != self._dtype:
                raise ArgumentError(
                    "x: dtype",
                    expected=f"{self._dtype} or narrower, like the first rows",
                    got=dtype,
                    way_out="Construct it with Moments(dtype=torch.float64) to take both.",
                )
            return self._dtype
        if self.tokens is not None and self.tokens.pool is not None:
            return torch.float64
        return torch.float32 if dtype == torch.float16 else dtype

    def _start(self, rows: Tensor) -> tuple[torch.dtype, Sums]:
        self._check_width(rows.shape[-1])
        self._dtype = self._row_dtype(rows.dtype)
        if self._device is None:
            self._device = rows.device
        if self._sums is None:
            self._sums = self._zeros(rows.shape[-1])
        return self._dtype, self._sums

    def _flush(self) -> Sums:
        """Fold what is staged for good: a split point of the summation tree."""
        sums = self._view()
        self._sums, self._read = sums, None
        self._blocks.clear()
        return sums

    def _view(self) -> Sums:
        """The sums over every row so far; staged rows are folded into a copy, kept until the next update."""
        if self._sums is None:
            raise FitError("Moments: no row was seen", way_out="Call update, or capture with it, first.")
        if not len(self._blocks):
            return self._sums
        if self._read is None:
            self._read = self._sums.clone()
            _fold(self._read, self._blocks.staged())
        return self._read

    def _filled(self) -> Sums:
        sums = self._view()
        if float(sums.weight) <= 0:
            raise FitError("Moments: no row was seen", way_out="Call update, or capture with it, first.")
        return sums

    # --- combine

    def merge(self, other: Moments) -> None:
        """Add the rows that `other` has seen, exactly; `other` is left as it was.

        Raises ShapeError or LabelError where widths, labels, covariance or token rules differ.
        """
        self._combine(other, 1)
        self.ledger.merge(other.ledger)

    def subtract(self, other: Moments) -> None:
        """Take away the rows of `other`, merged or seen before: inverts `merge` to rounding."""
        self._combine(other, -1)
        self.ledger.subtract(other.ledger)

    def _combine(self, other: Moments, sign: int) -> None:
        if other is self:
            raise ArgumentError("other: a Moments cannot be combined with itself", way_out="Merge a copy.")
        if other.labels != self.labels:
            raise LabelError("other: labels differ", expected=self.labels, got=other.labels, way_out="Use relabel first.")
        if other.keeps_covariance != self.keeps_covariance:
            raise ArgumentError(
                "other: covariance", expected=self.keeps_covariance, got=other.keeps_covariance
            )
        if other._sums is None:
            return
        if self._sums is None:
            if sign > 0:
                self.tokens = other.tokens
            self._dtype, self._device = other._dtype, other._device
            self._sums = self._zeros(other.dim)
        self._check_width(other.dim)
        if other.tokens != self.tokens:
            raise ArgumentError("other: token rule", expected=self.tokens, got=other.tokens)
        self._flush().add(other._view(), sign)
        self._norm_sum = self._norm_sum + sign * other._norm_sum
        self._norm_count += sign * other._norm_count

    def reset(self) -> None:
        """Forget every row; labels, width, dtype and token rule stay."""
        if self._sums is not None:
            self._sums = self._zeros(self.dim)
        self._read = None
        self.ledger = Ledger()
        self._clear()

    def copy(self) -> Moments:
        """An independent copy."""
        return copy.deepcopy(self)

    def relabel(self, mapping: Mapping[str, str | None]) -> Moments:
        """The same rows under coarser labels: {old: new, or None for unlabelled}, exactly; every old label must be named."""
        missing = [name for name in self.labels if name not in mapping]
        if missing:
            raise LabelError("mapping: labels left out", got=missing[:8], way_out="Map them to None to drop them.")
        names = tuple(dict.fromkeys(new for old in self.labels if (new := mapping[old]) is not None))
        groups = torch.tensor([-1 if (new := mapping[old]) is None else names.index(new) for old in self.labels])
        sums = self._view()
        out = Moments(
            labels=names,
            covariance=self.keeps_covariance,
            dtype=self._dtype,
            device=self._device,
            block_rows=self.block_rows,
            strict=self.strict,
        )
        out.tokens, out.ledger = self.tokens, copy.deepcopy(self.ledger)
        out._norm_sum, out._norm_count = self._norm_sum.clone(), self._norm_count
        out._sums = sums.relabel(groups.to(sums.label_total.device), len(names))
        return out

    # --- read

    @property
    def dim(self) -> int:
        """Width D of the rows."""
        if self._sums is None:
            raise FitError("Moments: the width is not known before the first row", way_out="Give dim=.")
        return len(self._sums.shift)

    @property
    def count(self) -> int:
        """Rows accumulated."""
        return 0 if self._sums is None else int(self._sums.count) + len(self._blocks)

    @property
    def weight(self) -> float:
        """Sum of the rows' weights; the count where none were given."""
        return 0.0 if self._sums is None else float(self._view().weight)

    @property
    def mean(self) -> Tensor:
        """Mean [D] float64."""
        return self._filled().mean()

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of every column [D] float64; 0 for a single row."""
        sums = self._filled()
        return _over(sums.squares(), sums.weight - 1)

    @property
    def label_count(self) -> Tensor:
        """Rows per label [K] int64."""
        if self._sums is None:
            return torch.zeros(len(self.labels), dtype=torch.int64)
        return self._view().label_count.clone()

    @property
    def label_mean(self) -> Tensor:
        """Mean per label [K, D] float64; NaN for a label without rows."""
        return self._filled().label_mean()

    @property
    def label_variance(self) -> Tensor:
        """Unbiased variance per label and column [K, D] float64; 0 for a single row, NaN for none."""
        sums = self._filled()
        return _over(sums.label_squares(), (sums.label_weight - 1).unsqueeze(1))

    @property
    def mean_norm(self) -> float:
        """Mean |x_t| over the tokens used, before pooling and without the first of each sequence: the unit of steering."""
        if self._norm_count == 0:
            raise FitError("mean_norm: no token was counted", way_out="Call update, or capture with it, first.")
        return float(self._norm_sum) / self._norm_count

    def covariance(self, ddof: int = 1, shrinkage: float | None = None) -> Tensor:
        """Covariance [D, D] float64 with denominator (weight - ddof), shrunk towards its scaled identity if asked.

        Raises FitError where only means are kept.
        """
        cov = _over(self.total_scatter(), torch.as_tensor(self.weight - ddof))
        return cov if shrinkage is None else shrink(cov, shrinkage)

    def total_scatter(self) -> Tensor:
        """S_T [D, D] = sum w (x - mean)(x - mean)' float64."""
        self._check_covariance()
        return self._filled().scatter()

    def within_scatter(self) -> Tensor:
        """S_W [D, D] = sum over labels of the scatter about the label's own mean; needs every row labelled."""
        self._check_covariance()
        sums = self._filled()
        unlabelled = int(sums.count - sums.label_count.sum())
        if unlabelled:
            raise LabelError(
                "within_scatter: rows without a label",
                expected="every row labelled",
                got=f"{unlabelled} of {self.count} rows unlabelled",
                way_out="Accumulate unlabelled rows in a Moments of their own.",
            )
        return sums.within()

    def between_scatter(self) -> Tensor:
        """S_B = S_T - S_W [D, D]."""
        return self.total_scatter() - self.within_scatter()

    def _check_covariance(self) -> None:
        if not self.keeps_covariance:
            raise FitError("covariance: this Moments keeps only means", way_out="Construct it with Moments(covariance=True).")
        report = self.precision()
        if report["variance_bound"] > precision.BOUND[self._dtype or torch.float32]:
            text = (
                f"the stream moved {report['offset'] ** 0.5:.3g} standard deviations from the shift it is summed about: "
                f"variances may err by {report['variance_bound']:.1e} (relative)"
            )
            if self.strict:
                raise PrecisionError(text, way_out="Shuffle the stream, or construct with dtype=torch.float64.")
            warnings.warn(PrecisionWarning(text), stacklevel=3)

    def precision(self) -> dict[str, float]:
        """`offset` = max over columns of ((mean - s)/std)^2, and the relative `variance_bound` that it implies."""
        sums = self._filled()
        variance = sums.squares() / sums.weight
        moved = (sums.total[0] / sums.weight) ** 2
        offset = float(torch.where(variance > 0, moved / variance, 0.0).max())
        return {"offset": offset, "variance_bound": precision.variance_bound(self._dtype or torch.float32, offset)}

    # --- resume

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume: tensors of the sums and JSON-ready settings; staged rows are folded into the copy."""
        sums = None if self._sums is None else self._view()
        return {
            "settings": {
                "labels": list(self.labels),
                "covariance": self.keeps_covariance,
                "block_rows": self.block_rows,
                "dtype": None if self._dtype is None else str(self._dtype).removeprefix("torch."),
                "tokens": None if self.tokens is None else self.tokens.as_dict(),
                "ledger": self.ledger.as_dict(),
                "frozen": sums is not None and sums.frozen,
                "norm_count": self._norm_count,
                "precision": None if sums is None or not float(sums.weight) else self.precision(),
            },
            "norm_sum": self._norm_sum.clone(),
            **({} if sums is None else {k: t.clone() for k, t in sums.tensors().items()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` described, with the next row starting a new block."""
        settings = state["settings"]
        self.labels = tuple(settings["labels"])
        self.keeps_covariance = settings["covariance"]
        self.block_rows = settings["block_rows"]
        self._dtype = None if settings["dtype"] is None else getattr(torch, settings["dtype"])
        self.tokens = None if settings["tokens"] is None else Tokens(**settings["tokens"])
        self.ledger = Ledger.from_dict(settings["ledger"])
        self._clear()
        self._read = self._sums = None
        self._norm_sum, self._norm_count = state["norm_sum"].clone(), settings["norm_count"]
        if "shift" in state:
            names = Sums.zeros(1, 0, False).tensors()
            self._sums = Sums(**{k: state[k].clone() for k in names}, frozen=settings["frozen"])
            self._device = self._sums.shift.device

    def __repr__(self) -> str:
        dim = "?" if self._sums is None else str(self.dim)
        kind = "covariance" if self.keeps_covariance else "means"
        return f"Moments({self.count:,} rows, D={dim}, {len(self.labels)} labels, {kind})"


def _fold(sums: Sums, block: Block) -> None:
    """Fold a block into `sums`; a shift not yet frozen is taken from the block, and stays if the block is large enough."""
    if not sums.frozen:
        sums.move_shift(shift_of(block.rows))
        sums.frozen = len(block.rows) >= precision.FREEZE_ROWS
    sums.fold(block.rows, block.ids, block.weights)


def _over(scatter: Tensor, denominator: Tensor) -> Tensor:
    """scatter / denominator, 0 where one row or less leaves no freedom, NaN where the scatter is."""
    return torch.where((denominator > 0) | scatter.isnan(), scatter / denominator, torch.zeros_like(scatter))
