"""Capture: hooks that stage the selected rows of a forward and hand them to any sink when the forward has ended well.

A forward is a transaction. The root's pre-hook begins it, each hook point stages its rows, the root's post-hook commits
them all. A forward that an exception leaves open is rolled back by the next begin, or by leaving the tap: nothing of it
reaches a sink.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .errors import ArgumentError, CaptureError, ShapeError, TokenError
from .forwards import Batch, Binding, Forward, Observed, Staged
from .hookpoints import HookSpec, read_output, resolve
from .labels import Labels
from .ledger import Ledger
from .pooling import Pool
from .tokens import Spans, Tokens

Bound: TypeAlias = Any  # a sink, (sink, Tokens), a list of either, or a factory of any of these

_open_batches: ContextVar[Mapping[int, Batch]] = ContextVar("emocore_open_batches", default={})


class Tap:
    """An open capture: `batch` says whose rows come next, `sinks` and `ledger` hold what came. Made by `capture`."""

    def __init__(
        self, model: nn.Module, points: dict[str, list[Binding]], sinks: dict[str, Any], fires: int, optional: bool
    ) -> None:
        self.model = model
        self.sinks = sinks
        self._points = points
        self._fires, self._optional = fires, optional
        self._modules = dict(model.named_modules())
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._forwards: dict[int, Forward] = {}
        self._batches: list[Batch] = []
        self._lock = threading.Lock()
        self._signature = inspect.signature(model.forward)
        self.committed = 0

    @property
    def ledger(self) -> dict[str, Any]:
        """Ledger by hook point; a tuple of ledgers where a hook point has several sinks."""
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

        `labels` are names or ids, one a sequence or one a position; `mask` [B, T] overrides the model's own attention mask;
        `cu_seqlens` [S + 1] bounds packed sequences; `spans` names ranges of ranks per sequence for Tokens(span=...);
        `requests` names the sequences for sinks that follow them over many batches.
        Raises LabelError, ShapeError or TokenError.
        """
        batch = Batch(labels, mask, cu_seqlens, spans, requests)
        for bindings in self._points.values():
            for binding in bindings:
                batch.ids(binding.labels)
        token = _open_batches.set({**_open_batches.get(), id(self): batch})
        self._batches.append(batch)
        try:
            yield batch
        except BaseException:
            self._close(batch, keep=False)
            raise
        else:
            self._close(batch, keep=True)
        finally:
            self._batches.remove(batch)
            _open_batches.reset(token)

    def _current(self) -> Batch | None:
        """The batch of this context, else the one open batch (threads that a library starts have no context)."""
        batch = _open_batches.get().get(id(self))
        if batch is None and len(self._batches) > 1:
            raise CaptureError(
                "tap.batch: several batches are open and this thread belongs to none",
                way_out="Open tap.batch in the thread that runs the forward.",
            )
        return batch or (self._batches[0] if self._batches else None)

    # --- begin, stage, commit

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._roll_back(threading.get_ident())
        given = self._given(args, kwargs)
        batch = self._current()
        mask = given.get("attention_mask")
        if batch is not None and batch.mask is not None:
            mask = batch.mask
        if mask is None and (batch is None or batch.cu_seqlens is None):
            self._check_padding(given.get("input_ids"))
        forward = Forward(batch or Batch(), batch is None, mask, _past_length(given.get("past_key_values")))
        for bindings in self._points.values():
            for binding in bindings:
                forward.batch.ids(binding.labels)
        self._forwards[threading.get_ident()] = forward

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(self._signature.bind_partial(*args, **kwargs).arguments) | kwargs
        except TypeError:  # the model's own call will say what is wrong with its arguments
            return kwargs

    def _check_padding(self, input_ids: Tensor | None) -> None:
        config = getattr(self.model, "config", None)
        pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
        if pad is None or pad == eos or not isinstance(input_ids, Tensor):
            return
        if bool((input_ids == pad).any()):
            raise TokenError(
                f"attention_mask: none was given, yet the batch holds the padding id {pad}",
                way_out="Pass the tokenizer's attention_mask to the model, or tap.batch(mask=...).",
            )

    def _fire(self, hook_point: str, output: Any) -> None:
        hidden = read_output(output)
        forward = self._forwards.get(threading.get_ident())
        if forward is None:
            self._outside(hook_point, hidden)
            return
        with torch.inference_mode(False), torch.no_grad():
            forward.stage(hook_point, self._points[hook_point], hidden)

    def _outside(self, hook_point: str, hidden: Tensor) -> None:
        """A fire without an open forward: recomputation by checkpointing in a backward, else a call around the root."""
        n = hidden.numel() // max(hidden.shape[-1], 1)
        recompute = _in_backward()
        for binding in self._points[hook_point]:
            binding.ledger.tokens.add(offered=n, **{"recomputed" if recompute else "orphan": n})
        if not recompute:
            root = type(self.model).__name__
            raise CaptureError(
                f"hook point {hook_point!r}: ran outside a forward of the captured model",
                expected=f"a call of {root} itself",
                way_out=f"Call the {root} that was given to capture, or capture the module that you call.",
            )

    def _commit(self, module: nn.Module, args: Any, output: Any) -> None:
        forward = self._forwards.get(threading.get_ident())
        if forward is None:
            return
        for hook_point in self._points:
            seen = forward.fires.get(hook_point, 0)
            if seen != self._fires and not self._optional:
                self._roll_back(threading.get_ident())
                raise CaptureError(
                    f"hook point {hook_point!r}: did not run as declared in this forward",
                    expected=f"{self._fires} time(s)",
                    got=seen,
                    way_out="Give capture(fires=...) for a module that is shared, optional=True for one that may be skipped.",
                )
        with self._lock, torch.inference_mode(False), torch.no_grad():
            del self._forwards[threading.get_ident()]
            self._record(forward)
            for staged in forward.staged:
                self._take(forward.batch, staged)
            forward.batch.seen = forward.shown() if forward.shown() is not None else forward.batch.seen
            self.committed += 1
        if forward.implicit:
            self._close(forward.batch, keep=True)

    def _record(self, forward: Forward) -> None:
        for hook_point, bindings in self._points.items():
            seen = forward.fires.get(hook_point, 0)
            for binding in bindings:
                binding.ledger.fires.add(expected=seen if self._optional else self._fires, seen=seen)
                binding.ledger.forwards += 1
                binding.ledger.unmasked += forward.mask is None

    def _take(self, batch: Batch, staged: Staged) -> None:
        binding, selection = staged.binding, staged.selection
        bad = len(staged.finite) - int(staged.finite.sum())
        binding.ledger.tokens.add(
            offered=selection.offered,
            masked=selection.masked,
            skipped=selection.skipped,
            reseen=selection.reseen,
            nonfinite=bad,
            selected=len(staged.rows) - bad,
        )
        if binding.rule.pool is not None:
            if binding not in batch.pools:
                batch.pools[binding] = Pool(
                    binding.rule.pool, staged.layout.sequences, staged.rows.shape[1], staged.rows.device
                )
            batch.pools[binding].add(
                staged.rows, selection.sequence, staged.finite, staged.norms, selection.counted
            )
            return
        good = staged.finite
        rows = staged.rows[good.to(staged.rows.device)] if bad else staged.rows
        if hasattr(binding.sink, "observe"):
            rank = staged.layout.rank[selection.index]
            binding.observe(
                Observed(
                    binding.hook_point,
                    rows,
                    selection.sequence[good],
                    rank[good],
                    staged.layout.sequences,
                    batch.requests,
                )
            )
            return
        ids = batch.row_ids(binding.labels, staged.layout, selection)
        ids = ids[good] if bad and ids is not None else ids
        binding.hand_over(rows, ids, staged.norms[selection.counted & good])

    def _close(self, batch: Batch, keep: bool) -> None:
        """Form the pooled rows of a batch; those of a batch that an exception ended are dropped, and counted so."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for binding, pool in batch.pools.items():
                pooled = pool.close()
                counts = binding.ledger.rows
                lost = {"too_short": pooled.too_short, "nonfinite": pooled.nonfinite}
                counts.add(formed=sum(lost.values()), **lost)
                if not keep:
                    counts.add(formed=len(pooled.rows), dropped=len(pooled.rows))
                    continue
                ids = batch.ids(binding.labels)
                if ids is not None and ids.dim() != 1:
                    raise ShapeError("labels: of pooled rows", expected="one a sequence", got=list(ids.shape))
                binding.hand_over(pooled.rows, None if ids is None else ids[pooled.sequence], pooled.norms)
            batch.pools.clear()

    def _roll_back(self, thread: int) -> None:
        forward = self._forwards.pop(thread, None)
        for staged in forward.staged if forward else ():
            n = staged.selection.offered
            staged.binding.ledger.tokens.add(offered=n, rolled_back=n)

    # --- open and close

    def __enter__(self) -> Tap:
        self._handles = [self.model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for name in self._points:
            self._handles.append(self._modules[name].register_forward_hook(_stager(self, name)))
        self._handles.append(self.model.register_forward_hook(self._commit))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for thread in list(self._forwards):
            self._roll_back(thread)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise unless at least one forward was committed and every ledger adds up."""
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


