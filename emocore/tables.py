"""Tables: the edits of a hook point in fixed memory on its device, one a slot, and which slot each row has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .directions import Directions
from .edits import Edit, Request
from .errors import ArgumentError, ShapeError


@dataclass
class Tables:
    """Edits by slot, slot 0 nothing: deltas [S, D], basis, dual [R, D], target, gate [S, R]; readers [W, D], levels
    [S, W].
    """

    deltas: Tensor
    basis: Tensor
    dual: Tensor
    target: Tensor
    gate: Tensor
    readers: Tensor
    levels: Tensor

    @classmethod
    def of(cls, edits: Sequence[Edit], vectors: Directions) -> Tables:
        """Slot i + 1 is edits[i]; edits with the same directions share them."""
        blocks: list[tuple[Edit, int]] = []
        first = [_place(edit, blocks) for edit in edits]
        names = list(dict.fromkeys(name for edit in edits for name in edit.levels))
        s, r, like = len(edits) + 1, sum(len(edit.target) for edit, _ in blocks), vectors.centre
        none = like.new_zeros(0, vectors.dim)
        target, gate = like.new_zeros(s, r), like.new_zeros(s, r)
        levels = like.new_full((s, len(names)), -math.inf)
        for slot, (edit, at) in enumerate(zip(edits, first, strict=True), 1):
            target[slot, at : at + len(edit.target)] = edit.target
            gate[slot, at : at + len(edit.target)] = 1.0
            for name, level in edit.levels.items():
                levels[slot, names.index(name)] = level
        return cls(
            deltas=torch.stack([torch.zeros_like(like), *(edit.delta for edit in edits)]),
            basis=torch.cat([none, *(edit.basis for edit, _ in blocks)]),
            dual=torch.cat([none, *(edit.dual for edit, _ in blocks)]),
            target=target,
            gate=gate,
            readers=vectors[names].readers.double() if names else none,
            levels=levels,
        )

    def over(self, before: Tables | None, device: torch.device, dtype: torch.dtype) -> Tables:
        """These tables on a device, in the memory of the ones before where it has their size."""
        moved = {}
        for name, table in vars(self).items():
            new, old = table.to(device, dtype), getattr(before, name, None)
            if old is not None and (old.shape, old.device, old.dtype) == (new.shape, new.device, new.dtype):
                new = old.copy_(new)
            moved[name] = new
        return Tables(**moved)


def _place(edit: Edit, blocks: list[tuple[Edit, int]]) -> int:
    """Where the directions of an edit begin, among those of the blocks, to which it may be added."""
    for other, at in blocks:
        if torch.equal(other.basis, edit.basis) and torch.equal(other.dual, edit.dual):
            return at
    at = sum(len(other.target) for other, _ in blocks)
    blocks.append((edit, at))
    return at


class Slots:
    """The slot of each sequence that is in the model, in fixed memory on every device that asks for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._now: Tensor | None = None
        self._memory: dict[torch.device, Tensor] = {}

    def fill(self, slots: Tensor | None) -> None:
        """Put slots [M] int32 in the place of what is there, or nothing; raises ArgumentError for too many."""
        if slots is not None and len(slots) > self._most:
            raise ArgumentError(
                "batch: more sequences, or tokens of a packed batch, than there is memory for",
                expected=f"at most {self._most}",
                got=len(slots),
                way_out="Give steer(max_rows=...).",
            )
        self._now = slots
        for memory in self._memory.values():
            self._write(memory)

    def on(self, device: torch.device) -> Tensor | None:
        """What was filled in [M], a part of a device's memory."""
        if device not in self._memory:
            with torch.inference_mode(False):
                self._memory[device] = torch.zeros(self._most, dtype=torch.int32, device=device)
            self._write(self._memory[device])
        return None if self._now is None else self._memory[device][: len(self._now)]

    def _write(self, memory: Tensor) -> None:
        memory.zero_()
        if self._now is not None:
            memory[: len(self._now)].copy_(self._now)


