"""Plans: where every position of the open forward goes, in memory on the device that stays where it is.

A recorded graph reads and writes the same addresses at every replay; what changes from batch to batch is copied into
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .control import WIDTH, Tally
from .errors import CaptureError, ShapeError, TokenError
from .tokens import Spans, Tokens


@dataclass
class Plan:
    """The layout of forwards of one shape: B sequences, N positions, R rules, S hook points; views of fixed memory.

    rank, sequence [N] int32; dest [R, N] int32: the place among the kept positions, -1 where not kept; kept, first
    [R, B] int32: how many of a sequence, and where they begin; seen, shown [B] int32: ranks shown before this forward
    and after it; counts [B, 2] int32: real tokens, and new ones; tally [R, 5] int64; skips [R] int32; bounds [B + 1]
    int32 of packed sequences, else None; spans [R, B, P, 2] int32.
    """

    sequences: int
    length: int
    positions: int
    ranked: bool
    rank: Tensor
    sequence: Tensor
    dest: Tensor
    kept: Tensor
    first: Tensor
    seen: Tensor
    shown: Tensor
    tally: Tensor
    counts: Tensor
    bounds: Tensor | None
    spans: Tensor | None
    spanned: tuple[bool, ...]
    skips: Tensor
    stops: Tensor | None
    pads: Tensor | None
    header: Tensor
    stations: Tensor
    rules: Tensor
    optional: Tensor


def recording(device: torch.device) -> bool:
    """Whether what is launched now is recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_while_recording(device: torch.device, what: str) -> None:
    """Raise CaptureError where memory must grow while a graph is recorded, which would be replayed without it."""
    if recording(device):
        raise CaptureError(
            f"{what}: more than there is memory for, and a graph is being recorded",
            way_out="Run one forward of the largest shape before recording.",
        )


