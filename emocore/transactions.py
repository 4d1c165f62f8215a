"""Transactions: the forwards of a capture by way of the host, whose rows go to their sinks at every commit."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, Call
from .errors import CaptureError, TokenError
from .forwards import Forward, in_backward, outside_autograd
from .hookpoints import bare, read_output, token_ids
from .sinks import Binding
from .ways import Way


class Transactions(Way):
    """The open forwards of a capture, one a thread at most; `fires` is how often a module runs in each."""

    resident = False

    def __init__(
        self,
        model: nn.Module,
        points: Mapping[str, Sequence[Binding]],
        fires: int,
        optional: bool,
        training: bool | None,
        current: Callable[[], Batch | None],
    ) -> None:
        super().__init__(model, points, optional, training, current)
        self._fires, self._committed = fires, 0
        self._open: dict[int, Forward | None] = {}  # by thread; None is one that is not to be captured
        self._signature = inspect.signature(bare(model).forward)

    @property
    def committed(self) -> int:
        """Forwards that have ended well."""
        return self._committed

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Put the hooks on the model."""
        stages = zip(self._modules, self.points, strict=True)
        return [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(module.register_forward_hook(self._stager(name)) for module, name in stages),
            self.model.register_forward_hook(self._commit),
            self.model.register_forward_hook(self._ended, always_call=True),
        ]

    # --- begin

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        self.abandon()
        thread = threading.get_ident()
        if self._training not in (None, module.training):
            self._open[thread] = None
            return
        batch = self._current()
        implicit = batch is None
        batch = batch or Batch()
        call = Call.of(self._given(args, kwargs), batch)
        if call.mask is None and batch.cu_seqlens is None and call.shown is not None:
            self._check_padding(call.shown[:, : batch.written_from(call)])
        batch.check(call)
        self.check_labels(batch)
        self._open[thread] = Forward(batch, implicit, call, token_ids(self.model, "eos", "pad"))

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

    # --- stage

    def _stager(self, hook_point: str) -> Callable[..., None]:
        def stage(module: nn.Module, args: Any, output: Any) -> None:
            self._stage(hook_point, output)

        return stage

    def _stage(self, hook_point: str, output: Any) -> None:
        hidden = read_output(output)
        thread = threading.get_ident()
        if in_backward():
            self._count(hook_point, hidden, "recomputed")
        elif thread not in self._open:
            self._count(hook_point, hidden, "orphan")
            root = type(self.model).__name__
            raise CaptureError(
                f"hook point {hook_point!r}: ran outside a forward of the captured model",
                expected=f"a call of {root} itself",
                way_out=f"Call the {root} that was given to capture, or capture the module that you call.",
            )
        elif (forward := self._open[thread]) is not None:
            with outside_autograd():
                forward.stage(hook_point, self.points[hook_point], hidden)

    def _count(self, hook_point: str, hidden: Tensor, what: str) -> None:
        n = hidden.shape[:-1].numel()
        with self._lock:
            for binding in self.points[hook_point]:
                with binding.held:
                    binding.ledger.tokens.add(offered=n, **{what: n})

    # --- commit, or roll back

    def _commit(self, module: nn.Module, args: Any, output: Any) -> None:
        if in_backward():
            return
        thread = threading.get_ident()
        forward = self._open.get(thread)
        if forward is None:
            self._open.pop(thread, None)
            return
        self._check_fires(forward)
        del self._open[thread]
        closing = self.closing(forward.batch) if forward.implicit else contextlib.nullcontext()
        with closing, self._lock, outside_autograd():
            self._record(forward)
            forward.commit()
            self._committed += 1
        self._settle()

    def _check_fires(self, forward: Forward) -> None:
        """Roll back a forward in which a hook point did not run as declared, and raise."""
        for hook_point in self.points:
            seen = forward.fires.get(hook_point, 0)
            if seen != self._fires and not self._optional:
                self.abandon()
                raise CaptureError(
                    f"hook point {hook_point!r}: did not run as declared in this forward",
                    expected=f"{self._fires} time(s)",
                    got=seen,
                    way_out="Give capture(fires=...) for a module that is shared, optional=True for one that may be "
                    "skipped; hooks on a model that was compiled before never run.",
                )

    def _record(self, forward: Forward) -> None:
        for hook_point, bindings in self.points.items():
            seen = forward.fires.get(hook_point, 0)
            for binding in bindings:
                with binding.held:
                    binding.ledger.fires.add(expected=seen if self._optional else self._fires, seen=seen)
                    binding.ledger.forwards += 1
                    binding.ledger.unmasked += forward.unmasked

    def _ended(self, module: nn.Module, args: Any, output: Any) -> None:
        """Roll back at once what an exception has ended; torch does not call this for a KeyboardInterrupt."""
        if not in_backward():
            self.abandon()

    def abandon(self, every: bool = False) -> None:
        """Roll back this thread's forward, or `every` one's, which ended without its commit."""
        for thread in list(self._open) if every else [threading.get_ident()]:
            forward = self._open.pop(thread, None)
            if forward is not None:
                with self._lock:
                    forward.roll_back()

    def close(self, batch: Batch, keep: bool) -> None:
        """Form the pooled rows of a batch that has ended, or drop them; where one sink fails, those after it are."""
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

    # --- what nothing is left to do for, as the sinks have every row at its commit

    def enter(self, batch: Batch) -> None:
        """A forward finds its batch."""

    def leave(self, batch: Batch) -> None:
        """A forward finds it no longer."""

    def gate(self, forwards: int) -> None:
        """A replay brings no rows to the host, and needs no room."""

    def collect(self) -> None:
        """Nothing is on its way."""

    def end(self, well: bool) -> None:
        """Nothing is held, and what failed has been raised."""
