"""Gram: sums of x x' over rows, against the products of torch and numpy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from emocore import ops
from emocore.linalg import tile_count, unpack_tiles
from emocore.precision import BOUND

from . import peers
from .bars import faster, reaches
from .harness import Absent, Contender, cold
from .machine import Machine
from .ours import OURS, by_op, lacks_step
from .results import Case, Work
from .ring import Ring

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BOUND_16 = 5e-6  # of tensor cores, relative to the largest sum
GROUPED = {384: 1.20, 768: 1.37, 1024: 1.42, 2048: 1.51}  # 0.8 of what a triangle of tiles saves


def triangle(rows: int, dim: int) -> float:
    """Operations of the lower triangle of x'x."""
    return float(rows) * dim * (dim + 1)


@pytest.mark.cpu
@pytest.mark.parametrize("dim", [384, 768, pytest.param(2048, marks=pytest.mark.long)])
def test_gram(race, machine: Machine, seed: int, dim: int) -> None:
    """The op on float32 rows: the CPU's kernel."""
    rows = machine.scale.rows(8192)
    dim = machine.scale.dim(dim)
    x = torch.randn(rows, dim, generator=machine.generator(seed))
    zero = torch.zeros(dim, dtype=torch.float64)
    tiles = torch.zeros(tile_count(dim), 128, 128, dtype=torch.float64)

    def sums(given: Tensor) -> Tensor:
        tiles.zero_()
        ops.gram(given, None, zero, tiles)
        return unpack_tiles(tiles, dim)

    case = Case(
        op="gram",
        name=f"gram float32 D={dim}",
        dtype="float32",
        rows=rows,
        dim=dim,
        bound=1e-6,  # relative to the diagonal, about sqrt(256) roundings of float32 remain
        work=Work(read=x.nbytes, written=tiles.nbytes, flops=triangle(rows, dim), arithmetic="float32"),
        bars=(faster("G14", 1.2), reaches("G14", 0.85)),
    )
    contenders = [
        by_op(machine, "gram", lambda given: ops.gram(given, None, zero, tiles), check=sums),
        Contender("torch mm", lambda given: given.T @ given),
        Contender("numpy", lambda given: torch.from_numpy(given.numpy().T @ given.numpy())),
        _blas(),
    ]
    race(case, contenders, [x], lambda given: given.double().T @ given.double())


BFLOAT16 = [
    (384, 0),
    (768, 0),
    (2048, 0),
    (768, 20),
    *(pytest.param(*one, marks=pytest.mark.long) for one in [(4096, 0)]),
]


@pytest.mark.cpu
@pytest.mark.parametrize(("dim", "apart"), BFLOAT16)
def test_gram_of_bfloat16(race, machine: Machine, seed: int, dim: int, apart: int) -> None:
    """The op on bfloat16 rows: columns about zero, as most of a model's are, or one in `apart` about another shift."""
    rows, dim = machine.scale.rows(8192), machine.scale.dim(dim)
    shift = torch.zeros(dim, dtype=torch.float64)
    if apart:
        shift[::apart] = 2.0
    x = (torch.randn(rows, dim, generator=machine.generator(seed)) + shift).bfloat16()
    narrow, tiles = shift.float(), torch.zeros(tile_count(dim), 128, 128, dtype=torch.float64)

    def sums(given: Tensor) -> Tensor:
        tiles.zero_()
        ops.gram(given, None, shift, tiles)
        return unpack_tiles(tiles, dim)

    def centred(given: Tensor) -> Tensor:
        y = given.float() - narrow if apart else given.float()
        return y.T @ y

    def exact(given: Tensor) -> Tensor:
        y = given.double() - shift
        return y.T @ y

    case = Case(
        op="gram",
        name=f"gram bfloat16 D={dim}" + (f", one column in {apart} moved" if apart else ""),
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        bound=2e-6,
        work=Work(read=x.nbytes, written=tiles.nbytes, flops=triangle(rows, dim), arithmetic="bfloat16"),
        bars=() if apart else (faster("G14", 1.9, "torch mm"), reaches("G14", 0.82)),
    )
    contenders = [
        by_op(machine, "gram", lambda given: ops.gram(given, None, shift, tiles), check=sums),
        *([] if apart else [Contender("torch mm", lambda given: given.T @ given)]),
        Contender("torch mm of float32", centred),
    ]
    race(case, contenders, [x], exact)


def _blas() -> Any:
    def make() -> Contender:
        from scipy.linalg.blas import ssyrk

        def both(x: Tensor) -> Tensor:
            lower = torch.from_numpy(ssyrk(1.0, x.numpy().T, lower=1))
            return lower.tril() + lower.tril(-1).T

        return Contender("scipy ssyrk", lambda x: ssyrk(1.0, x.numpy().T, lower=1), check=both)

    return peers.peer("scipy", "scipy ssyrk", make)


def ring(machine: Machine, points: int, dim: int, dtype: torch.dtype, seed: int) -> list[Ring]:
    """Rings of one block of N(0, 1) rows, already converted: y = x, in two parts for float32."""
    block = machine.scale.block

    def make(g: torch.Generator) -> Ring:
        rows = torch.randn(points, block, dim, generator=g, device=machine.device).to(dtype)
        labels = torch.zeros(block, dtype=torch.int32, device=machine.device)
        found = Ring.of(machine, rows, labels, 1, block)
        high = rows.half()
        found.y[:, 0] = high
        if dtype == torch.float32:
            found.y[:, 1] = ((rows - high.float()) * 2**11).half()
        return found

    return cold(machine, make, points * block * dim * 4, seed)


