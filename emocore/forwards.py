"""Forwards: the rows that one open forward has staged, to be handed over when it ends or counted as rolled back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .batches import Batch, Call
from .errors import ArgumentError, ShapeError
from .pooling import Pool
from .sinks import Binding, Observed, Whose
from .tokens import (
    Layout,
    Selection,
    Tokens,
    packed_layout,
    padded_layout,
    plain_layout,
    select,
    without_stops,
)


@dataclass
class Staged:
    """Rows of one binding from one fire, waiting for the forward to end."""

    binding: Binding
    layout: Layout
    selection: Selection
    ids: Tensor | None
    rows: Tensor
    norms: Tensor
    finite: Tensor
    tokens: Tensor | None

    def roll_back(self) -> None:
        """Count it as never handed over."""
        n = self.selection.offered
        with self.binding.held:
            self.binding.ledger.tokens.add(offered=n, rolled_back=n)

    def hand_over(self, batch: Batch, known: dict[tuple[object, ...], Whose]) -> None:
        """Count the tokens, and give the finite ones to the sink or to the batch's pool.

        `known` says whose they are, as far as earlier hook points have asked.
        """
        binding, selection, good = self.binding, self.selection, self.finite
        bad = len(good) - int(good.sum())
        binding.ledger.tokens.add(
            offered=selection.offered,
            masked=selection.masked,
            skipped=selection.skipped,
            reseen=selection.reseen,
            nonfinite=bad,
            selected=len(good) - bad,
        )
        if binding.rule.pool is not None:
            if binding not in batch.pools:
                shape = (self.layout.sequences, self.rows.shape[1])
                batch.pools[binding] = Pool(binding.rule.pool, *shape, self.rows.device)
            batch.pools[binding].add(self.rows, selection.sequence, good, self.norms, selection.counted)
            return
        rows = self.rows[good.to(self.rows.device)] if bad else self.rows
        ids = self.ids if self.ids is None or not bad else self.ids[good]
        norms = self.norms[selection.counted & good]
        if binding.observes:
            key = (id(selection), binding.labels)
            whose = self._whose(batch, good, ids) if bad or key not in known else known[key]
            if not bad:
                known[key] = whose
            binding.hand_over(Observed(binding.hook_point, rows, whose), None, norms)
        else:
            binding.hand_over(rows, ids, norms)

    def _whose(self, batch: Batch, good: Tensor, ids: Tensor | None) -> Whose:
        selection = self.selection
        rank = self.layout.rank[selection.index][good]
        tokens = None if self.tokens is None else self.tokens[selection.index][good]
        sequence, several = selection.sequence[good], self.layout.sequences
        return Whose(sequence, rank, several, batch.requests, ids, tokens, batch)


class Forward:
    """One open forward: what its caller said of the tokens, and what has been staged so far."""

    def __init__(self, batch: Batch, implicit: bool, call: Call, stops: frozenset[int]) -> None:
        self.batch, self.implicit, self.call, self._stops = batch, implicit, call, stops
        self.staged: list[Staged] = []
        self.fires: dict[str, int] = {}
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._selections: dict[tuple[int, Tokens], Selection] = {}

    @property
    def unmasked(self) -> bool:
        """Whether nothing said which tokens are real."""
        return self.call.mask is None and self.batch.cu_seqlens is None

    def stage(self, hook_point: str, bindings: Sequence[Binding], hidden: Tensor) -> None:
        """Gather the selected rows of hidden [B, T, D] or [N, D] for every binding; touches no sink."""
        self.fires[hook_point] = self.fires.get(hook_point, 0) + 1
        layout = self._layout(hook_point, hidden)
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        gathered: dict[Tokens, tuple[Tensor, Tensor, Tensor]] = {}  # bindings of one rule share their rows
        for binding in bindings:
            key = (id(layout), binding.rule)
            if key not in self._selections:
                self._selections[key] = select(layout, binding.rule, self.batch.spans)
            selection = self._selections[key]
            ids = self.batch.ids_of(binding, layout, selection)
            if binding.rule not in gathered:
                gathered[binding.rule] = _gather(flat, selection)
            tokens = self._tokens(layout) if binding.observes else None
            self.staged.append(Staged(binding, layout, selection, ids, *gathered[binding.rule], tokens))

    def commit(self) -> None:
        """Hand over all that is staged; when a sink raises, what comes after it is rolled back."""
        known: dict[tuple[object, ...], Whose] = {}
        for done, staged in enumerate(self.staged, 1):
            try:
                with staged.binding.held:
                    staged.hand_over(self.batch, known)
            except BaseException:
                for rest in self.staged[done:]:
                    rest.roll_back()
                raise
        ranked = [layout for layout in self._layouts.values() if layout.ranked]
        self.batch.advance(self.call, ranked[0].shown() if ranked else None)

    def roll_back(self) -> None:
        """Count all that is staged as never handed over."""
        for staged in self.staged:
            staged.roll_back()

    def _layout(self, hook_point: str, hidden: Tensor) -> Layout:
        shape = tuple(hidden.shape[:-1])
        if shape not in self._layouts:
            layout = self._new_layout(hook_point, shape)
            self._check_requests(layout)
            self._layouts[shape] = layout
        return self._layouts[shape]

    def _new_layout(self, hook_point: str, shape: tuple[int, ...]) -> Layout:
        batch, call, rows = self.batch, self.call, math.prod(shape)
        if batch.cu_seqlens is not None:
            return packed_layout(rows, batch.cu_seqlens, batch.seen)
        if len(shape) not in (1, 2):
            raise ShapeError(
                f"hook point {hook_point!r}: output", expected="[B, T, D] or [N, D]", got=f"{len(shape) + 1} axes"
            )
        if len(shape) == 1:
            if call.size is None or rows == call.size[0] != math.prod(call.size):  # rows, or one a sequence
                return plain_layout(rows)
            if rows != math.prod(call.size):  # as an expert sees the tokens that were sent to it
                if call.mask is None or bool(call.mask.all()):
                    return plain_layout(rows)
                raise ShapeError(
                    f"hook point {hook_point!r}: rows that cannot be told from padding",
                    expected=f"{math.prod(call.size)}, the tokens {list(call.size)} flattened",
                    got=rows,
                    way_out="Feed batches without padding, or give tap.batch(cu_seqlens=...) for packed sequences.",
                )
            shape = call.size  # as a router sees them
        b, t = shape
        ahead = max(call.size[1] - t, 0) if call.size else 0  # a module that sees the last tokens only, such as a head
        layout = padded_layout((b, t), call.mask, call.past + ahead, batch.seen)
        written, shown = batch.written_from(call), call.shown
        if written is None or b == 1 or shown is None or tuple(shown.shape) != (b, t):
            return layout
        return without_stops(layout, shown, written, self._stops)

    def _tokens(self, layout: Layout) -> Tensor | None:
        """Token ids of a layout's positions, where the call shows one for each."""
        shown = self.call.shown
        if shown is None or shown.is_floating_point() or shown.numel() != math.prod(layout.shape):
            return None
        return shown.detach().reshape(-1).cpu()

    def _check_requests(self, layout: Layout) -> None:
        requests = self.batch.requests
        if requests is not None and len(requests) != layout.sequences:
            raise ArgumentError("requests", expected=f"{layout.sequences} ids, one a sequence", got=len(requests))


def _gather(flat: Tensor, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """Selected rows [n, D] of flat [N, D], their norms [n] float64 and whether they are finite [n]; zeros where not."""
    n = len(selection.index)
    rows = flat.new_empty(n, flat.shape[1])
    norms = flat.new_empty(n, dtype=torch.float64)
    finite = flat.new_empty(n, dtype=torch.bool)
    ops.stage(flat, None if n == len(flat) else selection.index.to(flat.device), rows, norms, finite)
    return rows, norms.cpu(), finite.cpu()


@contextlib.contextmanager
def outside_autograd() -> Iterator[None]:
    """Sinks get plain tensors, whatever mode the model runs in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def in_backward() -> bool:
    """Whether this thread is inside an autograd backward: torch says so only by a private call."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() >= 0
