"""Tags: labels and token ids of the positions of a forward, in memory on the device that stays where it is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import ops
from .batches import Batch
from .control import Header, Source
from .groups import Group
from .plans import Plan, refuse_while_recording
from .seats import Seat


class Tags:
    """What a lane's sinks keep beside a row: a label under each set of names [N] or [S] int32, a token id [N] int32."""

    def __init__(self, header: Tensor) -> None:
        self._header, self._device = header, header.device
        self._labels: dict[tuple[str, ...], Tensor] = {}
        self.tokens = torch.zeros(0, dtype=torch.int32, device=header.device)  # of the open forward; -1 where unknown

    def enter(self, batch: Batch, labels: Iterable[tuple[str, ...]]) -> None:
        """Copy a batch's labels to the device, under each set of names, and say there how they are given."""
        for names in labels:
            ids = batch.ids(names)
            assert ids is not None
            flat = ids.reshape(-1)
            if names not in self._labels or len(self._labels[names]) < len(flat):
                refuse_while_recording(self._device, "labels")
                self._labels[names] = torch.full((len(flat),), -1, dtype=torch.int32, device=self._device)
            self._labels[names][: len(flat)].copy_(flat, non_blocking=True)
            # a packed batch [N] is told from one label a sequence by its length
            packed = batch.cu_seqlens is not None and len(flat) != len(batch.cu_seqlens) - 1
            self._header[Header.LABELS] = Source.POSITION if ids.dim() > 1 or packed else Source.SEQUENCE

    def leave(self) -> None:
        """The batch has ended: labels are wanted again."""
        self._header[Header.LABELS] = Source.NONE

    def labels(self, names: tuple[str, ...]) -> Tensor:
        """The batch's labels under a set of names; one that is unlabelled where none were given."""
        if names not in self._labels:
            self._labels[names] = torch.full((1,), -1, dtype=torch.int32, device=self._device)
        return self._labels[names]

    def keep_tokens(self, plan: Plan, ids: Tensor | None) -> None:
        """Keep the token ids of the forward until its commit, where the model is shown any."""
        if len(self.tokens) < plan.positions:
            refuse_while_recording(self._device, "positions")
            self.tokens = torch.full((plan.positions,), -1, dtype=torch.int32, device=self._device)
        tokens = self.tokens[: plan.positions]
        if ids is None or ids.numel() != plan.positions:
            tokens.fill_(-1)
        else:
            tokens.copy_(ids.reshape(-1))

    def place(self, plan: Plan, group: Group, leader: Seat) -> None:
        """Before the commit: the labels of the rows that a group has staged, whose first seat is `leader`."""
        names = leader.binding.labels
        if names:
            ops.step("place_labels", self._device)(
                plan.header,
                self.labels(names),
                plan.header[Header.LABELS],
                plan.dest[leader.rule],
                plan.sequence,
                group.cursor,
                group.label_ids,
            )
