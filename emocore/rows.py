"""Rows: the plainest sink, which keeps what it is given in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import FitError, ShapeError
from .labels import Labels, encode_labels, label_names
from .ledger import Ledger


class Rows:
    """Sink that keeps every row [N, D] and its label id [N]; for evaluation and small sets, not for billions.

    >>> kept = Rows(labels=["calm", "sad"])
    >>> kept.update(torch.eye(2), ["sad", None])
    >>> kept.rows.shape, kept.ids.tolist()
    (torch.Size([2, 2]), [1, -1])
    """

    def __init__(self, labels: Any = None) -> None:
        self.labels = label_names(labels)
        self.ledger = Ledger()
        self._rows: list[Tensor] = []
        self._ids: list[Tensor] = []

    def update(self, x: Tensor, labels: Labels | None = None) -> None:
        """Keep rows x [N, D] with their labels [N]; raises LabelError or ShapeError."""
        none = torch.full((len(x),), -1, dtype=torch.int32)
        ids = none if labels is None else encode_labels(labels, self.labels)
        if ids.shape != none.shape:
            raise ShapeError("labels", expected=f"{len(x)}, one a row", got=list(ids.shape))
        self._rows.append(x.detach().clone())
        self._ids.append(ids)

    @property
    def rows(self) -> Tensor:
        """All rows [N, D]; raises FitError when there is none."""
        if not self._rows:
            raise FitError("Rows: no row was seen", way_out="Capture with it first.")
        return torch.cat(self._rows)

    @property
    def ids(self) -> Tensor:
        """Label id of every row [N] int32; -1 is unlabelled."""
        return torch.cat(self._ids) if self._ids else torch.zeros(0, dtype=torch.int32)

    def __len__(self) -> int:
        return sum(map(len, self._rows))
