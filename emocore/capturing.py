"""Capture: hooks that stage the selected rows of a forward and hand them to any sink when the forward has ended well.

A forward is a transaction. The root's pre-hook begins it, each hook point stages its rows, the root's post-hook
commits them all. A forward that an exception ends is rolled back, at the latest by the next begin or by the end of the
capture: nothing of it reaches a sink. What fires inside a backward is recomputation by checkpointing, and is counted
as such.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Call
from .errors import ArgumentError, CaptureError, TokenError
from .forwards import Forward, in_backward, outside_autograd
from .hookpoints import HookSpec, bare, read_output, resolve, token_ids
from .labels import Labels
from .lanes import Lane
from .resident import hooks, residence
from .sinks import Binding, Bound, bind, check_sinks, is_factory
from .tokens import Spans, Tokens

_open_batches: ContextVar[Mapping[int, Batch] | None] = ContextVar("emocore_open_batches", default=None)


class Tap:
    """An open capture: `batch` says whose rows come next, `sinks` and `ledger` hold what came. Made by `capture`."""

    def __init__(
        self,
        model: nn.Module,
        points: dict[str, list[Binding]],
        sinks: dict[str, Any],
        fires: int,
        optional: bool,
        training: bool | None,
        device: torch.device | None,
    ) -> None:
        self.model = model
        self.sinks = sinks
        self._committed = 0
        self._points = points
        self._fires, self._optional, self._training = fires, optional, training
        self._modules = dict(model.named_modules())
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._forwards: dict[int, Forward | None] = {}  # by thread; None is one that is not to be captured
        self._batches: list[Batch] = []
        self._lock = threading.Lock()  # of sinks and ledgers
        self._signature = inspect.signature(bare(model).forward)
        self._lane = None if device is None else Lane(model, points, optional, device, training, self._current)
        self._collecting = False

    @property
    def resident(self) -> bool:
        """Whether rows and sums stay on the model's device until they are asked for."""
        return self._lane is not None

    @property
    def committed(self) -> int:
        """Forwards that have ended well."""
        return self._committed if self._lane is None else self._lane.committed

    @property
    def ledger(self) -> dict[str, Any]:
        """Ledger by hook point; a tuple of ledgers where a hook point has several sinks."""
        self._collect()
        return {
            name: bindings[0].ledger if len(bindings) == 1 else tuple(b.ledger for b in bindings)
            for name, bindings in self._points.items()
        }

    # --- whose rows come next

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
        self._check_labels(batch)
        if self._lane is not None:
            self._lane.enter(batch)
        token = _open_batches.set({**(_open_batches.get() or {}), id(self): batch})
        self._batches.append(batch)
        try:
            with self._closing(batch):
                yield batch
        finally:
            self._batches.remove(batch)
            _open_batches.reset(token)
            if self._lane is not None:
                self._lane.leave(batch)

    def gate(self, forwards: int = 1) -> None:
        """Wait until the device has room for so many replays of a CUDA graph that was recorded inside this capture.

        A replay runs no Python, so it cannot wait by itself: rows that go to an ActivationStore want this before each.
        Forwards that run as code need no gate. Raises what the store has failed with, and ArgumentError for more
        forwards than there is memory for at once.
        """
        if self._lane is not None:
            self._lane.gate(forwards)

    def _current(self) -> Batch | None:
        """The batch of this context, else the one open batch (threads that a library starts have no context)."""
        batch = (_open_batches.get() or {}).get(id(self))
        if batch is None and len(self._batches) > 1:
            raise CaptureError(
                "tap.batch: several batches are open and this thread belongs to none",
                way_out="Open tap.batch in the thread that runs the forward.",
            )
        return batch or (self._batches[0] if self._batches else None)

    def _check_labels(self, batch: Batch) -> None:
        for bindings in self._points.values():
            for binding in bindings:
                batch.ids(binding.labels)

    @contextlib.contextmanager
    def _closing(self, batch: Batch) -> Iterator[None]:
        """Form the pooled rows of a batch at its end; those of one that an exception ended are dropped."""
        try:
            yield
        except BaseException:
            self._roll_back(threading.get_ident())
            self._close(batch, keep=False)
            raise
        self._close(batch, keep=True)

    def _close(self, batch: Batch, keep: bool) -> None:
        if self._lane is not None:
            with self._holding(self._lane) as lane, outside_autograd():
                lane.close(batch, keep)
        pools, batch.pools = batch.pools, {}
        failed: BaseException | None = None
        with self._lock, outside_autograd():
            for binding, pool in pools.items():
                try:
                    ids = batch.ids(binding.labels)
                    with binding.held:
                        binding.form(pool.close(), ids, keep and failed is None, batch.requests, batch)
                except BaseException as error:
                    failed = error
        if failed is not None:
            raise failed
        self._settle()

    def _settle(self) -> None:
        """Tell the sinks that ask for it that no forward is half handed over."""
        with self._lock, outside_autograd():
            for binding in (b for bindings in self._points.values() for b in bindings):
                brought = self._lane is not None and binding.rule.pool is None  # by another thread, which tells them
                if hasattr(binding.sink, "settle") and not brought:
                    binding.sink.settle()

    # --- begin, stage, commit

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        thread = threading.get_ident()
        self._roll_back(thread)
        if self._training not in (None, module.training):
            self._forwards[thread] = None
            return
        batch = self._current()
        implicit = batch is None
        batch = batch or Batch()
        call = Call.of(self._given(args, kwargs), batch)
        if call.mask is None and batch.cu_seqlens is None and call.shown is not None:
            self._check_padding(call.shown[:, : batch.written_from(call)])
        batch.check(call)
        self._check_labels(batch)
        self._forwards[thread] = Forward(batch, implicit, call, token_ids(self.model, "eos", "pad"))

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(self._signature.bind_partial(*args, **kwargs).arguments) | kwargs
        except TypeError:  # the model's own call will say what is wrong with its arguments
            return kwargs

    def _check_padding(self, ids: Tensor) -> None:
        for pad in token_ids(self.model, "pad") - token_ids(self.model, "eos"):
            if not ids.is_floating_point() and pad in ids:
                raise TokenError(
                    f"attention_mask: none was given, yet the batch holds the padding id {pad}",
                    way_out="Pass the tokenizer's attention_mask to the model, or tap.batch(mask=...).",
                )

    def _fire(self, hook_point: str, output: Any) -> None:
        hidden = read_output(output)
        thread = threading.get_ident()
        if in_backward():
            self._count(hook_point, hidden, "recomputed")
        elif thread not in self._forwards:
            self._count(hook_point, hidden, "orphan")
            root = type(self.model).__name__
            raise CaptureError(
                f"hook point {hook_point!r}: ran outside a forward of the captured model",
                expected=f"a call of {root} itself",
                way_out=f"Call the {root} that was given to capture, or capture the module that you call.",
            )
        elif (forward := self._forwards[thread]) is not None:
            with outside_autograd():
                forward.stage(hook_point, self._points[hook_point], hidden)

    def _count(self, hook_point: str, hidden: Tensor, what: str) -> None:
        n = hidden.shape[:-1].numel()
        with self._lock:
            for binding in self._points[hook_point]:
                with binding.held:
                    binding.ledger.tokens.add(offered=n, **{what: n})

    def _commit(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward():
            return
        thread = threading.get_ident()
        forward = self._forwards.get(thread)
        if forward is None:
            self._forwards.pop(thread, None)
            return
        for hook_point in self._points:
            seen = forward.fires.get(hook_point, 0)
            if seen != self._fires and not self._optional:
                self._roll_back(thread)
                raise CaptureError(
                    f"hook point {hook_point!r}: did not run as declared in this forward",
                    expected=f"{self._fires} time(s)",
                    got=seen,
                    way_out="Give capture(fires=...) for a module that is shared, optional=True for one that may be "
                    "skipped; hooks on a model that was compiled before never run.",
                )
        del self._forwards[thread]
        closing = self._closing(forward.batch) if forward.implicit else contextlib.nullcontext()
        with closing, self._lock, outside_autograd():
            self._record(forward)
            forward.commit()
            self._committed += 1
        self._settle()

    def _abandon(self, module: nn.Module, args: Any, output: Any) -> None:
        """Roll back at once what an exception has ended; torch does not call this for a KeyboardInterrupt."""
        if not in_backward():
            self._roll_back(threading.get_ident())

    def _record(self, forward: Forward) -> None:
        for hook_point, bindings in self._points.items():
            seen = forward.fires.get(hook_point, 0)
            for binding in bindings:
                with binding.held:
                    binding.ledger.fires.add(expected=seen if self._optional else self._fires, seen=seen)
                    binding.ledger.forwards += 1
                    binding.ledger.unmasked += forward.unmasked

    def _roll_back(self, thread: int) -> None:
        if self._lane is not None:
            self._lane.abandon()
        forward = self._forwards.pop(thread, None)
        if forward is not None:
            with self._lock:
                forward.roll_back()

    # --- open and close

    def __enter__(self) -> Tap:
        if self._handles:
            raise CaptureError("capture: this tap is open already", way_out="Make one `capture(...)` for each `with`.")
        for bindings in self._points.values():
            for binding in bindings:
                if hasattr(binding.sink, "tokens"):
                    binding.sink.tokens = binding.rule
                if self._lane is not None:
                    binding.sink._resident = self._collect  # type: ignore[attr-defined]
        if self._lane is not None:
            self._handles = hooks(self._lane, self.model, [self._modules[name] for name in self._points])
            return self
        self._handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name in self._points:
            self._handles.append(self._modules[name].register_forward_hook(_stager(self, name)))
        self._handles.append(self.model.register_forward_hook(self._commit))
        self._handles.append(self.model.register_forward_hook(self._abandon, always_call=True))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for thread in list(self._forwards):
            self._roll_back(thread)
        for batch in self._batches:
            self._close(batch, keep=False)
        try:
            if self._lane is not None:
                self._lane.abandon(every=True)
                with contextlib.nullcontext() if kind is None else contextlib.suppress(Exception):
                    self._collect()
                if kind is None:
                    self._lane.raise_faults()
            if kind is None:
                self.check()
        finally:
            self._release()

    def _collect(self) -> None:
        """Fetch what the device holds, for whoever reads a sink or a ledger."""
        if self._lane is not None and not self._collecting:
            with self._holding(self._lane) as lane:
                lane.collect()

    @contextlib.contextmanager
    def _holding(self, lane: Lane) -> Iterator[Lane]:
        """The lane for one who hands its rows to the sinks: they must not ask for them meanwhile."""
        with self._lock:
            self._collecting = True
            try:
                yield lane
            finally:
                self._collecting = False

    def _release(self) -> None:
        """Let the sinks go; the lane and its memory end with the tap's last reference."""
        if self._lane is not None:
            self._lane.end()
        for bindings in self._points.values():
            for binding in bindings:
                if self._lane is not None:
                    binding.sink._resident = None  # type: ignore[attr-defined]

    def check(self) -> None:
        """Raise unless at least one forward was committed, no batch is open, and every ledger adds up."""
        if self._batches:
            raise CaptureError(
                "tap.batch: still open at the end of the capture", way_out="Close it inside the `with` block."
            )
        if self.committed == 0:
            raise CaptureError(
                "capture: no forward of the model was seen",
                expected="at least one",
                way_out=f"Call the {type(self.model).__name__} inside the `with` block.",
            )
        for hook_point, bindings in self._points.items():
            for binding in bindings:
                binding.ledger.check(f"hook point {hook_point!r}")


def _stager(tap: Tap, hook_point: str) -> Callable[..., None]:
    def stage(module: nn.Module, args: Any, output: Any) -> None:
        tap._fire(hook_point, output)

    return stage


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
    _check_model(model)
    check_sinks(points)
    order = [name for name, _ in model.named_modules() if name in points]
    points = {n: points[n] for n in order}
    device = residence(model, points, fires, resident)
    return Tap(model, points, {n: sinks[n] for n in order}, fires, optional, training, device)


def _check_model(model: nn.Module) -> None:
    if "decoder_input_ids" in inspect.signature(bare(model).forward).parameters:
        raise ArgumentError(
            f"model: {type(model).__name__} has two token streams, an encoder's and a decoder's",
            way_out="Give capture the encoder or the decoder; it is captured while the whole model runs.",
        )
