"""Showings: what a call of the model shows a capture on the device: sequences of which kind, and their mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .batches import Batch, Call
from .errors import ArgumentError, ShapeError
from .plans import Plan


@dataclass(frozen=True)
class Showing:
    """A forward as its arguments tell it, before anything is laid out for it.

    kind: "padded" [B, T], "packed", or "plain" rows [N, D]; sequences: B; length: T, of packed or plain ones all N
    positions; mask [B, past + T] of padded ones, None where the model was given none.
    """

    call: Call
    kind: str
    sequences: int
    length: int
    mask: Tensor | None

    @classmethod
    def of(cls, shown: Tensor | None, mask: Tensor | None, past: int, batch: Batch, device: torch.device) -> Showing:
        """Read what a forward is given: positions `shown` [B, T] (or [B, T, D] or [N, D]), and the model's own mask.

        Raises ArgumentError where no tensor is given or one is elsewhere, ShapeError for a mask that does not fit.
        """
        if shown is None and mask is None:
            raise ArgumentError("model: no tensor among the arguments", way_out="Use capture(resident=False).")
        like = shown if shown is not None else mask
        assert like is not None
        _check_devices({"input": like, "attention_mask": mask}, device)
        plain = like.dim() == 1 or (like.is_floating_point() and like.dim() == 2 and mask is None)
        size = (like.shape[0], 1) if plain else (like.shape[0], like.shape[1])
        mask = batch.mask_of(size, past) if batch.mask is not None else mask
        call = Call(shown, size, mask, past)
        if batch.cu_seqlens is not None:
            return cls(call, "packed", len(batch.cu_seqlens) - 1, size[0] * size[1], None)
        if plain and mask is None:
            return cls(call, "plain", size[0], size[0], None)
        _check_mask(mask, size)
        return cls(call, "padded", *size, mask)

    @property
    def ids(self) -> Tensor | None:
        """Token ids, where the model is shown any."""
        shown = self.call.shown
        return shown if shown is not None and not shown.is_floating_point() else None

    def written(self, batch: Batch) -> int:
        """From which position on the model itself wrote the tokens; -1 where the caller gave them all."""
        if self.mask is not None and self.call.past == 0 and self.mask.shape[1] > self.length == 1:
            return 0
        written = batch.written_from(self.call) if self.kind == "padded" and self.sequences > 1 else None
        return -1 if written is None else written


def check_sizes(batch: Batch, plan: Plan, labels: Iterable[tuple[str, ...]]) -> None:
    """Hold a forward's plan against its batch: sequences as before, a request each, labels a sequence or a position.

    `labels` are the sets of names that sinks keep labels under. Raises ShapeError or ArgumentError.
    """
    if plan.ranked and batch.sequences not in (None, plan.sequences):
        raise ShapeError(
            "tap.batch: its forwards show different numbers of sequences",
            expected=batch.sequences,
            got=plan.sequences,
            way_out="Open one tap.batch for each batch of sequences.",
        )
    batch.sequences = plan.sequences
    if batch.requests is not None and len(batch.requests) != plan.sequences:
        raise ArgumentError("requests", expected=f"{plan.sequences} ids, one a sequence", got=len(batch.requests))
    for names in labels:
        ids = batch.ids(names)
        if ids is not None and ids.numel() not in (plan.sequences, plan.positions):
            raise ShapeError(
                "labels",
                expected=f"[{plan.sequences}], one a sequence, or one a position of {plan.positions}",
                got=list(ids.shape),
            )


def _check_devices(given: dict[str, Tensor | None], device: torch.device) -> None:
    for name, tensor in given.items():
        if tensor is not None and tensor.device != device:
            raise ArgumentError(
                f"{name}: device", expected=device, got=tensor.device, way_out="Move the batch to the model."
            )


def _check_mask(mask: Tensor | None, size: tuple[int, int]) -> None:
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != size[0] or mask.shape[1] < size[1]):
        raise ShapeError(
            "attention_mask",
            expected=f"[{size[0]}, {size[1]}], or [{size[0]}, past + {size[1]}] while decoding",
            got=list(mask.shape),
            way_out="Give the 2-D padding mask of the tokens: in tap.batch(mask=...) where the model takes another.",
        )
