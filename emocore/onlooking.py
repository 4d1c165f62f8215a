"""Onlooking: a monitor's forward on the device: the rows of all hook points scored at once, sequences advanced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import ops, packing
from .batches import Batch
from .control import Tally
from .directions import Directions
from .groups import WORKSPACE
from .plans import Plan
from .watching import Rule, Watch


class Onlooker:
    """What the watchers of M hook points share: the rows of one forward, their z scores, and the state of sequences.

    rows [M, n, D], or [1, n, D] where all would take more than a gigabyte and each hook point is scored as it fires;
    marks, norms [M, n]; scores [M, n, K] float32.
    """

    def __init__(
        self,
        vectors: Mapping[str, Directions],
        rules: Mapping[str, Sequence[Rule]],
        alpha: float,
        window: int,
        sequences: int,
        device: torch.device,
    ) -> None:
        self.vectors, self.device = list(vectors.values()), device
        self._m, self._k, self._dim = len(vectors), len(self.vectors[0]), self.vectors[0].dim
        self._whole, self._number = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self.cursor = torch.zeros(2, dtype=torch.int64, device=device)  # rows begin anew with every forward
        self.watch = Watch(
            self._k,
            list(vectors),
            rules,
            alpha,
            window,
            sequences + 1,
            device,
            forward=self._number,
            whole=self._whole,
        )
        self.positions = self.sequences = 0
        self._slots = torch.zeros(0, dtype=torch.int32, device=device)
        self._serials = torch.zeros(0, dtype=torch.int64, device=device)
        self._batch: Batch | None = None
        self._started = 0

    # --- memory

    def fits(self, plan: Plan) -> bool:
        """Whether a forward needs no memory that is not there."""
        return plan.positions <= self.positions and plan.sequences <= self.sequences

    def reserve(self, plan: Plan, dtype: torch.dtype) -> None:
        """Memory for forwards as large as this one."""
        if self.fits(plan):
            return
        self.positions, old = max(plan.positions, self.positions), self.sequences
        self.sequences = max(plan.sequences, old)
        m, n, device = self._m, self.positions, self.device
        self.abreast = m * n * self._dim * dtype.itemsize <= WORKSPACE
        self._rows = torch.zeros(m if self.abreast else 1, n, self._dim, dtype=dtype, device=device)
        self._marks = torch.zeros(m, n, dtype=torch.int8, device=device)
        self._norms = torch.zeros(m, n, dtype=torch.float32, device=device)
        self._scores = torch.zeros(m, n, self._k, dtype=torch.float32, device=device)
        more = self.sequences - old
        self._slots = torch.cat([self._slots, self._slots.new_zeros(more)])
        self._serials = torch.cat([self._serials, self._serials.new_zeros(more)])
        packed = [_readers(one, dtype, device) for one in self.vectors]
        parts = max(len(readers) for readers, _ in packed)
        self._packed = torch.stack([_padded(readers, parts) for readers, _ in packed])  # [M, P, K, D]
        self._offset = torch.stack([offset for _, offset in packed])  # [M, K]

    def room(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the rows, marks and norms of hook point m go."""
        return self._rows[m if self.abreast else 0], self._marks[m], self._norms[m]

    # --- whose rows these are

    def enter(self, batch: Batch) -> None:
        """A batch of sequences begins; its forwards belong to its requests, whose state goes on."""
        if batch.requests is not None and len(batch.requests) <= self.sequences:
            self._place(batch, list(map(str, batch.requests)))

    def begin(self, batch: Batch | None, plan: Plan, past: int, recording: bool) -> None:
        """Name the sequences of a forward: those of its batch, else the rows of the last one where a cache goes on."""
        if recording or (batch is not None and batch is self._batch):
            return
        if batch is not None and batch.requests is not None:
            self._place(batch, list(map(str, batch.requests)))
        elif batch is not None or past == 0 or self._batch is not None or not self._started:
            self._place(batch, [f"#{self._started + i}" for i in range(plan.sequences)])
            self._started += plan.sequences

    def _place(self, batch: Batch | None, names: Sequence[str]) -> None:
        slots, serials = self.watch.places(names)
        self._slots[: len(names)].copy_(slots, non_blocking=True)
        self._slots[len(names) :].zero_()
        self._serials[: len(names)].copy_(serials, non_blocking=True)
        self._batch = batch

    # --- a forward

    def score(self, m: int, plan: Plan, rule: int) -> None:
        """Score the rows of hook point m where they are scored one by one."""
        if not self.abreast:
            self._project(slice(0, 1), slice(m, m + 1), plan, rule)

    def commit(self, plan: Plan, rule: int, before: Tensor, now: Tensor) -> None:
        """Score what was staged, all hook points at once, and advance the sequences, if the forward was committed:
        there were `before` such forwards [], and are `now`."""
        self._number.copy_(now)
        torch.sub(now, before, out=self._whole[0])
        if self.abreast:
            self._project(slice(None), slice(None), plan, rule)
        n, b = plan.positions, plan.sequences
        self.watch.step(
            self._scores[:, :n],
            plan.first[rule],
            plan.kept[rule],
            self._marks[:, :n],
            self._slots[:b],
            self._serials[:b],
        )

    def _project(self, rows: slice, hooks: slice, plan: Plan, rule: int) -> None:
        n, count = plan.positions, plan.tally[rule, Tally.KEPT : Tally.KEPT + 1]
        ops.project_rows(self._rows[rows, :n], self._packed[hooks], self._offset[hooks], count, self._scores[hooks, :n])


def _readers(vectors: Directions, dtype: torch.dtype, device: torch.device) -> packing.Packed:
    """Readers and offset whose projection is the z score: v / s, and -(c.v + m) / s for the rounded readers."""
    scale = vectors.scale()
    std = scale.std.double()
    readers = vectors.readers.double() / std.unsqueeze(1)
    parts = (vectors.provenance.get("parts") or {}).get(str(dtype).removeprefix("torch."), packing.UNKNOWN_PARTS)
    packed, offset = packing.pack(readers, vectors.centre, dtype, parts)
    return packing.Packed(packed.to(device), (offset.double() - scale.mean.double() / std).float().to(device))


def _padded(readers: Tensor, parts: int) -> Tensor:
    """Readers [P, K, D] with zero parts behind them."""
    return torch.cat([readers, readers.new_zeros(parts - len(readers), *readers.shape[1:])])