class Plans:
    """The memory of every plan of a lane, grown while nothing is recorded."""

    def __init__(
        self,
        rules: Sequence[Tokens],
        station_rules: Sequence[int],
        optional: bool,
        stops: frozenset[int],
        pads: frozenset[int],
        device: torch.device,
    ) -> None:
        self.rules, self.device = tuple(rules), device

        def ids(tokens: frozenset[int]) -> Tensor | None:
            return torch.tensor(sorted(tokens), device=device) if tokens else None

        self.header = torch.zeros(WIDTH, dtype=torch.int64, device=device)
        self.stations = torch.zeros(len(station_rules), WIDTH, dtype=torch.int64, device=device)
        self._skips = torch.tensor([rule.skip for rule in rules], dtype=torch.int32, device=device)
        self.tally = torch.zeros(len(rules), len(Tally), dtype=torch.int64, device=device)
        self.of_station = torch.tensor(station_rules, dtype=torch.int32, device=device)
        self._optional = torch.full((len(station_rules),), int(optional), dtype=torch.int32, device=device)
        self._stops, self._pads = ids(stops), ids(pads)
        self._plans: dict[tuple[int, int, str], Plan] = {}
        self._spans: Tensor | None = None
        self._positions = self._sequences = 0
        self._seen = torch.zeros(0, dtype=torch.int32, device=device)

    def fit(self, sequences: int, length: int, kind: str) -> Plan:
        """The plan of a forward of `sequences` by `length` positions; kind "padded", "packed" or "plain"."""
        key = (sequences, length, kind)
        if key not in self._plans:
            self._reserve(sequences, sequences * length if kind == "padded" else length)
            self._plans[key] = self._view(*key)
        return self._plans[key]

    def set_bounds(self, cu_seqlens: Tensor) -> int:
        """Copy the bounds of packed sequences to the device; returns how many there are. Raises ShapeError."""
        cu = cu_seqlens.detach().to("cpu", torch.int64)
        if cu.dim() != 1 or len(cu) < 1 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()):
            raise ShapeError("cu_seqlens", expected="[S + 1] rising from 0", got=cu.tolist()[:8])
        self._reserve(len(cu) - 1, 0)
        self._bounds[: len(cu)].copy_(cu, non_blocking=True)
        return len(cu) - 1

    def set_spans(self, spans: Sequence[Spans]) -> None:
        """Copy the spans of every rule that names one to the device, one mapping a sequence."""
        several = max([len(named.get(r.span, ())) for named in spans for r in self.rules if r.span] or [0])
        table = torch.zeros(len(self.rules), len(spans), max(several, 1), 2, dtype=torch.int32)
        table[[rule.span is None for rule in self.rules]] = -1  # what has no span of its own keeps every rank
        for r, rule in enumerate(self.rules):
            for b, named in enumerate(spans):
                for p, span in enumerate(named.get(rule.span, ()) if rule.span else ()):
                    table[r, b, p] = torch.tensor(span)
        room = None if self._spans is None else self._spans.shape[1:3]
        if room is None or room[0] < table.shape[1] or room[1] < table.shape[2]:
            refuse_while_recording(self.device, "spans")
            self._spans = torch.zeros(table.shape, dtype=torch.int32, device=self.device)
            self._plans.clear()
        assert self._spans is not None
        whole = torch.zeros(self._spans.shape, dtype=torch.int32)
        whole[:, : table.shape[1], : table.shape[2]] = table
        self._spans.copy_(whole, non_blocking=True)

    def check_rules(self, kind: str, spans: Sequence[Spans] | None, sequences: int) -> None:
        """Raise TokenError or ShapeError where a rule needs ranks or spans that are not there."""
        for rule in self.rules:
            if rule.skip and kind == "plain":
                raise TokenError(
                    "skip: plain rows [N, D] have no place in a sequence",
                    way_out="Give tap.batch(cu_seqlens=...) for packed sequences, or use skip=0.",
                )
            if rule.span and spans is None:
                raise TokenError(
                    f"span {rule.span!r}: the batch names no spans",
                    way_out="Open tap.batch(spans=[{name: [(start, stop)]}, ...]), one mapping a sequence.",
                )
            if rule.span and spans is not None and len(spans) != sequences:
                raise ShapeError("spans", expected=f"{sequences} mappings, one a sequence", got=len(spans))

    def _reserve(self, sequences: int, positions: int) -> None:
        """Room for so many; what `seen` holds is kept."""
        if sequences > self._sequences:
            refuse_while_recording(self.device, "sequences")
            self._sequences = max(sequences, 2 * self._sequences)
            r, b = len(self.rules), self._sequences
            seen = torch.zeros(b, dtype=torch.int32, device=self.device)
            seen[: len(self._seen)] = self._seen
            self._seen, self._shown = seen, torch.zeros_like(seen)
            self._kept, self._first = torch.zeros(2, r, b, dtype=torch.int32, device=self.device)
            self._counts = torch.zeros(b, 2, dtype=torch.int32, device=self.device)
            self._bounds = torch.zeros(b + 1, dtype=torch.int32, device=self.device)
            self._plans.clear()
        if positions > self._positions:
            refuse_while_recording(self.device, "positions")
            self._positions = positions = -(-positions // 16) * 16  # rows of dest at aligned addresses
            self._rank, self._sequence = torch.zeros(2, positions, dtype=torch.int32, device=self.device)
            self._dest = torch.full((len(self.rules), positions), -1, dtype=torch.int32, device=self.device)
            self._plans.clear()

    def _view(self, b: int, t: int, kind: str) -> Plan:
        n = b * t if kind == "padded" else t
        spans = self._spans
        return Plan(
            sequences=b,
            length=t,
            positions=n,
            ranked=kind != "plain",
            rank=self._rank[:n],
            sequence=self._sequence[:n],
            dest=self._dest[:, :n],
            kept=self._kept[:, :b],
            first=self._first[:, :b],
            seen=self._seen[:b],
            shown=self._shown[:b],
            tally=self.tally,
            counts=self._counts[:b],
            bounds=self._bounds[: b + 1] if kind == "packed" else None,
            spans=spans if spans is None else spans[:, :b],
            spanned=tuple(rule.span is not None for rule in self.rules),
            skips=self._skips,
            stops=self._stops,
            pads=self._pads,
            header=self.header,
            stations=self.stations,
            rules=self.of_station,
            optional=self._optional,
        )

    @property
    def seen(self) -> Tensor:
        """Ranks shown of each sequence of the batch so far."""
        return self._seen
