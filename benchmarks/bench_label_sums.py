"""Label sums: sums and squares of rows by label, of labels in runs and in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emocore import ops

from . import peers
from .bars import faster, holds, reaches
from .harness import Contender, cold
from .machine import Machine
from .ours import OURS, by_op, lacks_step
from .results import Case, Work
from .ring import Ring

REACHED = {"runs": 0.80, "shuffled": 0.55}
ROWS = 128e6  # bytes of rows on a GPU, or one block of every layer if that is more


def labelled(rows: int, k: int, order: str, g: torch.Generator) -> Tensor:
    """Labels [rows] int32, each as likely, sorted for "runs"."""
    labels = torch.randint(k, (rows,), generator=g, device=g.device)
    return (labels.sort().values if order == "runs" else labels).int()


@pytest.mark.cpu
@pytest.mark.parametrize("order", ["runs", "shuffled"])
def test_label_sums(race, machine: Machine, seed: int, order: str) -> None:
    """The op on float32 rows: the CPU's kernel."""
    rows, dim, k = machine.scale.rows(8192), machine.scale.dim(384), machine.scale.labels()
    g = machine.generator(seed)
    x, ids = torch.randn(rows, dim, generator=g), labelled(rows, k, order, g)
    labels, zero = ids.long(), torch.zeros(dim, dtype=torch.float64)

    def ours(given: Tensor) -> Tensor:
        sums = torch.zeros(k, dim, dtype=torch.float64)
        ops.label_sums(given, ids, None, zero, sums, None)
        return sums

    def add_at(given: Tensor) -> Tensor:
        sums = np.zeros((k, dim), dtype=np.float32)
        np.add.at(sums, labels.numpy(), given.numpy())
        return torch.from_numpy(sums)

    case = Case(
        op="label_sums",
        name=f"label sums, {order}",
        dtype="float32",
        rows=rows,
        dim=dim,
        k=k,
        bound=1e-14,
        work=Work(read=x.nbytes, written=k * dim * 8.0),
        bars=(faster("G15", 2.0, "torch"), faster("G15", 30.0, "np.add.at"), reaches("G15", 0.85)),
    )
    contenders = [
        by_op(machine, "label_sums", ours),
        Contender("torch index_add_", lambda given: torch.zeros(k, dim).index_add_(0, labels, given)),
        Contender("np.add.at", add_at),
    ]
    race(
        case,
        contenders,
        [x],
        lambda given: torch.zeros(k, dim, dtype=torch.float64).index_add_(0, labels, given.double()),
    )


@pytest.mark.alike
@pytest.mark.gpu
@pytest.mark.parametrize("order", ["runs", "shuffled"])
@pytest.mark.parametrize("dim", [768, 4096])
def test_fold_labels(race, machine: Machine, seed: int, dim: int, order: str) -> None:
    """A block of every hook point of a group, its labels sorted once for all: G5."""
    block, k = machine.scale.block, machine.scale.labels()
    dim = machine.scale.dim(dim)
    points = 2 if machine.scale.tiny else max(1, round(ROWS / (block * dim * 2)))

    def make(g: torch.Generator) -> Ring:
        rows = torch.randn(points, block, dim, generator=g, device=machine.device).bfloat16()
        found = Ring.of(machine, rows, labelled(block, k, order, g), k, block, gram=False)
        if lacks_step(machine, "sort_labels") is None:
            found.sort_labels()
        return found

    inputs = cold(machine, make, points * block * dim * 2, seed)
    first = inputs[0]
    case = Case(
        op="label_sums",
        name=f"fold_labels bfloat16 D={dim} S={points}, {order}",
        dtype="bfloat16",
        rows=points * block,
        dim=dim,
        k=k,
        bound=2e-6,
        work=Work(read=first.rows.nbytes + 2 * first.totals.nbytes, written=2 * first.totals.nbytes),
        bars=(
            reaches("G5", REACHED[order]),
            faster("G5", 10.0, "torch index_add_"),
            holds("G5", 0, "runs that differ"),
        ),
    )
    race(case, [_folding(machine, first), *_others(first, k)], inputs, lambda r: _exact(r, k))


def _folding(machine: Machine, first: Ring) -> Any:
    def folded(r: Ring) -> Tensor:
        r.order.fill_(-1)
        r.starts.fill_(-1)
        for sums in (r.totals, r.squares, r.counts):
            sums.zero_()
        r.sort_labels()
        r.fold_labels()
        return torch.stack([r.totals[0], r.squares[0]])

    def differs() -> dict[str, float]:
        once = folded(first).clone()
        return {
            "runs that differ": float(sum(not torch.equal(folded(first), once) for _ in range(1 if machine.dry else 3)))
        }

    absent = lacks_step(machine, "sort_labels", "fold_labels")
    return absent or Contender(OURS, Ring.fold_labels, check=folded, figures=differs)


def _exact(r: Ring, k: int) -> Tensor:
    x, at = r.rows[0].double(), r.labels.long()
    sums = torch.zeros(2, k + 1, x.shape[1], dtype=torch.float64, device=x.device)
    sums[0].index_add_(0, at, x)
    sums[1].index_add_(0, at, x * x)
    return sums


def _others(first: Ring, k: int) -> list[Contender]:
    """Sums alone, in float32, on the same rows: half of what ours adds up."""
    points, _, dim = first.rows.shape
    sums = torch.zeros(points, k + 1, dim, device=first.rows.device)

    def index_add(r: Ring) -> Tensor:
        at = r.labels.long()
        for s in range(points):
            sums[s].index_add_(0, at, r.rows[s].float())
        return sums

    def one_hot(r: Ring) -> Tensor:
        picked = torch.nn.functional.one_hot(r.labels.long(), k + 1).to(r.rows.dtype)
        for s in range(points):
            sums[s] += peers.product(picked.T, r.rows[s])
        return sums

    def clean(call: Any) -> Any:
        def check(r: Ring) -> Tensor:
            sums.zero_()
            found = call(r)[0]
            return torch.stack([found, _exact(r, k)[1].to(found.dtype)])

        return check

    return [
        Contender("torch index_add_, float32", index_add, check=clean(index_add)),
        Contender("torch one-hot mm, float32 out", one_hot, check=clean(one_hot)),
    ]