class Edits:
    """The edits at one hook point, in fixed memory on the device of its hidden states.

    Without slots every row is of the one request; with them, each N / M rows in a row are of one of the slots [M].
    """

    def __init__(self, vectors: Directions, requests: Sequence[Request], slots: Slots | None = None) -> None:
        self.vectors, self.dim, self.slots = vectors, vectors.dim, slots
        self.device, self._wide = torch.device("cpu"), torch.float32
        self._held: Tables | None = None
        self.fill(requests)

    def fill(self, requests: Sequence[Request]) -> None:
        """Put these in the place of what is there: memory of the right size stays where it is."""
        self._given = given = Tables.of([Edit.of(self.vectors, one) for one in requests], self.vectors)
        self._adds, self._sets, self._when = bool(given.deltas.any()), len(given.basis) > 0, len(given.readers) > 0
        self.place(self.device, self._wide)

    @property
    def nothing(self) -> bool:
        """Whether a forward is left as it is."""
        return not self._adds and not self._sets

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Be ready for hidden states of a device and dtype: float32 tables, or float64 for float64."""
        self.device, self._wide = device, torch.float64 if dtype == torch.float64 else torch.float32
        # a model may be run in inference mode first and trained afterwards
        with torch.inference_mode(False), torch.no_grad():
            self._held = self._given.over(self._held, device, self._wide)
            self._delta, self._target = self._held.deltas[1], self._held.target[1]
            self._one = torch.ones(1, dtype=torch.int32, device=device)
        self.look()

    def look(self) -> None:
        """See what has become of the slots."""
        self._now = self._one if self.slots is None else self.slots.on(self.device)

    def __call__(self, hidden: Tensor, in_place: bool = False) -> Tensor:
        """The edited hidden state [..., D]; the very tensor where nothing is to be done, or all was done in place.

        `in_place` needs a contiguous tensor that nobody else reads. Raises ShapeError, and ArgumentError where the
        slots are not set.
        """
        if hidden.shape[-1] != self.dim:
            raise ShapeError("steer: width of the hidden state", expected=self.dim, got=hidden.shape[-1])
        if self.nothing:
            return hidden
        if hidden.device != self.device or (hidden.dtype == torch.float64) != (self._wide == torch.float64):
            self.place(hidden.device, hidden.dtype)
        op, arguments = self._call(hidden)
        if in_place:
            IN_PLACE[op](hidden.view(-1, self.dim), *arguments)
            torch.autograd.graph.increment_version(hidden)
            return hidden
        edited: Tensor = OUT_OF_PLACE[op](hidden.reshape(-1, self.dim), *arguments)
        return edited.reshape(hidden.shape)

    def _call(self, hidden: Tensor) -> tuple[str, tuple[Tensor, ...]]:
        """The one op that does it, and its arguments."""
        held = self._held
        assert held is not None
        if self.slots is None and not self._when and not (self._adds and self._sets):
            return ("set", (held.basis, held.dual, self._target)) if self._sets else ("add", (self._delta,))
        sets = (held.basis, held.dual, held.target, held.gate) if self._sets else ()
        slots = self._slots_of(hidden)
        if self._when:
            return "when", (slots, held.readers, held.levels, held.deltas, *sets)
        return "rows", (slots, held.deltas, *sets)

    def _slots_of(self, hidden: Tensor) -> Tensor:
        now = self._now
        if now is None:
            raise ArgumentError(
                "steer: whose rows a forward's are is not said",
                way_out="Run it inside `with steering.batch(requests=[...])`.",
            )
        if self.slots is not None and len(now) not in (hidden.shape[0], hidden.numel() // self.dim):
            raise ShapeError("batch: requests", expected=f"{hidden.shape[0]}, one a sequence", got=len(now))
        return now


OUT_OF_PLACE: dict[str, Callable[..., Any]] = {
    "add": ops.steer_add,
    "set": ops.steer_set,
    "rows": ops.steer_rows,
    "when": ops.steer_when,
}
IN_PLACE: dict[str, Callable[..., Any]] = {
    "add": ops.steer_add_,
    "set": ops.steer_set_,
    "rows": ops.steer_rows_,
    "when": ops.steer_when_,
}
