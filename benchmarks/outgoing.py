"""Rows off a device, through the ring, to nowhere: what a capture into a store costs without its disk."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from emocore.intake import Intake, Part
from emocore.ledger import Ledger
from emocore.outflow import Arrival
from emocore.ring import Offered, Policy, Ring, Stream, block
from emocore.sinks import Whose


class Sink:
    """Of one hook point; it is its own shard."""

    def __init__(self, receiver: Outgoing, stream: Stream) -> None:
        self.receiver, self.draft, self._stream = receiver, self, stream
        self.ledger, self.ledger_lock, self.labels = Ledger(), receiver.lock, ()

    def check_rows(self, dim: int, dtype: torch.dtype) -> None:
        """All are taken."""

    def observe(self, observed: Any) -> None:
        """None comes by way of the host."""
        raise AssertionError("rows by way of the host")

    def offer(self, rows: Tensor, policy: Policy) -> Offered:
        """To nowhere."""
        return policy.offer(self._stream, rows)


class Outgoing:
    """A store that keeps nothing: a capture is given `sinks(names)`, whose rows wait for the ring alone."""

    waits = True

    def __init__(self, slots: int = 32, slot_bytes: int = 2 << 20) -> None:
        self.lock = threading.RLock()
        self._ring = Ring(slots=slots, slot_bytes=slot_bytes)
        folder: Any = SimpleNamespace(said=contextlib.nullcontext)
        self._intake = Intake(block, folder)

    def sinks(self, names: Sequence[str]) -> dict[str, Sink]:
        """A sink for each hook point."""
        with open(os.devnull, "wb") as nothing:
            return {name: Sink(self, self._ring.stream(nothing.fileno())) for name in names}

    def receive(self, arrivals: Sequence[Arrival], whose: Sequence[Whose]) -> None:
        """As a store does, without places."""
        none = torch.empty(0)
        parts = [Part(sink, rows, none) for sink, rows, _ in arrivals]
        for (sink, _, _), offered in zip(parts, self._intake.offer(parts), strict=True):
            if isinstance(offered, BaseException):
                raise offered
            sink.ledger.rows.add(formed=offered.taken, accumulated=offered.taken)

    def settle(self) -> None:
        """Nothing is committed."""

    def discard(self) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        """End its threads."""
        self._intake.close()
        self._ring.close()

    def __enter__(self) -> Outgoing:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
