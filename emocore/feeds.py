"""Feeds: one hook point's way into an activation store: its width, its dtype, its ledger, the shard that is open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, LabelError, ShapeError
from .labels import Labels, encode_labels
from .ledger import Ledger
from .manifest import DTYPES, Point
from .outflow import Receiver
from .places import Growing
from .registers import Register
from .shards import Draft
from .sinks import Observed
from .tokens import Tokens

BITS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}  # by bytes of an element


class Recorder(Receiver, Protocol):
    """What a feed hands its rows to."""

    labels: tuple[str, ...]

    def take(self, feed: Feed, rows: Tensor, finite: bool, places: Callable[[Register], Tensor]) -> None:
        """Take rows [N, D] that the feed's ledger counts as formed, with their places [N, 5]."""


class Feed:
    """Sink for one hook point of an activation store; made by its `at`.

    `pending` counts the rows [pending, dim] that no commit has made durable yet, all of them in the open `draft`, and
    `growing` says whose they are.
    """

    pools = True

    def __init__(self, store: Recorder, hook_point: str, dtype: torch.dtype | None, point: Point | None) -> None:
        self.hook_point, self.dtype = hook_point, dtype
        self.dim = 0
        self.tokens: Tokens | None = None
        self.ledger = Ledger()
        if point is not None:
            self.dim, self.dtype = point.dim, DTYPES[point.dtype]
            self.tokens = None if point.tokens is None else Tokens(**point.tokens)
            self.ledger = Ledger.from_dict(point.ledger)
        self.draft: Draft | None = None
        self.growing = Growing()
        self.pending = 0
        self.receiver = store
        self.residents: list[Callable[[], None]] = []  # fetch what captures hold on their devices

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the store's labels."""
        return self.receiver.labels

    @property
    def ledger_lock(self) -> threading.RLock:
        """The store's: no commit saves the ledger while rows are counted and not handed over yet."""
        return self.receiver.lock

    @property
    def pending_bytes(self) -> int:
        """Bytes of the pending rows."""
        return self.pending * self.dim * (self.dtype.itemsize if self.dtype else 0)

    def observe(self, observed: Observed) -> None:
        """Take rows that a capture has formed and counted; raises StoreError, BackpressureError, ShapeError."""
        finite = observed.whose.batch is not None
        self.receiver.take(self, observed.rows, finite, lambda register: register.places(observed.whose))

    def settle(self) -> None:
        """Commit where a shard is full: no forward is half handed over."""
        self.receiver.settle()

    def update(
        self,
        x: Tensor,
        labels: Labels | None = None,
        requests: Sequence[str] | None = None,
        *,
        sequence: Tensor | None = None,
        position: Tensor | None = None,
        token: Tensor | None = None,
    ) -> None:
        """Take rows x [N, D] outside of a capture, and what is known of each: label, request, and three numbers."""
        if labels is not None and not self.labels:
            raise LabelError("labels: this store keeps none", way_out="Construct it with ActivationStore(labels=...).")
        ids = None if labels is None else encode_labels(labels, self.labels)
        columns = {"label": ids, "sequence": sequence, "position": position, "token": token}
        self._check(x, requests, columns)
        with self.receiver.lock:
            rows = self.ledger.rows
            before = rows.missing
            rows.add(formed=len(x))
            try:
                self.receiver.take(self, x.detach(), False, lambda register: register.given(len(x), requests, columns))
            except BaseException:
                rows.add(dropped=rows.missing - before)
                raise
            self.receiver.settle()

    def _check(self, x: Tensor, requests: Sequence[str] | None, columns: Mapping[str, Tensor | None]) -> None:
        if x.dim() != 2:
            raise ShapeError("rows", expected="[N, D]", got=list(x.shape))
        for name, column in columns.items():
            if column is not None and (column.shape != (len(x),) or column.is_floating_point()):
                got = f"{column.dtype} {list(column.shape)}"
                raise ShapeError(f"{name}: of rows", expected=f"[{len(x)}], a whole number a row", got=got)
        if requests is not None and len(requests) != len(x):
            raise ArgumentError("requests", expected=f"{len(x)} ids, one a row", got=len(requests))

    def check_rows(self, dim: int, dtype: torch.dtype) -> torch.dtype:
        """What rows of that width and dtype are stored as; raises ShapeError, ArgumentError where they cannot be."""
        if self.dim not in (0, dim):
            raise ShapeError(f"hook point {self.hook_point!r}: width of rows", expected=self.dim, got=dim)
        stored = self.dtype or dtype
        if stored not in DTYPES.values():
            raise ArgumentError(
                f"hook point {self.hook_point!r}: rows of {dtype}",
                expected=" or ".join(DTYPES),
                way_out="Choose what they are stored as: ActivationStore(dtype=torch.float32).",
            )
        return stored

    # --- for the store

    def fit(self, rows: Tensor, finite: bool) -> tuple[Tensor, Tensor | None]:
        """Rows in the stored dtype, and which of them are kept where some are not finite in it; counts those.

        `finite` says that the rows are known to be, in their own dtype.

        Raises ShapeError for another width, ArgumentError for float64 rows where no dtype was chosen.
        """
        dtype = self.check_rows(rows.shape[1], rows.dtype)
        self.dim, self.dtype = rows.shape[1], dtype
        narrow = rows.to(dtype)
        if finite and torch.finfo(dtype).max >= torch.finfo(rows.dtype).max:
            return narrow, None
        if _finite(narrow):
            return narrow, None
        good = narrow.isfinite().all(1)
        if bool(good.all()):
            return narrow, None
        nonfinite = len(rows) - int(rows.isfinite().all(1).sum())
        self.ledger.rows.add(nonfinite=nonfinite, overrange=len(rows) - int(good.sum()) - nonfinite)
        return narrow[good], good.cpu()

    def point(self) -> Point:
        """The hook point as a manifest has it once the pending rows are durable; raises LedgerError."""
        ledger = Ledger.from_dict(self.ledger.as_dict())
        ledger.rows.add(accumulated=self.pending, pending=-self.pending)
        ledger.check(f"hook point {self.hook_point!r}")
        rule = None if self.tokens is None else self.tokens.as_dict()
        dtype = str(self.dtype).removeprefix("torch.")
        return Point(self.hook_point, dtype, self.dim, rule, ledger.as_dict())

    def begin_shard(self, kept: bool) -> None:
        """Forget the open shard, whose rows are durable now, or dropped; one without rows stays open past a commit."""
        name = "accumulated" if kept else "dropped"
        self.ledger.rows.add(**{name: self.pending, "pending": -self.pending})
        if self.pending or not kept:
            self.draft = None
        self.growing, self.pending = Growing(), 0


def _finite(rows: Tensor) -> bool:
    """Whether all rows are finite: on a CPU by their bits, as signed and as unsigned numbers, without torch's team."""
    if not rows.is_cpu or not rows.numel():
        return bool(rows.isfinite().all())
    signed, unsigned = BITS[rows.itemsize]
    infinity = torch.tensor(torch.inf, dtype=rows.dtype).view(signed).item()
    bits = rows.view(signed).numpy()
    return bool(bits.max() < infinity and bits.view(unsigned).max() < infinity + (1 << 8 * rows.itemsize - 1))
