"""Moments: count, mean, per-label mean and full covariance of a stream of rows, exactly enough to trust."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops, precision
from .blocks import Block, Blocks, as_rows
from .errors import ArgumentError, FitError, LabelError, LedgerError, ShapeError
from .groups import Taken
from .labels import Labels, Weights, label_ids, label_names, row_weights
from .ledger import Ledger
from .readout import ReadOut
from .sums import Sums
from .tokens import Tokens


class Moments(ReadOut):
    """Mutable, mergeable, resumable statistics of rows [N, D]; width, device and dtype are inferred at the first row.

    `labels` (names, or a count) keeps a mean and a variance per label; `covariance` keeps the full [D, D] scatter,
    without it the cost is O(K D). Rows are staged and folded in blocks of `block_rows` consecutive rows (by default
    8,192 on the CPU and 16,384 where a capture stays on a GPU), so results are bitwise the same for any batch
    boundaries and thread counts. `strict` turns precision warnings into PrecisionError.

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
        block_rows: int | None = None,
        strict: bool = False,
    ) -> None:
        self.labels = label_names(labels)
        self.keeps_covariance = bool(covariance)
        self._device_rows = precision.DEVICE_BLOCK_ROWS if block_rows is None else block_rows
        self.block_rows = _checked_block_rows(precision.BLOCK_ROWS if block_rows is None else block_rows)
        self.strict = strict
        self._resident: Callable[[], None] | None = None  # fetches what a capture holds on the device
        self.tokens: Tokens | None = None
        self._dtype = None if dtype is None else precision.held(precision.check_dtype(dtype, "dtype"))
        self._device = None if device is None else torch.device(device)
        self._sums: Sums | None = None
        self.ledger = Ledger()
        self._clear()
        if dim is not None:
            self._sums = self._zeros(dim)

    def _clear(self) -> None:
        self.ledger.subtract(self.ledger)  # in place: an open capture counts in it
        self._blocks: Blocks | None = None
        self._read: Sums | None = None
        self._coarsest = torch.float64
        self._norm_sum, self._norm_count = 0.0, 0
        self._torn = False

    def _zeros(self, dim: int) -> Sums:
        with _ordinary():
            return Sums.zeros(dim, len(self.labels), self.keeps_covariance, self._device or "cpu")

    # --- accumulate

    def update(
        self, x: Tensor | np.ndarray[Any, Any], labels: Labels | None = None, weights: Weights | None = None
    ) -> None:
        """Add rows x [..., D], with `labels` and `weights` >= 0 one a row, or one an entry of the first axis.

        A row with a NaN or Inf is left out and counted in `ledger.rows.nonfinite`. Raises ShapeError, LabelError or
        ArgumentError before anything is accumulated.
        """
        x = as_rows(x)
        x = x if self._device is None else x.to(self._device)
        self._check_width(x.shape[-1])
        dtype = self._row_dtype(x.dtype)
        batch = Block(
            x.reshape(-1, x.shape[-1]),
            label_ids(labels, self.labels, x.shape[:-1]),
            row_weights(weights, x.shape[:-1]),
        )
        start = 0
        while start < len(batch.rows):
            with self._writing(batch.rows, dtype) as (sums, blocks):
                room = blocks.room(len(batch.rows) - start)
                ids, kept, norms = _stage(batch.part(start, start + len(room)), room)
                for block in blocks.take(ids, kept):
                    sums.fold(block)
                self._count_norms(norms)
                bad = len(room) - len(ids)
                self.ledger.rows.add(formed=len(room), accumulated=len(ids), nonfinite=bad)
            start += len(room)

    def absorb(self, rows: Tensor, ids: Tensor | None, norms: Tensor) -> None:
        """Add rows [N, D] already staged: finite, formed in the ledger, of label ids [N]; any number of token norms."""
        self._check_width(rows.shape[-1])
        dtype = self._row_dtype(rows.dtype)
        rows = rows if self._device is None else rows.to(self._device)
        ids = torch.full((len(rows),), -1) if ids is None else ids
        with self._writing(rows, dtype) as (sums, blocks):
            for block in blocks.append(Block(rows, ids.to(rows.device, torch.int32), None)):
                sums.fold(block)
            self._count_norms(norms)
            self.ledger.rows.add(accumulated=len(rows))

    def adopt(self, taken: Taken) -> None:
        """Add what a capture has summed on the device, and the rows that waited there for a block to fill."""
        self.absorb(taken.rows, taken.ids, taken.norms)
        if not int(taken.sums.count):
            return
        with self._writing(taken.rows, self._row_dtype(taken.rows.dtype)) as (sums, _):
            sums.add(taken.sums)
            self._coarsest = precision.coarser(self._coarsest, torch.bfloat16)
            self.count_norms(taken.norm_sum, taken.norm_count)
            self.ledger.rows.add(accumulated=int(taken.sums.count))

    def check_rows(self, dim: int, dtype: torch.dtype) -> None:
        """Raise ShapeError or ArgumentError unless rows of this width and dtype can be added."""
        self._check_width(dim)
        self._row_dtype(dtype)

    @property
    def exact(self) -> bool:
        """Whether rows are held in float64, whatever they come in."""
        return self._dtype == torch.float64

    @property
    def device_block_rows(self) -> int:
        """Rows of a block of a capture that stays on the device: whole chains of a tensor core."""
        return max(self._device_rows // precision.DEVICE_CHAIN, 1) * precision.DEVICE_CHAIN

    @contextlib.contextmanager
    def _writing(self, rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[Sums, Blocks]]:
        """State to add rows like these to. What interrupts the block leaves it torn, and every later use says so."""
        self._check_whole()
        with _ordinary():
            if self._sums is None or self._device is None:
                self._device = rows.device if self._device is None else self._device
                self._sums = self._zeros(rows.shape[-1])
            self._dtype = dtype
            if self._blocks is None:
                self._blocks = Blocks(self.block_rows, torch.empty(0, self.dim, dtype=dtype, device=self._device))
            self._torn = True
            yield self._sums, self._blocks
            if precision.accumulator(dtype) == torch.float32:
                self._coarsest = precision.coarser(self._coarsest, rows.dtype)
            self._read = None
            self._torn = False

    def _check_whole(self) -> None:
        if self._resident is not None:
            self._resident()
        if self._torn:
            raise LedgerError(
                "Moments: an update was interrupted, so some rows may be half counted",
                way_out="Call reset, or load_state_dict with the last state.",
            )

    def _check_width(self, dim: int) -> None:
        if dim < 1 or (self._sums is not None and dim != self.dim):
            raise ShapeError("x: width", expected="D >= 1" if self._sums is None else f"D = {self.dim}", got=dim)

    def _row_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype the rows are held in: what the first rows need, float64 for pooled ones."""
        if self._dtype is None:
            pooled = self.tokens is not None and self.tokens.pool is not None
            return torch.float64 if pooled else precision.held(dtype)
        if torch.promote_types(dtype, self._dtype) != self._dtype:
            raise ArgumentError(
                "x: dtype",
                expected=f"{self._dtype} or narrower, like the first rows",
                got=dtype,
                way_out="Construct it with Moments(dtype=torch.float64) to take both.",
            )
        return self._dtype

    def count_norms(self, total: float, count: int) -> None:
        """Add to the mean norm `count` tokens whose norms sum to `total`."""
        self._norm_sum += total
        self._norm_count += count

    def _count_norms(self, norms: Tensor) -> None:
        start = torch.tensor([self._norm_sum], dtype=torch.float64)
        self._norm_sum = float(torch.cat([start, norms.cpu()]).cumsum(0)[-1])  # in order: the same for any split
        self._norm_count += len(norms)

    def _view(self) -> Sums:
        """The sums over every row so far; staged rows are folded into a copy, kept until the next update."""
        self._check_whole()
        if self._sums is None:
            raise FitError("Moments: no row was seen", way_out="Call update, or capture with it, first.")
        if not self._blocks:
            return self._sums
        if self._read is None:
            with _ordinary():
                read = self._sums.clone()
                read.fold(self._blocks.staged())
            self._read = read
        return self._read

    # --- combine

    def merge(self, other: Moments) -> None:
        """Add the rows that `other` has seen, exactly; `other` is left as it was.

        Raises ShapeError, LabelError or ArgumentError where widths, labels, covariance or token rules differ.
        """
        self._combine(other, 1)
        self.ledger.merge(other.ledger)

    def subtract(self, other: Moments) -> None:
        """Take away the rows of `other`, merged or seen before: inverts `merge` to rounding, exactly for the last rows.

        Raises as `merge` does, and ArgumentError where `other` has more rows.
        """
        self._combine(other, -1)
        self.ledger.subtract(other.ledger)

    def _combine(self, other: Moments, sign: int) -> None:
        if other is self:
            raise ArgumentError("other: a Moments cannot be combined with itself", way_out="Merge a copy.")
        if other.labels != self.labels:
            raise LabelError("other: labels", expected=self.labels, got=other.labels, way_out="Use relabel first.")
        if other.keeps_covariance != self.keeps_covariance:
            raise ArgumentError("other: covariance", expected=self.keeps_covariance, got=other.keeps_covariance)
        if other.count == 0:
            return
        self._check_width(other.dim)
        adopts = sign > 0 and self.count == 0 and self.tokens is None
        if other.tokens != self.tokens and not adopts:
            raise ArgumentError("other: token rule", expected=self.tokens, got=other.tokens)
        theirs = other._view()
        if sign < 0 and not self._holds(theirs):
            raise ArgumentError("other: rows that are not here", expected=f"at most {self.count}", got=other.count)
        self.tokens = other.tokens
        self._flush()
        with self._writing(theirs.shift.unsqueeze(0), self._dtype or other._dtype or torch.float64) as (sums, _):
            sums.add(theirs, sign)
            self._coarsest = precision.coarser(self._coarsest, other._coarsest)
            self._norm_sum += sign * other._norm_sum
            self._norm_count += sign * other._norm_count

    def _holds(self, theirs: Sums) -> bool:
        if self._sums is None:
            return False
        mine = self._view()
        more = theirs.label_count > mine.label_count.to(theirs.label_count.device)
        return int(mine.count) >= int(theirs.count) and not bool(more.any())

    def _flush(self) -> None:
        """Fold what is staged for good: a split point of the summation tree."""
        if self._blocks:
            self._sums = self._view()
            self._read = None
            self._blocks.clear()

    def reset(self) -> None:
        """Forget every row; labels, width, dtype and token rule stay."""
        if self._sums is not None:
            self._sums = self._zeros(self.dim)
        self._clear()

    def copy(self) -> Moments:
        """An independent copy."""
        self._check_whole()
        with _ordinary():
            return copy.deepcopy(self, {id(self._resident): None})

    def relabel(self, mapping: Mapping[str, str | None]) -> Moments:
        """The same rows under coarser labels, exactly: {old: new, or None for unlabelled}, every old label named."""
        missing = [name for name in self.labels if name not in mapping]
        if missing:
            raise LabelError("mapping: labels left out", got=missing[:8], way_out="Map them to None to drop them.")
        names = tuple(dict.fromkeys(new for old in self.labels if (new := mapping[old]) is not None))
        groups = torch.tensor([-1 if (new := mapping[old]) is None else names.index(new) for old in self.labels])
        out = self.copy()
        out.labels = label_names(names or None)
        if self._sums is not None:
            out._flush()
            with _ordinary():
                out._sums = out._view().relabel(groups, len(names))
        return out

    # --- size

    @property
    def dim(self) -> int:
        """Width D of the rows."""
        if self._sums is None:
            raise FitError("Moments: the width is not known before the first row", way_out="Give dim=.")
        return len(self._sums.shift)

    @property
    def count(self) -> int:
        """Rows accumulated."""
        self._check_whole()
        return 0 if self._sums is None else int(self._sums.count) + len(self._blocks or ())

    @property
    def weight(self) -> float:
        """Sum of the rows' weights; the count where none were given."""
        return 0.0 if self._sums is None else float(self._view().weight)

    @property
    def label_count(self) -> Tensor:
        """Rows per label [K] int64."""
        if self._sums is None:
            return torch.zeros(len(self.labels), dtype=torch.int64)
        return self._view().label_count.clone()

    # --- resume

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to resume: tensors of the sums, staged rows folded in, and JSON-ready settings."""
        sums = None if self._sums is None else self._view()
        with _ordinary():
            tensors = {} if sums is None else sums.clone().tensors()
            norm_sum = torch.tensor([self._norm_sum], dtype=torch.float64)
        return {
            "settings": {
                "labels": list(self.labels),
                "covariance": self.keeps_covariance,
                "block_rows": self.block_rows,
                "dtype": None if self._dtype is None else _name(self._dtype),
                "coarsest": _name(self._coarsest),
                "tokens": None if self.tokens is None else self.tokens.as_dict(),
                "ledger": self.ledger.as_dict(),
                "frozen": sums is not None and sums.frozen,
                "norm_count": self._norm_count,
                "precision": None if sums is None or not float(sums.weight) > 0 else self.precision(),
            },
            "norm_sum": norm_sum,
            **tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` described, with the next row starting a new block.

        Raises ShapeError or ArgumentError, and changes nothing, for a state that is incomplete or does not fit itself.
        """
        try:
            settings = state["settings"]
            labels = label_names(settings["labels"] or None)
            covariance, frozen = bool(settings["covariance"]), bool(settings["frozen"])
            block_rows = _checked_block_rows(settings["block_rows"])
            dtype = None if settings["dtype"] is None else _dtype(settings["dtype"])
            coarsest = _dtype(settings["coarsest"])
            tokens = None if settings["tokens"] is None else Tokens(**settings["tokens"])
            ledger = Ledger.from_dict(settings["ledger"])
            norms = float(state["norm_sum"]), int(settings["norm_count"])
            with _ordinary():
                sums = Sums.restore(state, len(labels), covariance, frozen) if "shift" in state else None
        except (KeyError, TypeError) as error:
            raise ArgumentError("state: not what state_dict gives", got=repr(error)) from error
        self._clear()
        self.ledger.merge(ledger)
        self.labels, self.keeps_covariance, self.block_rows, self.tokens = labels, covariance, block_rows, tokens
        self._dtype, self._coarsest, self._sums = dtype, coarsest, sums
        self._device = None if sums is None else sums.shift.device
        self._norm_sum, self._norm_count = norms

    def __repr__(self) -> str:
        dim = "?" if self._sums is None else str(self.dim)
        kind = "covariance" if self.keeps_covariance else "means"
        rows = "interrupted" if self._torn else f"{self.count:,} rows"
        return f"Moments({rows}, D={dim}, {len(self.labels)} labels, {kind})"


@contextlib.contextmanager
def _ordinary() -> Iterator[None]:
    """Make tensors that can be updated later: those made inside inference_mode could not be, outside of it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _stage(block: Block, room: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Write the finite rows of a block to the front of `room` [N, D]; returns their ids, weights and norms."""
    _, ids, weights = block
    norms = room.new_empty(len(room), dtype=torch.float64)
    finite = room.new_empty(len(room), dtype=torch.bool)
    ops.stage(block.rows, None, room, norms, finite)
    if bool(finite.all()):
        return ids, weights, norms
    kept = room[finite]
    room[: len(kept)] = kept
    good = finite.cpu()
    return ids[good], None if weights is None else weights[good], norms[finite]


def _checked_block_rows(rows: int) -> int:
    if rows < precision.FREEZE_ROWS or rows % precision.CHAIN:
        least = f"a multiple of {precision.CHAIN}, at least {precision.FREEZE_ROWS}"
        raise ArgumentError("block_rows", expected=least, got=rows)
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArgumentError("state: dtype", got=name)
    return precision.check_dtype(found, "state: dtype")
