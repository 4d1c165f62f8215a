"""A model that only shows rows to a capture, so that the capture alone is timed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import emocore

SEQUENCE = 256  # tokens
BOUND_16, ROUNDING = 5e-6, 3e-3  # of a covariance: the contract's, and what rounding adds over sqrt(rows)
DRAIN = ("freeze", "convert", "sort_labels", "fold_labels", "fold_gram", "settle")
FORWARD = ("begin", "stage_rows", "place_labels", "commit", *DRAIN)  # the steps that a forward takes
STORED = ("begin", "stage_rows", "place_rows", "commit")  # and one into a store


def bound_16(rows: int) -> float:
    """How far a covariance of 16-bit rows may be from float64, relative to the largest variance.

    Rows are rounded to fp16 (2.8e-4 of a value's size, by standard deviation), which averages out over the rows; six
    standard deviations of that cover the millions of entries that are compared.
    """
    return BOUND_16 + ROUNDING / math.sqrt(rows)


class Passing(nn.Module):
    """Hands inputs_embeds [B, T, D] through `points` modules that do nothing."""

    def __init__(self, points: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(points))
        self.place = nn.Parameter(torch.zeros(1, device=device, dtype=dtype), requires_grad=False)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


def moments(block: int, tiny: bool, labels: int | None = None) -> emocore.Moments:
    """With covariance; of small blocks where cases are tiny."""
    return emocore.Moments(labels, covariance=True, **({"block_rows": block} if tiny else {}))


def captured(found: emocore.Moments, batches: Iterable[Tensor], labels: Any = None) -> emocore.Moments:
    """A Moments that has seen batches [B, T, D] through a capture that stays on their device."""
    batches = list(batches)
    model = Passing(1, batches[0].device, batches[0].dtype)
    with torch.no_grad(), emocore.capture(model, {"layers.0": found}, resident=True) as tap:
        for x in batches:
            with tap.batch(labels=labels):
                model(inputs_embeds=x)
    return found
