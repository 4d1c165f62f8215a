"""Forwards: whose tokens are in the model now, and the rows that one open forward has staged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from . import ops
from .errors import LabelError, ShapeError
from .labels import Labels, encode_labels
from .ledger import Ledger
from .pooling import Pool
from .tokens import (
    Layout,
    Selection,
    Spans,
    Tokens,
    packed_layout,
    padded_layout,
    plain_layout,
    select,
)


class Sink(Protocol):
    """What rows are handed to.

    A sink that has `absorb(rows, ids, norms)` gets the token norms too and counts its rows itself; one that has
    `observe(observed)` gets every row's sequence and rank instead of its label.
    """

    def update(self, x: Tensor, labels: Any = None) -> None:
        """Take rows [N, D] and their label ids [N], or None."""


Bound: TypeAlias = Any  # a sink, (sink, Tokens), a list of either, or a factory of any of these

@dataclass(frozen=True, eq=False)
class Observed:
    """Finite rows [N, D] of one hook point in one forward, with their sequence [N] in the batch and their rank [N]."""

    hook_point: str
    rows: Tensor
    sequence: Tensor
    rank: Tensor
    sequences: int
    requests: Sequence[str] | None


@dataclass(eq=False)
class Binding:
    """One sink at one hook point, with its token rule and its ledger."""

    hook_point: str
    sink: Sink
    rule: Tokens
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that the sink keeps; empty for one that keeps none."""
        return tuple(getattr(self.sink, "labels", ()) or ())

    def observe(self, observed: Observed) -> None:
        """Give formed, finite rows to a sink that follows sequences."""
        self.ledger.rows.add(formed=len(observed.rows), accumulated=len(observed.rows))
        self.sink.observe(observed)  # type: ignore[attr-defined]

    def hand_over(self, rows: Tensor, ids: Tensor | None, norms: Tensor) -> None:
        """Give formed, finite rows to the sink."""
        self.ledger.rows.add(formed=len(rows))
        absorb = getattr(self.sink, "absorb", None)
        if absorb is not None:
            absorb(rows, ids, norms)
            return
        self.sink.update(rows, ids)
        self.ledger.rows.add(accumulated=len(rows))


class Batch:
    """The sequences that are in the model now: labels, mask, bounds, spans, request ids, what was shown, open pools."""

    def __init__(
        self,
        labels: Labels | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        spans: Sequence[Spans] | None = None,
        requests: Sequence[str] | None = None,
    ) -> None:
        self.labels, self.mask, self.cu_seqlens, self.spans = labels, mask, cu_seqlens, spans
        self.requests = requests
        self.seen: Tensor | None = None
        self.pools: dict[Binding, Pool] = {}
        self._ids: dict[tuple[str, ...], Tensor] = {}

    def ids(self, names: tuple[str, ...]) -> Tensor | None:
        """Label ids under a sink's names, or None for a sink that keeps none."""
        if not names:
            return None
        if self.labels is None:
            raise LabelError(
                "labels: a labelled sink is captured without labels",
                way_out="Run the forward inside `with tap.batch(labels=...)`; None marks an unlabelled sequence.",
            )
        if names not in self._ids:
            self._ids[names] = encode_labels(self.labels, names)
        return self._ids[names]

    def row_ids(self, names: tuple[str, ...], layout: Layout, selection: Selection) -> Tensor | None:
        """Label id of every selected row, from labels one a sequence or one a position."""
        ids = self.ids(names)
        if ids is None:
            return None
        if ids.dim() == 1 and len(ids) == layout.sequences:
            return ids[selection.sequence]
        if ids.numel() == selection.offered:
            return ids.reshape(-1)[selection.index]
        raise ShapeError(
            "labels",
            expected=f"[{layout.sequences}] one a sequence, or one a position ({selection.offered})",
            got=list(ids.shape),
        )


@dataclass
class Staged:
    """Rows of one binding from one fire, waiting for the forward to end."""

    binding: Binding
    layout: Layout
    selection: Selection
    rows: Tensor
    norms: Tensor
    finite: Tensor


class Forward:
    """One open forward: what its caller said of the tokens, and what has been staged so far."""

    def __init__(self, batch: Batch, implicit: bool, mask: Tensor | None, past: int) -> None:
        self.batch, self.implicit, self.mask, self.past = batch, implicit, mask, past
        self.staged: list[Staged] = []
        self.fires: dict[str, int] = {}
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._selections: dict[tuple[int, Tokens], Selection] = {}

    def stage(self, hook_point: str, bindings: Sequence[Binding], hidden: Tensor) -> None:
        """Gather the selected rows of hidden [B, T, D] or [N, D] for every binding; touches no sink."""
        self.fires[hook_point] = self.fires.get(hook_point, 0) + 1
        layout = self._layout(hook_point, hidden)
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        for binding in bindings:
            key = (id(layout), binding.rule)
            if key not in self._selections:
                self._selections[key] = select(layout, binding.rule, self.batch.spans)
            selection = self._selections[key]
            n = len(selection.index)
            rows = flat.new_empty(n, flat.shape[1])
            norms = flat.new_empty(n, dtype=torch.float64)
            finite = flat.new_empty(n, dtype=torch.bool)
            index = None if n == len(flat) else selection.index.to(flat.device)
            ops.stage(flat, index, rows, norms, finite)
            self.staged.append(Staged(binding, layout, selection, rows, norms.cpu(), finite.cpu()))

    def _layout(self, hook_point: str, hidden: Tensor) -> Layout:
        shape = tuple(hidden.shape[:-1])
        if shape not in self._layouts:
            self._layouts[shape] = self._new_layout(hook_point, shape)
        return self._layouts[shape]

    def _new_layout(self, hook_point: str, shape: tuple[int, ...]) -> Layout:
        batch = self.batch
        if batch.cu_seqlens is not None:
            return packed_layout(math.prod(shape), batch.cu_seqlens, batch.seen)
        if len(shape) == 2:
            return padded_layout((shape[0], shape[1]), self.mask, self.past, batch.seen)
        if len(shape) != 1:
            raise ShapeError(
                f"hook point {hook_point!r}: output", expected="[B, T, D] or [N, D]", got=f"{len(shape) + 1} axes"
            )
        if self.mask is None:
            return plain_layout(shape[0])
        if self.mask.numel() != shape[0]:
            raise ShapeError(
                f"hook point {hook_point!r}: rows do not match the attention mask",
                expected=f"{self.mask.numel()} rows",
                got=shape[0],
                way_out="Give tap.batch(cu_seqlens=...) for packed sequences.",
            )
        return padded_layout((self.mask.shape[0], self.mask.shape[1]), self.mask, 0, batch.seen)

    def shown(self) -> Tensor | None:
        """Ranks shown per sequence after this forward."""
        ranked = [layout for layout in self._layouts.values() if layout.ranked]
        return ranked[0].shown() if ranked else None
