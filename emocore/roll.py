"""Roll: the batches that rows on their way from the device belong to, by the number that the device knows them by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from .batches import Batch
from .control import Place
from .sinks import Whose


class Roll:
    """Numbers of batches, from 1 on, and of forwards outside of any, kept as long as rows of them may come.

    The model's thread enters and leaves batches; another one reads and forgets them.
    """

    def __init__(self) -> None:
        self._batches: dict[int, Batch] = {}
        self._alone: dict[int, Batch] = {}  # forwards without a batch
        self._left: list[int] = []
        self._entered = 0

    def enter(self, batch: Batch) -> int:
        """The number of a batch that begins."""
        self._entered += 1
        self._batches[self._entered] = batch
        return self._entered

    def leave(self, number: int) -> None:
        """It is over: what is committed by now is all of it."""
        self._left.append(number)

    @property
    def left(self) -> list[int]:
        """Batches that are over by now."""
        return list(self._left)

    def forget(self, left: Sequence[int]) -> None:
        """Forget batches, and all forwards outside of any, of which no more rows come."""
        self._alone.clear()
        for number in left:
            if self._batches.pop(number, None) is not None:  # as an earlier count may have said already
                self._left.remove(number)

    def whose(self, places: Tensor, labelled: bool) -> list[Whose]:
        """Whose rows are whose words are places [n, 8] (control.Place): of each batch in turn."""
        if not len(places):
            return []
        batch, forward = places[:, Place.BATCH], places[:, Place.FORWARD]
        ends = (batch[1:] != batch[:-1]) | ((batch[1:] == 0) & (forward[1:] != forward[:-1]))
        bounds = [0, *(ends.nonzero().squeeze(1) + 1).tolist(), len(places)]
        return [self._of_one(places[a:b].long(), labelled) for a, b in itertools.pairwise(bounds)]

    def _of_one(self, places: Tensor, labelled: bool) -> Whose:
        number, forward, sequences = places[0, [Place.BATCH, Place.FORWARD, Place.SEQUENCES]].tolist()
        batch = self._batches[number] if number else self._alone.setdefault(forward, Batch())
        return Whose(
            sequence=places[:, Place.SEQUENCE],
            rank=places[:, Place.RANK],
            sequences=sequences,
            requests=batch.requests,
            ids=places[:, Place.LABEL] if labelled else None,
            tokens=places[:, Place.TOKEN],
            batch=batch,
        )
