"""Small calls: what an op and a captured layer cost the host while a model decodes, and the device in a graph: G9."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import emocore
from emocore import ops
from emocore.linalg import unit

from . import peers
from .bars import holds
from .graphs import small
from .harness import Contender, unchecked
from .machine import Machine
from .ours import OURS, by_op, lacks_step
from .passing import FORWARD, Passing, bound_16, captured, moments
from .results import Case, Work

pytestmark = pytest.mark.gpu

HOST, GRAPH = 7.0, 2.5  # microseconds
LAYERS, DIM = 32, 4096
BARS = (holds("G9", HOST, "host us"), holds("G9", 0, "waits"), holds("G9", GRAPH, "graph us"))
IN_PLACE = (holds("G9", 0, "allocations"),)


@pytest.mark.parametrize("rows", [1, 64, 256])
@pytest.mark.parametrize("op", ["steer_add_", "steer_set_", "steer_rows_", "project_packed", "project_steer_"])
def test_op(race, machine: Machine, seed: int, op: str, rows: int) -> None:
    """One op on the rows of a decoding step, against its chain in torch."""
    dim, k = machine.scale.dim(DIM), machine.scale.labels()
    rows = machine.scale.rows(rows, tiny=1 + rows % 3)
    g = machine.generator(seed)
    x = torch.randn(rows, dim, generator=g, device=machine.device).bfloat16()
    ours, chain, exact = _calls(op, torch.randn(k, dim, generator=g, device=machine.device, dtype=torch.float64), rows)
    writes = op.endswith("_")

    def fresh(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        def check(given: Tensor) -> Tensor:
            copy = given.clone()
            found = call(copy)
            return copy if writes else found

        return check

    def costs(call: Callable[[Tensor], Any]) -> Callable[[], dict[str, float]]:
        return lambda: small(machine, lambda: call(x))

    case = Case(
        op="small",
        name=f"{op} {rows} x {dim}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        k=k if op.startswith("project") else 1,
        bound=1e-2,
        work=Work(read=x.nbytes, written=x.nbytes),
        bars=BARS + (() if op.startswith("project") else IN_PLACE),
        hides_launch=False,
    )
    contenders = [
        by_op(machine, op, ours, check=fresh(ours), figures=costs(ours)),
        Contender("torch", chain, fresh(chain), figures=costs(chain)),
    ]
    race(case, contenders, [x], exact)


Calls = tuple[Callable[[Tensor], Any], Callable[[Tensor], Any], Callable[[Tensor], Tensor]]


def _calls(op: str, vectors: Tensor, rows: int) -> Calls:
    """An op on directions [K, D], its chain in torch, and what it leaves in x or gives, in float64."""
    v = unit(vectors)[0]
    q, narrow, delta, zero = v[:1].float().double(), v.bfloat16(), v[0].float(), v.new_zeros(1)
    packed, offset, goal = narrow[None], delta.new_zeros(len(v)), v[0]
    slots = torch.arange(rows, device=v.device).remainder(len(v)).int()
    table = torch.cat([torch.zeros_like(v[:1]), v[1:]])
    deltas, thin, each = table.float(), table.bfloat16(), slots.long()

    def both(x: Tensor) -> Tensor:
        scores = x @ narrow.T
        x.add_(thin[each])
        return scores

    return {
        "steer_add_": (lambda x: ops.steer_add_(x, delta), lambda x: x.add_(narrow[0]), lambda x: x.double() + goal),
        "steer_set_": (
            lambda x: ops.steer_set_(x, q, q, zero),
            lambda x: x.sub_((x @ narrow[:1].T) @ narrow[:1]),
            lambda x: x.double() - (x.double() @ q.T) @ q,
        ),
        "steer_rows_": (
            lambda x: ops.steer_rows_(x, slots, deltas),
            lambda x: x.add_(thin[each]),
            lambda x: x.double() + table[each],
        ),
        "project_packed": (
            lambda x: ops.project_packed(x, packed, offset, False),
            lambda x: x @ narrow.T,
            lambda x: x.double() @ packed[0].double().T,
        ),
        "project_steer_": (
            lambda x: ops.project_steer_(x, packed, offset, slots, deltas),
            both,
            lambda x: x.double() + table[each],
        ),
    }[op]


@pytest.mark.alike
@pytest.mark.parametrize("batch", [1, 64])
def test_captured_layer(race, machine: Machine, seed: int, batch: int) -> None:
    """A layer of a capture, one token a sequence: all of it is the capture's, the model does nothing."""
    dim, layers = machine.scale.dim(DIM), 4 if machine.scale.tiny else LAYERS
    batch = 2 if machine.scale.tiny else batch
    g = machine.generator(seed)
    x = torch.randn(batch, 1, dim, generator=g, device=machine.device).bfloat16()
    ours, usual = (Passing(layers, machine.device, torch.bfloat16) for _ in range(2))
    chain = peers.UsualStatistics(layers, dim, machine.device)
    case = Case(
        op="small",
        name=f"capture {batch} x {dim}, one of {layers} layers",
        dtype="bfloat16",
        rows=batch,
        dim=dim,
        bound=bound_16(256),
        bars=BARS + IN_PLACE,
        hides_launch=False,
    )
    many = torch.randn(4, 64, dim, generator=g, device=machine.device).bfloat16()
    absent = lacks_step(machine, *FORWARD)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(peers.hooked(usual.layers, chain))
        tap = emocore.capture(ours, "layers.*", lambda: _moments(machine), resident=True)
        if absent is None:
            stack.enter_context(tap)
        contenders = [
            absent
            or Contender(
                OURS,
                lambda _: ours(inputs_embeds=x),
                lambda given: captured(_moments(machine), [given]).covariance(),
                figures=lambda: small(machine, lambda: ours(inputs_embeds=x), layers),
            ),
            Contender(
                "usual hooks",
                lambda _: usual(inputs_embeds=x),
                unchecked,
                figures=lambda: small(machine, lambda: usual(inputs_embeds=x), layers),
            ),
        ]
        race(case, contenders, [many], lambda given: torch.cov(given.reshape(-1, dim).double().T))


def _moments(machine: Machine) -> emocore.Moments:
    return moments(machine.scale.block, machine.scale.tiny)
