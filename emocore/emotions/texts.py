"""Texts into a model: tokenised once, batched by length, padded on either side, run under a tap."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

LONGEST = 4096  # tokens, where neither model nor tokenizer names a limit


class TextBatch(NamedTuple):
    """Places [B] of its texts in the list they came from, input_ids [B, T], attention_mask [B, T], and the padding
    id.
    """

    places: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    pad: int


def longest(model: nn.Module, tokenizer: Any) -> int:
    """Most tokens that model and tokenizer take."""
    config = getattr(model, "config", None)
    limits = (getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None))
    return min(n for n in (*limits, LONGEST) if n)


class Encoded(NamedTuple):
    """Token ids of one text, special tokens included, and where each token stands in it (an empty span for special
    ones).
    """

    ids: list[int]
    spans: list[tuple[int, int]]


def encode(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], max_length: int | None = None, special: bool = True
) -> list[Encoded]:
    """Every text tokenised, cut at what model and tokenizer can take; raises ArgumentError for texts without a
    token.
    """
    if not texts:
        raise ArgumentError("texts: none given", way_out="Give at least one text.")
    if not getattr(tokenizer, "is_fast", False):
        raise ArgumentError(
            "tokenizer",
            expected="a fast Hugging Face tokenizer, which knows each token's place",
            got=type(tokenizer).__name__,
        )
    limit = min(max_length or LONGEST, longest(model, tokenizer))
    found = tokenizer(
        list(texts), truncation=True, max_length=limit, add_special_tokens=special, return_offsets_mapping=True
    )
    encoded = [Encoded(ids, spans) for ids, spans in zip(found["input_ids"], found["offset_mapping"], strict=True)]
    empty = [i for i, text in enumerate(encoded) if not text.ids]
    if empty:
        raise ArgumentError("texts: some give no token", got=f"places {empty[:8]}", way_out="Leave empty texts out.")
    return encoded


def batches(tokenizer: Any, encoded: Sequence[Encoded], size: int, left: bool | None = None) -> Iterator[TextBatch]:
    """Batches of texts of like length, so that little is padding; padded on the tokenizer's own side unless told."""
    pad = next(
        (i for name in ("pad", "eos", "unk") if (i := getattr(tokenizer, f"{name}_token_id", None)) is not None), 0
    )
    left = getattr(tokenizer, "padding_side", "right") == "left" if left is None else left
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].ids), i))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        width = max(len(encoded[i].ids) for i in places)
        ids = torch.full((len(places), width), pad)
        mask = torch.zeros(len(places), width, dtype=torch.long)
        for row, i in enumerate(places):
            at = slice(width - len(encoded[i].ids), None) if left else slice(len(encoded[i].ids))
            ids[row, at] = torch.tensor(encoded[i].ids)
            mask[row, at] = 1
        yield TextBatch(places, ids, mask, pad)


def run(model: nn.Module, batch: TextBatch) -> Any:
    """One forward of a batch, without gradients, on the model's device."""
    device = next(model.parameters()).device
    return model(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))


class Progress:
    """tqdm's progress bar over tokens (or another unit), where tqdm is there and stderr a terminal or `show` says
    so.
    """

    def __init__(self, what: str, total: int, show: bool | None = None, unit: str = "tokens") -> None:
        self.done = 0
        self.started = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty() if show is None else show:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True)

    def step(self, n: int) -> None:
        """Count what went through."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)

    def close(self) -> float:
        """End the bar; returns the seconds it took."""
        if self._bar is not None:
            self._bar.close()
        return time.perf_counter() - self.started
