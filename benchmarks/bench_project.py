"""Projection: scores of rows on K directions, centred and as cosines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from emocore import ops, packing

from . import peers
from .bars import Bar, faster, faster_than_as_exact, reaches
from .harness import Absent, Contender, cold
from .machine import Machine
from .ours import OURS, by_op, lacks_op
from .results import Case, Work

ROWS_BYTES, SEQUENCE = 256e6, 256  # of rows on a GPU, and rows a sequence
BOUND_16 = 4e-3  # readers rounded to 16 bits, relative to the largest score
EAGER, COMPILED, LINEAR = "eager torch", "torch.compile", "bare F.linear"


def _work(rows: int, dim: int, k: int, size: int, arithmetic: str) -> Work:
    return Work(rows * dim * size + k * dim * size, rows * k * 4.0, 2.0 * rows * dim * k, arithmetic)


KINDS = [
    *(("centered", k, torch.float32) for k in (1, 171)),
    *(pytest.param("centered", k, torch.float32, marks=pytest.mark.long) for k in (16, 512)),
    ("centered", 171, torch.bfloat16),
    ("cosine", 171, torch.float32),
    *(pytest.param(kind, 171, torch.float32, marks=pytest.mark.long) for kind in ("z", "pooled")),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("kind", "k", "dtype"), KINDS)
def test_scores(race, machine: Machine, seed: int, kind: str, k: int, dtype: torch.dtype) -> None:
    """Every kind of score on the CPU: G15."""
    rows, dim, k = (
        machine.scale.rows(8192),
        machine.scale.dim(384),
        min(k, machine.scale.labels()) if machine.scale.tiny else k,
    )
    g = machine.generator(seed)
    scored = Scored(kind, torch.randn(k, dim, generator=g), torch.randn(dim, generator=g), machine.scale.rows(128))
    x, name = torch.randn(rows, dim, generator=g).to(dtype), str(dtype).removeprefix("torch.")
    case = Case(
        op="project",
        name=f"project {kind} {name} K={k}",
        dtype=name,
        rows=rows,
        dim=dim,
        k=k,
        bound=1e-6,
        work=_work(rows, dim, k, x.element_size(), "float32"),
        bars=(faster_than_as_exact("G15", 1.5),),
    )
    linear = Contender("torch linear", scored.linear) if kind == "centered" else None
    contenders = [
        by_op(machine, "project", scored.ours),
        Contender(EAGER, scored.chain),
        Contender(COMPILED, peers.compiled(machine, scored.chain)),
        *([linear] if linear else []),
        Contender("torch float64", scored.exact),
    ]
    race(case, contenders, [x], scored.exact)


class Scored:
    """Directions v [K, D] about a centre c [D] on the CPU, and the ways to score rows on them."""

    def __init__(self, kind: str, v: Tensor, c: Tensor, sequence: int) -> None:
        self.kind, self.v, self.sequence = kind, v, sequence
        self.c = torch.zeros_like(c) if kind == "cosine" else c
        self.mean, self.std = self.c @ v.T, v.norm(dim=1)

    def ours(self, x: Tensor) -> Tensor:
        z = (self.mean.double(), self.std.double()) if self.kind == "z" else (None, None)
        scores = ops.project(x, self.v, self.c.double(), self.kind == "cosine", *z)
        if self.kind != "pooled":
            return scores
        starts = torch.arange(0, len(x) + 1, self.sequence, dtype=torch.int32)
        return torch.cat(ops.pool_scores(scores, starts))

    def chain(self, x: Tensor) -> Tensor:
        """What one writes in torch; bfloat16 rows are widened first."""
        return self._scores(x.float(), self.v, self.c, self.mean, self.std)

    def exact(self, x: Tensor) -> Tensor:
        return self._scores(*(t.double() for t in (x, self.v, self.c, self.mean, self.std)))

    def linear(self, x: Tensor) -> Tensor:
        """One product in the rows' own dtype, the centre as its bias."""
        return functional.linear(x, self.v.to(x.dtype), (-self.mean).to(x.dtype))

    def _scores(self, x: Tensor, v: Tensor, c: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        if self.kind == "cosine":
            return functional.normalize(x) @ v.T
        scores = (x - c) @ v.T
        if self.kind == "z":
            return (scores - mean) / std
        if self.kind == "pooled":
            each = scores.unflatten(0, (-1, self.sequence))
            return torch.cat([each.amax(1), each.mean(1)])
        return scores


class Readers:
    """Directions that are scored on, and the ways to do it on bfloat16 rows [N, D] of sequences of one length."""

    def __init__(self, machine: Machine, k: int, dim: int, kind: str, seed: int) -> None:
        g = machine.generator(seed)
        self.kind, self.sequence = kind, machine.scale.rows(SEQUENCE, tiny=16)
        self.v = functional.normalize(torch.randn(k, dim, generator=g, device=machine.device))
        self.narrow, zero = self.v.bfloat16(), torch.zeros(dim, device=machine.device, dtype=torch.float64)
        normal = torch.randn(dim, generator=g, device=machine.device, dtype=torch.float64)
        self.centre = normal if kind in ("centered", "pooled") else zero
        self.c = self.centre.bfloat16()

    def pooled(self, scores: Tensor) -> Tensor:
        """Largest and mean of each sequence, one after the other; scores as they are for the other kinds."""
        if self.kind != "pooled":
            return scores
        one = scores.view(-1, self.sequence, scores.shape[1])
        return torch.cat([one.amax(1), one.mean(1)])

    def exact(self, x: Tensor) -> Tensor:
        y = x.double() - self.centre
        scores = y @ self.v.double().T
        return self.pooled(scores / y.norm(dim=1, keepdim=True) if self.kind == "cosine" else scores)

    def chain(self, x: Tensor) -> Tensor:
        """What one writes in torch, in the rows' own dtype."""
        if self.kind == "raw":
            return x @ self.narrow.T
        if self.kind == "cosine":
            return functional.normalize(x) @ self.narrow.T
        return self.pooled((x - self.c) @ self.narrow.T)

    def packed(self, machine: Machine, parts: int, rows: int) -> Callable[[Tensor], Any]:
        """Ours on readers that were prepared once, in so many parts."""
        packed, offset = packing.pack(self.v, self.centre, torch.bfloat16, parts)
        starts = torch.arange(0, rows + 1, self.sequence, device=machine.device).int()

        def score(x: Tensor) -> Any:
            scores = ops.project_packed(x, packed, offset, self.kind == "cosine")
            return ops.pool_scores(scores, starts) if self.kind == "pooled" else scores

        return score


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dim", "k", "kind"),
    [
        *((4096, k, "centered") for k in (1, 16, 171, 512)),
        *((dim, 171, "centered") for dim in (384, 768, 8192)),
        *((4096, 171, kind) for kind in ("raw", "cosine", "pooled")),
    ],
)
def test_project_on_device(race, machine: Machine, seed: int, dim: int, k: int, kind: str) -> None:
    """Scores of bfloat16 rows on a GPU: G6. The first line has readers as short as the chains'."""
    bars = _bars(k, kind)
    rows = machine.scale.rows(int(ROWS_BYTES / 2 / dim) // SEQUENCE * SEQUENCE, tiny=32)
    dim, k = machine.scale.dim(dim), min(k, 40) if machine.scale.tiny else k
    readers = Readers(machine, k, dim, kind, seed)

    def make(g: torch.Generator) -> Tensor:
        return torch.randn(rows, dim, generator=g, device=machine.device).bfloat16()

    work = _work(rows, dim, k, 2, "bfloat16")
    case = Case(
        op="project",
        name=f"project {kind} bfloat16 D={dim} K={k}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        k=k,
        bound=BOUND_16,
        work=replace(work, written=8.0 * k * rows / readers.sequence) if kind == "pooled" else work,
        bars=bars,
    )
    wanted = ("project_packed", *(["pool_scores"] if kind == "pooled" else []))
    absent = lacks_op(machine, *wanted)

    def ours(name: str, parts: int) -> Contender | Absent:
        call = readers.packed(machine, parts, rows)
        check = (lambda x: torch.cat(call(x))) if kind == "pooled" else call
        return Absent(name, absent.status) if absent else Contender(name, call, check)

    contenders = [
        ours(OURS, 1),
        ours("emocore, readers in 2 parts", 2),
        Contender(EAGER, readers.chain),
        Contender(COMPILED, peers.compiled(machine, readers.chain)),
        Contender(LINEAR, lambda x: functional.linear(x, readers.narrow), readers.chain),
    ]
    race(case, contenders, cold(machine, make, rows * dim * 2, seed), readers.exact)


def _bars(k: int, kind: str) -> tuple[Bar, ...]:
    against = () if kind == "raw" else (faster("G6", 2.0, EAGER), faster("G6", 1.1 if k >= 512 else 1.3, COMPILED))
    return (reaches("G6", 0.65), *against, *((faster("G6", 1.0, LINEAR),) if k == 171 else ()))
