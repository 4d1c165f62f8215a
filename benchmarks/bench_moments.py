"""Moments: a whole update, from rows to float64 state, and how exact it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import emocore
from emocore import Moments
from emocore.precision import BOUND, CHAIN, FREEZE_ROWS

from . import peers
from .bars import faster
from .bench_gram import triangle
from .fitters import fitters
from .harness import Absent, Contender, cold
from .machine import Machine
from .ours import OURS, lacks_step
from .passing import DRAIN, FORWARD, SEQUENCE, Passing, bound_16, captured, moments
from .results import Case, Work
from .ring import Ring

OFFSET = 0.25  # standard deviation of the columns' means, in units of the rows'
WIDE = 2048  # from this width on the products outweigh the rest


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [384, pytest.param(1024, marks=pytest.mark.long)])
def test_update(race, machine: Machine, seed: int, dim: int, dtype: torch.dtype) -> None:
    """One more batch into label means and a full covariance that are kept: as every one of them is used in a loop."""
    rows, dim, k = machine.scale.rows(4096, tiny=600), machine.scale.dim(dim), machine.scale.labels()
    g = machine.generator(seed)
    x = (torch.randn(rows, dim, generator=g) + OFFSET * torch.randn(dim, generator=g)).to(dtype)
    labels = torch.randint(k, (rows,), generator=g)
    ids = labels.int()

    def fresh() -> Moments:
        return Moments(k, covariance=True, block_rows=max(rows // CHAIN * CHAIN, FREEZE_ROWS))

    def clean(given: Tensor) -> Tensor:
        found = fresh()
        found.update(given, ids)
        return found.covariance()

    kept, name = fresh(), str(dtype).removeprefix("torch.")
    against = (
        faster("G17", 8.0 if dtype == torch.bfloat16 else 4.0, "concept-erasure"),
        faster("G17", 70.0, "scikit-learn"),
    )
    case = Case(
        op="update",
        name=f"update {name} D={dim}",
        dtype=name,
        rows=rows,
        dim=dim,
        k=k,
        bound=BOUND[dtype],
        work=Work(x.nbytes, dim * dim * 8.0, triangle(rows, dim), name),
        bars=against,
    )
    contenders = [Contender(OURS, lambda given: kept.update(given, ids), clean), *fitters(labels, dim, k)]
    race(case, contenders, [x], lambda given: torch.cov(given.double().T))


@pytest.mark.alike
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [384, 768, 1024, 2048, 4096, 8192])
def test_update_on_device(race, machine: Machine, seed: int, dim: int) -> None:
    """A forward's rows of one hook point, captured, labelled and folded: G1b and G3."""
    wide, k = dim >= WIDE, machine.scale.labels()
    rows = machine.scale.rows(16_384 if dim > WIDE else 65_536, tiny=machine.scale.block)
    dim = machine.scale.dim(dim)
    sequences = rows // SEQUENCE
    labels = [i % k for i in range(sequences)]

    def make(g: torch.Generator) -> Tensor:
        mean = torch.randn(dim, generator=g, device=machine.device)
        return (torch.randn(sequences, SEQUENCE, dim, generator=g, device=machine.device) + mean).bfloat16()

    inputs = cold(machine, make, rows * dim * 2, seed)
    case = Case(
        op="update",
        name=f"capture to float64, bfloat16 D={dim}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        k=k,
        bound=bound_16(rows),
        work=Work(inputs[0].nbytes, dim * dim * 4.0, triangle(rows, dim)),
        bars=(
            faster("G1b", 1.2 if wide else 1.0, "torch"),
            faster("G3", 15.0 if wide else 8.0, "concept-erasure", "as LeaceFitter, float32"),
            faster("G3", 3.0, "as LeaceFitter, tf32"),
        ),
    )
    model = Passing(1, machine.device, torch.bfloat16)
    with torch.no_grad(), emocore.capture(model, {"layers.0": _new(machine, k)}, resident=True) as tap:
        ours = Contender(
            OURS,
            lambda x: model(inputs_embeds=x),
            lambda x: captured(_new(machine, k), [x], labels).covariance(),
            lambda: tap.batch(labels=labels),
        )
        absent = lacks_step(machine, *FORWARD)
        race(case, [absent or ours, _drain(machine, k), *_updates(machine, dim, k, labels)], inputs, _covariance)


def _new(machine: Machine, k: int | None = None) -> Moments:
    return moments(machine.scale.block, machine.scale.tiny, k)


def _drain(machine: Machine, k: int) -> Contender | Absent:
    """The steps alone, on rows that are staged: what a capture adds to them is the difference."""
    rings: dict[int, Ring] = {}

    def ring(x: Tensor) -> Ring:
        if x.data_ptr() not in rings:
            rows = x.reshape(1, -1, x.shape[-1])
            ids = torch.arange(rows.shape[1], device=x.device).div(SEQUENCE, rounding_mode="floor").remainder(k).int()
            rings[x.data_ptr()] = Ring.of(machine, rows, ids, k, machine.scale.block)
        return rings[x.data_ptr()]

    def drain(x: Tensor) -> Ring:
        found = ring(x)
        for _ in range(found.rows.shape[1] // found.block):
            found.drain()
        return found

    def check(x: Tensor) -> Tensor:
        found = ring(x)
        found.clear()
        found.frozen.zero_()  # the shift is found anew
        drain(x)
        n, total = found.rows.shape[1], found.totals[0].sum(0)
        return (found.scatter() - torch.outer(total, total) / n) / (n - 1)

    absent = lacks_step(machine, *DRAIN)
    return Absent("emocore, drain alone", absent.status) if absent else Contender("emocore, drain alone", drain, check)


def _updates(machine: Machine, dim: int, k: int, labels: Sequence[int]) -> list[Contender | Absent]:
    """The same from others, on rows [N, D]; the product alone knows no labels."""
    acc = torch.zeros(dim, dim, device=machine.device)
    hot = torch.nn.functional.one_hot(
        torch.tensor(labels, device=machine.device).repeat_interleave(SEQUENCE), k
    ).float()
    name = "concept-erasure LeaceFitter, float32"

    def welford() -> Callable[[Tensor], Tensor]:
        fitter = peers.Welford(dim, k, machine.device)
        return lambda x: fitter.update(_flat(x), hot)

    def fitter() -> Callable[[Tensor], Tensor]:
        update = peers.leace(dim, k, machine.device)
        return lambda x: update(_flat(x), hot)

    def centred(make: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        return lambda x: make()(x).double() / (_flat(x).shape[0] - 1)

    def raw(update: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def check(x: Tensor) -> Tensor:
            rows, n = _flat(x), x.shape[0] * x.shape[1]
            mean = rows.double().mean(0)
            return (update(torch.zeros_like(acc), rows).double() - n * torch.outer(mean, mean)) / (n - 1)

        return check

    return [
        Contender("torch mm, float32 out, + add", lambda x: peers.added(acc, _flat(x)), raw(peers.added)),
        Contender("torch addmm, float32 out", lambda x: peers.fused(acc, _flat(x)), raw(peers.fused)),
        peers.peer("concept_erasure", name, lambda: Contender(name, fitter(), centred(fitter))),
        Contender("as LeaceFitter, float32", welford(), centred(welford)),
        Contender("as LeaceFitter, tf32", welford(), _in_tf32(centred(welford)), peers.tf32),
    ]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _in_tf32(check: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def checked(x: Tensor) -> Tensor:
        with peers.tf32():
            return check(x)

    return checked


def _covariance(x: Tensor) -> Tensor:
    return torch.cov(_flat(x).double().T)
