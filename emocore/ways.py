"""Ways: how the rows of a capture get to its sinks, by the host or by the device, and what a tap asks of either.

A forward is a transaction. The root's pre-hook begins it, each hook point stages its rows, the root's post-hook
commits them all. A forward that an exception ends is rolled back, at the latest by the next begin or by the end of the
capture: nothing of it reaches a sink. What fires inside a backward is recomputation by checkpointing, and is counted
as such.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import nn

from .batches import Batch
from .forwards import outside_autograd
from .sinks import Binding


class Way(ABC):
    """The forwards of one capture, begun, staged, and committed or abandoned by hooks on the model.

    `points` are the hook points, in the order of the model's modules, and the sinks at each; `current` finds the batch
    of a forward. Where `training` is True or False, forwards in the other mode are none of the capture's.
    """

    resident: ClassVar[bool]  # whether rows and sums stay on the model's device until they are asked for

    def __init__(
        self,
        model: nn.Module,
        points: Mapping[str, Sequence[Binding]],
        optional: bool,
        training: bool | None,
        current: Callable[[], Batch | None],
    ) -> None:
        self.model, self.points = model, points
        modules = dict(model.named_modules())
        self._modules = [modules[name] for name in points]
        self._optional, self._training, self._current = optional, training, current
        self._lock = threading.Lock()  # of sinks and ledgers

    @property
    def bindings(self) -> list[Binding]:
        """The sinks of all hook points."""
        return [binding for bindings in self.points.values() for binding in bindings]

    @property
    @abstractmethod
    def committed(self) -> int:
        """Forwards that have ended well."""

    @abstractmethod
    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Put the hooks on the model."""

    @abstractmethod
    def abandon(self, every: bool = False) -> None:
        """Roll back this thread's forward, or `every` one's, which ended without its commit."""

    @abstractmethod
    def close(self, batch: Batch, keep: bool) -> None:
        """Form the pooled rows of a batch that has ended, or drop them, and tell the sinks that it has."""

    @abstractmethod
    def enter(self, batch: Batch) -> None:
        """A batch begins, whose labels were checked."""

    @abstractmethod
    def leave(self, batch: Batch) -> None:
        """It has ended."""

    @abstractmethod
    def gate(self, forwards: int) -> None:
        """Make room for so many replays of a forward that was recorded."""

    @abstractmethod
    def collect(self) -> None:
        """Hand everything committed to the sinks, for whoever reads one of them or a ledger."""

    @abstractmethod
    def end(self, well: bool) -> None:
        """Let the sinks go; what failed meanwhile is raised where the capture has ended `well`."""

    # --- what both do alike

    def check_labels(self, batch: Batch) -> None:
        """Raise LabelError unless a batch has the labels that the sinks want."""
        for binding in self.bindings:
            batch.ids(binding.labels)

    @contextlib.contextmanager
    def closing(self, batch: Batch) -> Iterator[None]:
        """Form the pooled rows of a batch at its end; those of one that an exception ended are dropped."""
        try:
            yield
        except BaseException:
            self.abandon()
            self.close(batch, keep=False)
            raise
        self.close(batch, keep=True)

    def _settle(self) -> None:
        """Tell the sinks that ask for it that no forward is half handed over."""
        with self._lock, outside_autograd():
            for binding in self.bindings:
                if self._tells(binding):
                    binding.sink.settle()  # type: ignore[attr-defined]

    def _tells(self, binding: Binding) -> bool:
        return hasattr(binding.sink, "settle")
