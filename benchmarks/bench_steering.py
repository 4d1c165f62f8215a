"""Steering: directions added, scores set, rows steered by their slot or their score; and scores in the same read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from emocore import ops
from emocore.linalg import orthonormal_span, unit

from . import peers
from .bars import Bar, faster, reaches
from .harness import Absent, Contender, cold
from .machine import Machine
from .ours import by_op, lacks_op
from .results import Case, Work

ROWS_BYTES, HOST_BYTES = 256e6, 64e6  # of rows on a GPU, and on a CPU, where two of them take turns
RANK, SLOTS = 3, 9  # directions set at once, and vectors of a table
SHARE, SHARE_TINY = 64, 4  # rows that share a slot
ADD, CHAIN, COMPILED, TWO = "torch add", "eager chain", "torch.compile", "two kernels"
MODES = ("add", "add in place", "ablate", "clamp", "per row", "conditional")
HOST_MODES = ("add", "ablate", "clamp", "per row", "conditional")


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_add(race, machine: Machine, seed: int, dtype: torch.dtype) -> None:
    """One direction added on the CPU."""
    rows, dim = machine.scale.rows(8192), machine.scale.dim(2048)
    g = machine.generator(seed)
    x, delta = torch.randn(rows, dim, generator=g).to(dtype), torch.randn(dim, generator=g)
    narrow = delta.to(dtype)
    name = str(dtype).removeprefix("torch.")
    case = Case(
        op="steer_add",
        name=f"steer add {name} D={dim}",
        dtype=name,
        rows=rows,
        dim=dim,
        bound=torch.finfo(dtype).eps,
        work=Work(x.nbytes, x.nbytes),
        bars=(reaches("G15", 0.85),),
    )
    contenders = [
        by_op(machine, "steer_add", lambda given: ops.steer_add(given, delta)),
        Contender("torch x + delta", lambda given: given + narrow),
    ]
    race(case, contenders, [x], lambda given: given.double() + delta.double())


@pytest.mark.cpu
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("mode", HOST_MODES)
def test_mode_in_place(race, machine: Machine, seed: int, mode: str, dtype: torch.dtype) -> None:
    """Every mode on the CPU, in place, against the chain of ops that does the same, eager and compiled: G15."""
    dim = machine.scale.dim(4096)
    rows = machine.scale.rows(int(HOST_BYTES / dtype.itemsize / dim) // SHARE * SHARE, tiny=32)
    inputs = [torch.randn(rows, dim, generator=machine.generator(seed + i)).to(dtype) for i in range(2)]
    tables, name = Tables(machine, rows, dim, seed), str(dtype).removeprefix("torch.")
    op, ours, chain = tables.calls_in_place(mode, dtype)
    compiled = peers.compiled(machine, chain)
    chained = (faster("G15", 2.0, CHAIN), faster("G15", 1.0, COMPILED))
    case = Case(
        op="steer",
        name=f"steer {mode} in place {name} D={dim}",
        dtype=name,
        rows=rows,
        dim=dim,
        bound=2 * torch.finfo(dtype).eps,  # relative to the largest: of scores in float32, and one of the row
        k=RANK if op == "steer_set_" else 1,
        work=Work(inputs[0].nbytes, inputs[0].nbytes),
        bars=(reaches("G15", 0.85),) if mode == "add" else chained,
    )

    def edited(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        def check(x: Tensor) -> Tensor:
            copy = x.clone()
            call(copy)
            return copy

        return check

    contenders: list[Contender | Absent] = [
        by_op(machine, op, ours, check=edited(ours)),
        Contender(CHAIN, chain, edited(chain)),
        Contender(COMPILED, compiled, edited(compiled)),
    ]
    *_, exact = tables.calls(mode)
    race(case, contenders, inputs, lambda x: exact(x.double()), error=_most)


class Tables:
    """What the modes steer with: directions, their sets, and tables by slot, of which slot 0 is nothing."""

    def __init__(self, machine: Machine, rows: int, dim: int, seed: int) -> None:
        g = machine.generator(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=machine.device, dtype=torch.float64)

        v = unit(normal(RANK, dim))[0]
        self.q = orthonormal_span(v)
        self.v, self.dual = v, torch.linalg.pinv(v @ v.T) @ v
        self.zero, self.target = v.new_zeros(RANK), normal(RANK)
        self.delta = normal(dim).float()
        self.deltas = normal(SLOTS, dim).float()
        self.deltas[0] = 0
        share = machine.scale.rows(SHARE, tiny=SHARE_TINY)
        self.slots = torch.arange(rows // share, device=machine.device).remainder(SLOTS).int()
        self.each = self.slots.repeat_interleave(share).long()  # the slot of every row
        self.ones = torch.ones_like(self.slots)
        self.reader = v[:1].float()
        self.level = torch.full((2, 1), 1.0, device=machine.device)  # of N(0, 1) scores: one row in six is above
        self.moved = torch.stack([torch.zeros_like(self.delta), self.delta])

    def calls(
        self, mode: str
    ) -> tuple[str, Callable[[Tensor], Any], Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """An op and its call, the chain of ops that does the same in 16 bits, and the same in float64."""
        v, dual, q, target, zero = self.v, self.dual, self.q, self.target, self.zero
        reader, level, delta, deltas, moved = self.reader, self.level, self.delta, self.deltas, self.moved
        thin = {"delta": delta.bfloat16(), "q": q.bfloat16(), "v": v.bfloat16(), "dual": dual.bfloat16()}
        high, table, each = reader[0].double(), deltas.bfloat16(), self.each
        goal = target.bfloat16()
        return {
            "add": (
                "steer_add",
                lambda x: ops.steer_add(x, delta),
                lambda x: peers.chain_add(x, thin["delta"], 1.0),
                lambda x: x + delta.double(),
            ),
            "add in place": (
                "steer_add_",
                lambda x: ops.steer_add_(x, delta),
                lambda x: x.add_(thin["delta"]),
                lambda x: x + delta.double(),
            ),
            "ablate": (
                "steer_set",
                lambda x: ops.steer_set(x, q, q, zero),
                lambda x: peers.chain_ablate(x, thin["q"]),
                lambda x: x - (x @ q.T) @ q,
            ),
            "clamp": (
                "steer_set",
                lambda x: ops.steer_set(x, v, dual, target),
                lambda x: peers.chain_clamp(x, thin["v"], thin["dual"], goal),
                lambda x: x + (target - x @ v.T) @ dual,
            ),
            "per row": (
                "steer_rows",
                lambda x: ops.steer_rows(x, self.slots, deltas),
                lambda x: peers.chain_rows(x, table, each),
                lambda x: x + deltas.double()[each],
            ),
            "conditional": (
                "steer_when",
                lambda x: ops.steer_when(x, self.ones, reader, level, moved),
                lambda x: peers.chain_conditional(x, thin["v"][0], 1.0, thin["delta"]),
                lambda x: torch.where((x @ high > 1.0)[:, None], x + delta.double(), x),
            ),
        }[mode]

    def calls_in_place(
        self, mode: str, dtype: torch.dtype
    ) -> tuple[str, Callable[[Tensor], Any], Callable[[Tensor], Any]]:
        """An op and its call, and the chain of ops that does the same in the dtype of the rows."""
        v, dual, q, target, zero = (t.float() for t in (self.v, self.dual, self.q, self.target, self.zero))
        near, pinned, span, goal = (t.to(dtype) for t in (v, dual, q, target))
        reader, delta, table, each = self.reader[0].to(dtype), self.delta.to(dtype), self.deltas.to(dtype), self.each
        return {
            "add": ("steer_add_", lambda x: ops.steer_add_(x, self.delta), lambda x: x.add_(delta)),
            "ablate": ("steer_set_", lambda x: ops.steer_set_(x, q, q, zero), lambda x: x.sub_((x @ span.T) @ span)),
            "clamp": (
                "steer_set_",
                lambda x: ops.steer_set_(x, v, dual, target),
                lambda x: x.add_((goal - x @ near.T) @ pinned),
            ),
            "per row": (
                "steer_rows_",
                lambda x: ops.steer_rows_(x, self.slots, self.deltas),
                lambda x: x.add_(table[each]),
            ),
            "conditional": (
                "steer_when_",
                lambda x: ops.steer_when_(x, self.ones, self.reader, self.level, self.moved),
                lambda x: x.add_(torch.where((x @ reader > 1.0).unsqueeze(1), delta, 0.0)),
            ),
        }[mode]


def _rows(machine: Machine, dim: int) -> int:
    return machine.scale.rows(int(ROWS_BYTES / 2 / dim) // SHARE * SHARE, tiny=32)


def _inputs(machine: Machine, rows: int, dim: int, seed: int) -> list[Tensor]:
    def make(g: torch.Generator) -> Tensor:
        return torch.randn(rows, dim, generator=g, device=machine.device).bfloat16()

    return cold(machine, make, rows * dim * 2, seed)


@pytest.mark.gpu
@pytest.mark.parametrize(("mode", "dim"), [*((mode, 4096) for mode in MODES), ("add", 768), ("ablate", 768)])
def test_mode_on_device(race, machine: Machine, seed: int, mode: str, dim: int) -> None:
    """Every mode against torch's own kernel or the chain of ops that does the same: G7."""
    plain = mode.startswith("add")
    bars: tuple[Bar, ...] = (reaches("G7", 0.88), faster("G7", 1.0, ADD) if plain else faster("G7", 2.5, CHAIN))
    dim = machine.scale.dim(dim)
    rows = _rows(machine, dim)
    inputs = _inputs(machine, rows, dim, seed)
    op, ours, chain, exact = Tables(machine, rows, dim, seed).calls(mode)
    in_place = op.endswith("_")
    case = Case(
        op="steer",
        name=f"steer {mode} bfloat16 D={dim}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        bound=torch.finfo(torch.bfloat16).eps,
        k=RANK if op == "steer_set" else 1,
        work=Work(inputs[0].nbytes, inputs[0].nbytes),
        bars=bars,
    )

    def fresh(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        def check(x: Tensor) -> Tensor:
            copy = x.clone()
            found = call(copy)
            return copy if in_place else found

        return check

    others = Contender(ADD if plain else CHAIN, chain, fresh(chain))
    race(case, [by_op(machine, op, ours, check=fresh(ours)), others], inputs, lambda x: exact(x.double()), error=_most)


def _most(found: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest value, but for one row in ten thousand whose score is at the level."""
    off = (found.double() - exact).abs().amax(1)
    wild = max(1, len(off) // 10_000)
    kept = off.kthvalue(len(off) - wild).values if bool(off.isfinite().all()) else off.sum()
    return float(kept / exact.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, 256])
def test_project_and_steer_on_device(race, machine: Machine, seed: int, rows: int | None) -> None:
    """Scores of the rows as they were, and the rows moved, in one read: G8."""
    dim, k = machine.scale.dim(4096), machine.scale.labels()
    rows = _rows(machine, dim) if rows is None else machine.scale.rows(rows, tiny=16)
    inputs = _inputs(machine, rows, dim, seed)
    tables = Tables(machine, rows, dim, seed)
    v = functional.normalize(torch.randn(k, dim, generator=machine.generator(seed), device=machine.device))
    packed, offset = v.bfloat16()[None], torch.zeros(k, device=machine.device)
    readers = packed[0].double()
    case = Case(
        op="project_steer",
        name=f"project and steer bfloat16 {rows} x {dim} K={k}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        k=k,
        bound=torch.finfo(torch.bfloat16).eps,
        work=Work(
            inputs[0].nbytes + packed.nbytes, inputs[0].nbytes + rows * k * 4.0, 2.0 * rows * dim * k, "bfloat16"
        ),
        bars=(faster("G8", 1.3, TWO),),
    )

    def one(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.project_steer(x, packed, offset, tables.slots, tables.deltas)

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.project_packed(x, packed, offset, False), ops.steer_rows(x, tables.slots, tables.deltas)

    def chain(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ packed[0].T, peers.chain_rows(x, tables.deltas.bfloat16(), tables.each)

    def joined(call: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([part.double() for part in call(x)], 1)

    contenders: list[Contender | Absent] = [
        by_op(machine, "project_steer", one, check=joined(one)),
        lacks_op(machine, "project_packed", "steer_rows") or Contender(TWO, two, joined(two)),
        Contender(CHAIN, chain, joined(chain)),
    ]
    race(
        case,
        contenders,
        inputs,
        lambda x: torch.cat([x.double() @ readers.T, x.double() + tables.deltas.double()[tables.each]], 1),
    )
