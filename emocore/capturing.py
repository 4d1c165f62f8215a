"""Capture: a tap on a model, which hands the selected rows of its forwards to any sink, and says whose they are."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Batches
from .errors import ArgumentError, CaptureError
from .hookpoints import HookSpec, bare, resolve
from .labels import Labels
from .lanes import Lane
from .resident import residence
from .sinks import Binding, Bound, bind, check_sinks, is_factory
from .tokens import Spans, Tokens
from .transactions import Transactions
from .ways import Way


class Tap:
    """An open capture: `batch` says whose rows come next, `sinks` and `ledger` hold what came. Made by `capture`."""

    def __init__(self, way: Way, batches: Batches, sinks: dict[str, Any]) -> None:
        self.model = way.model
        self.sinks = sinks
        self._way, self._batches = way, batches
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def resident(self) -> bool:
        """Whether rows and sums stay on the model's device until they are asked for."""
        return self._way.resident

    @property
    def committed(self) -> int:
        """Forwards that have ended well."""
        return self._way.committed

    @property
    def ledger(self) -> dict[str, Any]:
        """Ledger by hook point; a tuple of ledgers where a hook point has several sinks."""
        self._way.collect()
        return {
            name: bindings[0].ledger if len(bindings) == 1 else tuple(b.ledger for b in bindings)
            for name, bindings in self._way.points.items()
        }

    @contextlib.contextmanager
    def batch(
        self,
        labels: Labels | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        spans: Sequence[Spans] | None = None,
        requests: Sequence[str] | None = None,
    ) -> Iterator[Batch]:
        """The forwards inside show one batch of sequences: pooled rows close at the end, tokens shown twice count once.

        `labels` are names or ids, one a sequence or one a position; `mask` [B, T] overrides the model's own attention
        mask; `cu_seqlens` [S + 1] bounds packed sequences; `spans` names ranges of ranks per sequence for
        Tokens(span=...); `requests` names the sequences for sinks that follow them over many batches.
        Raises CaptureError, LabelError, ShapeError or TokenError.
        """
        if not self._handles:
            raise CaptureError("tap.batch: the capture is not open", way_out="Use it inside `with capture(...)`.")
        batch = Batch(labels, mask, cu_seqlens, spans, requests)
        self._way.check_labels(batch)
        self._way.enter(batch)
        try:
            with self._batches.opened(batch), self._way.closing(batch):
                yield batch
        finally:
            self._way.leave(batch)

    def gate(self, forwards: int = 1) -> None:
        """Wait until the device has room for so many replays of a CUDA graph that was recorded inside this capture.

        A replay runs no Python, so it cannot wait by itself: rows that go to an ActivationStore want this before each.
        Forwards that run as code need no gate. Raises what the store has failed with, and ArgumentError for more
        forwards than there is memory for at once.
        """
        self._way.gate(forwards)

    def __enter__(self) -> Tap:
        if self._handles:
            raise CaptureError("capture: this tap is open already", way_out="Make one `capture(...)` for each `with`.")
        for binding in self._way.bindings:
            if hasattr(binding.sink, "tokens"):
                binding.sink.tokens = binding.rule
        self._handles = self._way.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._way.abandon(every=True)
        for batch in self._batches.open:
            self._way.close(batch, keep=False)
        self._way.end(well=kind is None)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise unless at least one forward was committed, no batch is open, and every ledger adds up."""
        if self._batches.open:
            raise CaptureError(
                "tap.batch: still open at the end of the capture", way_out="Close it inside the `with` block."
            )
        if self.committed == 0:
            raise CaptureError(
                "capture: no forward of the model was seen",
                expected="at least one",
                way_out=f"Call the {type(self.model).__name__} inside the `with` block.",
            )
        for binding in self._way.bindings:
            binding.ledger.check(f"hook point {binding.hook_point!r}")


def capture(
    model: nn.Module,
    hook_points: HookSpec | Mapping[Any, Bound],
    sink: Bound = None,
    *,
    tokens: Tokens | None = None,
    fires: int = 1,
    optional: bool = False,
    training: bool | None = None,
    resident: bool | None = None,
) -> Tap:
    """Hand the selected rows of chosen modules to sinks while the `with` block runs the model; its output is untouched.

    `hook_points` is {hook point: sink}, or a hook point spec beside `sink`: one sink for one module, or a factory
    called for each. A sink may be a `(sink, Tokens)` pair or a list of them, to take sequence and token statistics in
    one pass; `tokens` is the rule of the rest. `fires` is how often a module runs in one forward; `optional` modules
    may be skipped. `training` captures only forwards in training mode (True) or in evaluation mode (False).
    `resident` keeps rows and sums on the model's device, without a host synchronisation in the forward, until a sink is
    read or the block ends: by default where the model is on a GPU and every sink is a Moments, a monitor's or an
    ActivationStore, to which rows then go on a thread of its own. Open such a capture before the model is compiled or
    recorded.
    Raises HookPointError, ArgumentError at once; CaptureError, TokenError, LabelError, ShapeError at a forward;
    LedgerError at the end.

    >>> from emocore.moments import Moments
    >>> model, stats = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), Moments()
    >>> with capture(model, {"0": stats}):
    ...     out = model(torch.zeros(3, 4))
    >>> stats.count
    3
    """
    if fires < 1:
        raise ArgumentError("fires", expected="at least 1", got=fires)
    rule = tokens or Tokens()
    pairs = hook_points.items() if isinstance(hook_points, Mapping) else [(hook_points, sink)]
    if not pairs:
        raise ArgumentError("hook_points: none given", way_out="Give {hook point: sink}.")
    points, sinks = _bound(model, pairs, rule)
    _check_model(model)
    check_sinks(points)
    order = [name for name, _ in model.named_modules() if name in points]
    points = {n: points[n] for n in order}
    device = residence(model, points, fires, resident)
    batches = Batches()
    way: Way
    if device is None:
        way = Transactions(model, points, fires, optional, training, batches.current)
    else:
        way = Lane(model, points, optional, device, training, batches.current)
    return Tap(way, batches, {n: sinks[n] for n in order})


def _bound(
    model: nn.Module, pairs: Iterable[tuple[Any, Bound]], rule: Tokens
) -> tuple[dict[str, list[Binding]], dict[str, Any]]:
    """The bindings of every hook point that the specs name, and its sink, or a tuple of them where it has a list."""
    points: dict[str, list[Binding]] = {}
    sinks: dict[str, Any] = {}
    for spec, bound in pairs:
        for name in resolve(model, spec):
            if name in points:
                raise ArgumentError(f"hook_points: {name!r} is named twice", way_out="Give a list of sinks for it.")
            made = bound() if is_factory(bound) else bound
            several = isinstance(made, list)
            points[name] = [bind(name, one, rule) for one in (made if several else [made])]
            found = tuple(b.sink for b in points[name])
            sinks[name] = found if several else found[0]
    return points, sinks


def _check_model(model: nn.Module) -> None:
    if "decoder_input_ids" in inspect.signature(bare(model).forward).parameters:
        raise ArgumentError(
            f"model: {type(model).__name__} has two token streams, an encoder's and a decoder's",
            way_out="Give capture the encoder or the decoder; it is captured while the whole model runs.",
        )
