"""Sinks: what rows are handed to, and how one is bound to a hook point with its token rule and its ledger."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from .errors import ArgumentError
from .ledger import Ledger
from .pooling import Pooled
from .tokens import Tokens

Bound: TypeAlias = Any  # a sink, (sink, Tokens), a list of either, or a factory of any of these


class Sink(Protocol):
    """What rows are handed to; they may be other sinks' too, so it must not change them.

    A sink that has `absorb(rows, ids, norms)` gets the token norms too and counts its rows itself; one that has
    `observe(observed)` gets whose every row is, and pooled rows only where its `pools` is true; one that has `settle()`
    is told when no forward is half handed over; one that has a re-entrant `ledger_lock` finds it held whenever its
    ledger does not add up. What has `at(hook_point)` gives each hook point a sink of its own.
    """

    def update(self, x: Tensor, labels: Any = None) -> None:
        """Take rows [N, D] and their label ids [N], or None."""


@dataclass(frozen=True, eq=False)
class Whose:
    """Whose N rows are: of which of the batch's `sequences` [N], and of which rank in it [N]; -1 for a pooled row.

    `ids` [N] are label ids where the sink keeps labels, `tokens` [N] token ids where the model was shown any; `batch`
    is the same object in every forward of a batch, None outside of captures. Hook points whose rows are of the same
    tokens may be given the same object.
    """

    sequence: Tensor
    rank: Tensor
    sequences: int
    requests: Sequence[str] | None
    ids: Tensor | None = None
    tokens: Tensor | None = None
    batch: object = None

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True, eq=False)
class Observed:
    """Finite rows [N, D] of one hook point in one forward, and whose they are."""

    hook_point: str
    rows: Tensor
    whose: Whose


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

    @property
    def observes(self) -> bool:
        """Whether the sink follows sequences."""
        return hasattr(self.sink, "observe")

    @property
    def held(self) -> contextlib.AbstractContextManager[object]:
        """To be held from counting to having handed over: others may save the sink's ledger meanwhile."""
        return getattr(self.sink, "ledger_lock", None) or contextlib.nullcontext()

    def hand_over(self, rows: Tensor | Observed, ids: Tensor | None, norms: Tensor) -> None:
        """Give formed, finite rows to the sink; those that it refuses by raising are counted as dropped.

        What the sink counts itself is not counted again.
        """
        n = len(rows.rows if isinstance(rows, Observed) else rows)
        counts = self.ledger.rows
        before = counts.missing
        counts.add(formed=n)
        try:
            if isinstance(rows, Observed):
                self.sink.observe(rows)  # type: ignore[attr-defined]
            elif hasattr(self.sink, "absorb"):
                self.sink.absorb(rows, ids, norms)
            else:
                self.sink.update(rows, ids)
        except BaseException:
            counts.add(dropped=counts.missing - before)
            raise
        counts.add(accumulated=counts.missing - before)

    def form(
        self,
        pooled: Pooled,
        ids: Tensor | None,
        keep: bool,
        requests: Sequence[str] | None = None,
        batch: object = None,
    ) -> None:
        """Hand over the pooled rows of a batch with their sequences' label ids [S]; or drop them."""
        lost = {name: getattr(pooled, name) for name in ("too_short", "nonfinite", "overrange")}
        self.ledger.rows.add(formed=sum(lost.values()), **lost)
        if keep:
            ids = None if ids is None else ids[pooled.sequence]
            rows: Tensor | Observed = pooled.rows
            if self.observes:
                rank, several = torch.full_like(pooled.sequence, -1), pooled.sequences
                whose = Whose(pooled.sequence, rank, several, requests, ids, batch=batch)
                rows = Observed(self.hook_point, pooled.rows, whose)
            self.hand_over(rows, ids, pooled.norms)
            if pooled.norm_count and hasattr(self.sink, "count_norms"):
                self.sink.count_norms(pooled.norm_sum, pooled.norm_count)
        else:
            self.ledger.rows.add(formed=len(pooled.rows), dropped=len(pooled.rows))


def is_factory(bound: Bound) -> bool:
    sink = hasattr(bound, "update") or hasattr(bound, "observe")
    return isinstance(bound, type) or (callable(bound) and not sink)


def bind(hook_point: str, one: Bound, rule: Tokens) -> Binding:
    sink, rule = one if isinstance(one, tuple) else (one, rule)
    sink = sink() if is_factory(sink) else sink
    sink = sink.at(hook_point) if hasattr(sink, "at") else sink
    if not (hasattr(sink, "update") or hasattr(sink, "observe")):
        raise ArgumentError(
            f"sink at {hook_point!r}", expected="an object with update(x, labels)", got=type(sink).__name__
        )
    binding = Binding(hook_point, sink, rule, getattr(sink, "ledger", None) or Ledger())
    if binding.observes and rule.pool is not None and not getattr(sink, "pools", False):
        raise ArgumentError(f"pool: the sink at {hook_point!r} follows tokens", expected=None, got=rule.pool)
    return binding


def check_sinks(points: Mapping[str, Iterable[Binding]]) -> None:
    owner: dict[int, str] = {}
    for hook_point, bindings in points.items():
        for binding in bindings:
            sink, kind = binding.sink, type(binding.sink).__name__
            if id(sink) in owner:
                raise ArgumentError(
                    f"sink: one {kind} is bound twice, at {owner[id(sink)]!r} and {hook_point!r}",
                    way_out="Pass a factory, such as `lambda: emocore.Moments()`, to get one for each.",
                )
            owner[id(sink)] = hook_point
            held = getattr(sink, "tokens", None)
            if held is not None and held != binding.rule:
                raise ArgumentError(
                    f"tokens: the sink at {hook_point!r} already holds other rows", expected=held, got=binding.rule
                )