def _past_length(cache: Any) -> int:
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else 0


def _in_backward() -> bool:
    """Whether this thread is inside an autograd backward: torch says so only by a private call."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() >= 0


def capture(
    model: nn.Module,
    hook_points: HookSpec | Mapping[Any, Bound],
    sink: Bound = None,
    *,
    tokens: Tokens | None = None,
    fires: int = 1,
    optional: bool = False,
) -> Tap:
    """Hand the selected rows of chosen modules to sinks while the `with` block runs the model; the output is untouched.

    `hook_points` is {hook point: sink}, or a hook point spec beside `sink`: one sink for one module, or a factory called for
    each. A sink may be a `(sink, Tokens)` pair or a list of them, to take sequence and token statistics in one pass; `tokens`
    is the rule of the rest. `fires` is how often a module runs in one forward; `optional` modules may be skipped.
    Raises HookPointError, ArgumentError at once; CaptureError, TokenError, LabelError at a forward; LedgerError at the end.

    >>> from emocore.moments import Moments
    >>> model, stats = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), Moments()
    >>> with capture(model, {"0": stats}):
    ...     out = model(torch.zeros(3, 4))
    >>> stats.count
    3
    """
    rule = tokens or Tokens()
    pairs = hook_points.items() if isinstance(hook_points, Mapping) else [(hook_points, sink)]
    points: dict[str, list[Binding]] = {}
    sinks: dict[str, Any] = {}
    for spec, bound in pairs:
        names = list(resolve(model, spec))
        for name in names:
            if name in points:
                raise ArgumentError(f"hook_points: {name!r} is named twice", way_out="Give a list of sinks for it.")
            made = bound() if _is_factory(bound) else bound
            several = isinstance(made, list)
            points[name] = [_bind(name, one, rule) for one in (made if several else [made])]
            found = tuple(b.sink for b in points[name])
            sinks[name] = found if several else found[0]
    _check_sinks(points)
    order = [name for name, _ in model.named_modules() if name in points]
    return Tap(model, {n: points[n] for n in order}, {n: sinks[n] for n in order}, fires, optional)


def _is_factory(bound: Bound) -> bool:
    return isinstance(bound, type) or (callable(bound) and not hasattr(bound, "update") and not hasattr(bound, "observe"))


def _bind(hook_point: str, one: Bound, rule: Tokens) -> Binding:
    sink, rule = one if isinstance(one, tuple) else (one, rule)
    sink = sink() if _is_factory(sink) else sink
    if not (hasattr(sink, "update") or hasattr(sink, "observe")):
        raise ArgumentError(
            f"sink at {hook_point!r}", expected="an object with update(x, labels)", got=type(sink).__name__
        )
    return Binding(hook_point, sink, rule, getattr(sink, "ledger", None) or Ledger())


def _check_sinks(points: Mapping[str, Sequence[Binding]]) -> None:
    owner: dict[int, str] = {}
    for hook_point, bindings in points.items():
        for binding in bindings:
            before = owner.setdefault(id(binding.sink), hook_point)
            if before != hook_point or sum(b.sink is binding.sink for b in bindings) > 1:
                raise ArgumentError(
                    f"sink: one {type(binding.sink).__name__} is bound twice, at {before!r} and {hook_point!r}",
                    way_out="Pass a factory, such as `lambda: emocore.Moments()`, to get one for each.",
                )
            if hasattr(binding.sink, "tokens"):
                held = binding.sink.tokens
                if held is not None and held != binding.rule:
                    raise ArgumentError(
                        f"tokens: the sink at {hook_point!r} already holds other rows",
                        expected=held,
                        got=binding.rule,
                    )
                binding.sink.tokens = binding.rule