def by_cubin(machine: Machine) -> Contender | Absent:
    """The step as csrc/gram_cuda.cu has it, where it is built and loaded: Triton's serves until this is faster."""
    name = "emocore, CUDA C++"
    if not machine.cuda:
        return Absent(name, "skipped: needs a GPU")
    try:
        from emocore.kernels import gram_cuda
    except ImportError as error:
        return Absent(name, f"missing: {error}")
    if not gram_cuda.HANDLES:
        return Absent(name, "skipped: no cubin of csrc/gram_cuda.cu is loaded")

    def fold(r: Ring) -> None:
        if not gram_cuda.fold_gram(r.y, r.cursor, r.block, r.exponent, r.tiles, r.chain):
            raise ValueError("not for these rows")

    def check(r: Ring) -> Tensor:
        r.tiles.zero_()
        fold(r)
        return r.scatter()

    return Contender(name, fold, check)


def folded(given: Ring) -> Tensor:
    """The sums of a ring's first hook point, from nothing."""
    given.tiles.zero_()
    given.fold_gram()
    return given.scatter()


def exact(given: Ring) -> Tensor:
    """The same in float64."""
    x = given.rows[0].double()
    return x.T @ x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [4096, 8192])
def test_fold_gram(race, machine: Machine, seed: int, dim: int, dtype: torch.dtype) -> None:
    """One hook point's block, folded into float64 tiles: G1."""
    dim = machine.scale.dim(dim)
    inputs = ring(machine, 1, dim, dtype, seed)
    first = inputs[0]
    acc = torch.zeros(dim, dim, device=machine.device)
    short = NAMES[dtype]
    bars = (faster("G1", 1.5, "torch"), reaches("G1", 0.67)) if dtype == torch.bfloat16 else ()
    products = 3 if dtype == torch.float32 else 1
    case = Case(
        op="gram",
        name=f"fold_gram {short} D={dim}",
        dtype=short,
        rows=first.block,
        dim=dim,
        bound=BOUND_16 if dtype == torch.bfloat16 else BOUND[torch.float32],
        work=Work(
            read=first.y.nbytes + first.tiles.nbytes,
            written=first.tiles.nbytes,
            flops=products * triangle(first.block, dim),
        ),
        bars=bars,
    )
    contenders = [
        lacks_step(machine, "fold_gram") or Contender(OURS, Ring.fold_gram, check=folded),
        by_cubin(machine),
        Contender("torch mm, float32 out, + add", lambda r: peers.added(acc, r.rows[0]), check=_fresh(peers.added)),
        Contender("torch addmm, float32 out", lambda r: peers.fused(acc, r.rows[0]), check=_fresh(peers.fused)),
        Contender(f"mm, {short} out", lambda r: r.rows[0].T @ r.rows[0]),
    ]
    race(case, contenders, inputs, exact)


def _fresh(update: Any) -> Any:
    def check(given: Ring) -> Tensor:
        dim = given.rows.shape[2]
        return update(torch.zeros(dim, dim, device=given.rows.device), given.rows[0])

    return check


@pytest.mark.alike
@pytest.mark.gpu
@pytest.mark.parametrize("dim", [*GROUPED])
def test_fold_gram_grouped(race, machine: Machine, seed: int, dim: int) -> None:
    """All layers of a model in one launch: G2."""
    points, required = machine.scale.points(dim), GROUPED[dim]
    dim = machine.scale.dim(dim)
    inputs = ring(machine, points, dim, torch.bfloat16, seed)
    first = inputs[0]
    acc = torch.zeros(points, dim, dim, device=machine.device)
    case = Case(
        op="gram",
        name=f"fold_gram bfloat16 D={dim} S={points}",
        dtype="bfloat16",
        rows=points * first.block,
        dim=dim,
        bound=BOUND_16,
        work=Work(
            read=first.y.nbytes + first.tiles.nbytes,
            written=first.tiles.nbytes,
            flops=triangle(points * first.block, dim),
        ),
        bars=(faster("G2", required, "torch"), faster("G2", required, "torch.compile")),
    )

    def each(sums: Tensor, x: Tensor) -> Tensor:
        for s in range(len(x)):
            peers.added(sums[s], x[s])
        return sums

    def clean(update: Any) -> Any:
        return lambda r: update(torch.zeros_like(acc), r.rows)[0]

    machine_made = peers.compiled(machine, peers.batched)
    contenders = [
        lacks_step(machine, "fold_gram") or Contender(OURS, Ring.fold_gram, check=folded),
        by_cubin(machine),
        Contender("torch mm, float32 out, + add", lambda r: each(acc, r.rows), check=clean(each)),
        Contender("torch baddbmm, float32 out", lambda r: peers.batched(acc, r.rows), check=clean(peers.batched)),
        Contender("torch.compile baddbmm", lambda r: machine_made(acc, r.rows), check=clean(machine_made)),
    ]
    race(case, contenders, inputs, exact)
