"""Batches: which sequences are in the model, what a call shows of them, and what earlier calls have shown."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CaptureError, LabelError, ShapeError, TokenError
from .labels import Labels, encode_labels
from .pooling import Pool
from .sinks import Binding
from .tokens import Layout, Selection, Spans

CACHES = ("past_key_values", "cache")  # names of a forward's key-value cache in transformers, older and newer


@dataclass(frozen=True)
class Call:
    """What a call of the model says of its tokens.

    shown: ids [B, T] or embeddings [B, T, D]; size: (B, T); mask [B, past + T]; past: tokens in the cache before.
    """

    shown: Tensor | None = None
    size: tuple[int, ...] | None = None
    mask: Tensor | None = None
    past: int = 0

    @classmethod
    def of(cls, arguments: Mapping[str, Any], batch: Batch) -> Call:
        """Read the arguments of a forward; raises ShapeError for a mask that does not tell tokens from padding."""
        shown = arguments.get("input_ids")
        shown = arguments.get("inputs_embeds") if shown is None else shown
        size = tuple(shown.shape[:2]) if isinstance(shown, Tensor) and shown.dim() > 1 else None
        cache = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
        length = getattr(cache, "get_seq_length", None)
        past = int(length()) if callable(length) else 0
        mask = arguments.get("attention_mask") if batch.mask is None else batch.mask_of(size, past)
        if mask is not None:
            _check_mask(mask, size, past, exact=past > 0 or batch.mask is not None)
        if size is None:
            shown = _first_tokens(arguments)
            size = None if mask is None else tuple(mask.shape)
        return cls(shown, size, mask, past)


def _check_mask(mask: Any, size: tuple[int, ...] | None, past: int, exact: bool) -> None:
    fits = isinstance(mask, Tensor) and mask.dim() == 2
    if fits and size is not None:
        width = past + size[1]
        fits = mask.shape[0] == size[0] and (mask.shape[1] == width if exact else mask.shape[1] >= width)
    if not fits:
        raise ShapeError(
            "attention_mask",
            expected="[B, T], or [B, past + T] while decoding" if size is None else [size[0], past + size[1]],
            got=list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__,
            way_out="Give the 2-D padding mask of the tokens: in tap.batch(mask=...) where the model takes another.",
        )


def _first_tokens(arguments: Mapping[str, Any]) -> Tensor | None:
    """The first argument of a model with names of its own, where it can be ids [B, T] or hidden states [B, T, D]."""
    first = next(iter(arguments.values()), None)
    tokens = isinstance(first, Tensor) and first.dim() >= (3 if first.is_floating_point() else 2)
    return first if tokens else None


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
        self.sequences: int | None = None  # of a capture on the device, once a forward has shown them
        self.pools: dict[Binding, Pool] = {}
        self._prompt: int | None = None  # positions after the first forward
        self._shown: Tensor | None = None  # of the last forward without a cache
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

    def ids_of(self, binding: Binding, layout: Layout, selection: Selection) -> Tensor | None:
        """Label ids of what a binding forms: one a selected token, or one a sequence where it pools."""
        ids = self.ids(binding.labels)
        if ids is None:
            return None
        pooled = binding.rule.pool is not None
        if tuple(ids.shape) == (layout.sequences,):
            return ids if pooled else ids[selection.sequence]
        if not pooled and tuple(ids.shape) in (layout.shape, (1, *layout.shape)):
            return ids.reshape(-1)[selection.index]
        raise ShapeError(
            "labels: of pooled rows" if pooled else "labels",
            expected=f"[{layout.sequences}], one a sequence" + ("" if pooled else f", or {list(layout.shape)}"),
            got=list(ids.shape),
        )

    def mask_of(self, size: tuple[int, ...] | None, past: int) -> Tensor | None:
        """The batch's own mask for a forward of `size` (B, T); what is generated after the prompt it covers is real."""
        if self.mask is None or size is None or self._prompt is None:
            return self.mask
        more = past + size[1] - max(self._prompt, self.mask.shape[1])
        return self.mask if more <= 0 else torch.cat([self.mask, self.mask.new_ones(len(self.mask), more)], 1)

    def check(self, call: Call) -> None:
        """Raise TokenError when a forward shows other tokens than the batch's forwards before it."""
        before, now = self._shown, call.shown
        if call.past or before is None or now is None:
            return
        n = min(before.shape[1], now.shape[1])
        if before.shape[0] != now.shape[0] or not torch.equal(before[:, :n], now[:, :n]):
            raise TokenError(
                "tap.batch: its forwards show different sequences",
                expected="the same tokens again, or their continuation",
                way_out="Open one tap.batch for each batch of sequences.",
            )

    def advance(self, call: Call, seen: Tensor | None) -> None:
        """Remember what a committed forward has shown."""
        self.seen = self.seen if seen is None else seen
        if self._prompt is None and call.size is not None:
            self._prompt = call.past + call.size[1]
        if not call.past:
            self._shown = call.shown

    def written_from(self, call: Call) -> int | None:
        """Where in a call that decodes one more token the tokens begin that the model itself wrote; else None."""
        if call.past:
            return 0 if call.size is not None and call.size[1] == 1 else None
        before, now = self._shown, call.shown
        return self._prompt if before is not None and now is not None and now.shape[1] == before.shape[1] + 1 else None


_of_context: ContextVar[Mapping[int, Batch] | None] = ContextVar("emocore_open_batches", default=None)


class Batches:
    """The open batches of one capture."""

    def __init__(self) -> None:
        self.open: list[Batch] = []

    @contextlib.contextmanager
    def opened(self, batch: Batch) -> Iterator[None]:
        """The forwards of this context show `batch` inside."""
        token = _of_context.set({**(_of_context.get() or {}), id(self): batch})
        self.open.append(batch)
        try:
            yield
        finally:
            self.open.remove(batch)
            _of_context.reset(token)

    def current(self) -> Batch | None:
        """The batch of this context, else the one open batch (threads that a library starts have no context)."""
        batch = (_of_context.get() or {}).get(id(self))
        if batch is None and len(self.open) > 1:
            raise CaptureError(
                "tap.batch: several batches are open and this thread belongs to none",
                way_out="Open tap.batch in the thread that runs the forward.",
            )
        return batch or (self.open[0] if self.open else None)
