"""Accuracy: variances and correlations of a million rows against float64, at every ratio of mean to deviation: G4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from . import peers
from .bars import holds
from .harness import Contender
from .machine import Machine
from .ours import OURS, lacks_step
from .passing import FORWARD, SEQUENCE, bound_16, captured, moments
from .results import Case, Work

pytestmark = pytest.mark.gpu

ROWS, BATCH = 1 << 20, 1 << 16
SCALES, DIM = 24, 384
RATIOS = (0, 0.5, 1, 2, 3, 10, 100)
VARIANCE, CORRELATION = 2e-6, 5e-6
FLAT = VARIANCE / 4  # by how much the variance's error may differ between an eighth of the rows and all of them

Covariance = Callable[[Sequence[Tensor]], Tensor]
Second = tuple[Tensor, Tensor]  # variances [D] and correlations [D, D], float64


@pytest.mark.alike
@pytest.mark.parametrize(
    ("ratio", "dtype"),
    [*((r, torch.bfloat16) for r in RATIOS), *((r, d) for d in (torch.float16, torch.float32) for r in (0, 2, 100))],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_accuracy(race, machine: Machine, seed: int, ratio: float, dtype: torch.dtype) -> None:
    """`error` is that of a correlation; the variance's stands beside it."""
    batch = machine.scale.rows(BATCH, tiny=SEQUENCE)
    dim = machine.scale.dim(DIM)
    parts = rows(machine, seed, ratio, dtype, batch, machine.scale.rows(ROWS, tiny=2 * SEQUENCE) // batch, dim)
    exact = second(scatter(parts))
    name = str(dtype).removeprefix("torch.")
    n = batch * len(parts)

    def ours(given: Sequence[Tensor]) -> Tensor:
        return captured(moments(machine.scale.block, machine.scale.tiny), given).covariance()

    def judged(label: str, covariance: Covariance, around: Any = nullcontext) -> Contender:
        one = Judged(covariance, around, parts, exact)
        return Contender(label, one, around=around, figures=one.figures)

    case = Case(
        op="accuracy",
        name=f"accuracy {name} mean/std={ratio:g}",
        dtype=name,
        rows=n,
        dim=dim,
        bound=bound_16(n) if machine.scale.tiny else CORRELATION,
        work=Work(read=sum(x.nbytes for x in parts), written=dim * dim * 4.0, flops=float(n) * dim * (dim + 1)),
        bars=(
            holds("G4", VARIANCE, "variance error"),
            holds("G4", FLAT, "its growth from n/8"),
        ),
        hides_launch=False,
    )
    contenders = [
        lacks_step(machine, *FORWARD) or judged(OURS, ours),
        judged("float32 sums, addmm_", _plain),
        judged("float32 sums, tf32", _plain, peers.tf32),
        judged("mm, 16-bit out, summed", _rounded),
    ]
    race(case, contenders, [parts], lambda given: exact[1], error=correlation_error)


class Judged:
    """A way to get a covariance from batches, and how far its variances are from float64."""

    def __init__(self, covariance: Covariance, around: Any, parts: Sequence[Tensor], exact: Second) -> None:
        self.covariance, self.around, self.parts, self.exact = covariance, around, parts, exact
        self.last = torch.zeros(0)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        self.last = self.covariance(parts)
        return self.last

    def figures(self) -> dict[str, float]:
        """The largest relative error of a variance, of the last call's rows and beyond that of an eighth of them."""
        off = variance_error(self.last, self.exact)
        some = self.parts[: max(1, len(self.parts) // 8)]
        with self.around():
            early = variance_error(self.covariance(some), second(scatter(some)))
        return {"variance error": off, "its growth from n/8": max(0.0, off - early)}


def rows(
    machine: Machine, seed: int, ratio: float, dtype: torch.dtype, batch: int, batches: int, dim: int
) -> list[Tensor]:
    """Batches [B, T, D] of normal rows: every column one of 24 random scales, its mean `ratio` deviations from 0."""
    g = machine.generator(seed)
    scales = 10 ** (torch.rand(SCALES, generator=g, device=machine.device) * 4 - 2)
    std = scales.repeat(-(-dim // SCALES))[:dim]
    sign = torch.randint(2, (dim,), generator=g, device=machine.device) * 2 - 1
    mean = ratio * std * sign

    def one() -> Tensor:
        x = torch.randn(batch // SEQUENCE, SEQUENCE, dim, generator=g, device=machine.device)
        return (x * std + mean).to(dtype)

    return [one() for _ in range(batches)]


def scatter(parts: Sequence[Tensor]) -> Tensor:
    """Covariance [D, D] in float64, in two passes."""
    n = sum(x.shape[0] * x.shape[1] for x in parts)
    mean = sum(x.double().sum((0, 1)) for x in parts) / n
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for x in parts:
        y = x.reshape(-1, x.shape[-1]).double() - mean
        total += y.T @ y
    return total / (n - 1)


def second(covariance: Tensor) -> Second:
    """Variances and correlations of a covariance."""
    variance = covariance.diagonal()
    return variance, covariance / torch.outer(variance, variance).sqrt()


def variance_error(covariance: Tensor, exact: Second) -> float:
    """Largest relative error of a variance."""
    return float((covariance.diagonal().to(exact[0]) / exact[0] - 1).abs().max())


def correlation_error(covariance: Tensor, correlations: Tensor) -> float:
    return float((second(covariance.to(correlations))[1] - correlations).abs().max())


def _raw(parts: Sequence[Tensor], product: Callable[[Tensor], Tensor]) -> Tensor:
    """E[xx'] - E[x]E[x]' of float32 sums: the usual loop."""
    dim, n = parts[0].shape[-1], 0
    sums, acc = torch.zeros(dim, device=parts[0].device), torch.zeros(dim, dim, device=parts[0].device)
    for part in parts:
        x = part.reshape(-1, dim)
        n += len(x)
        sums += x.float().sum(0)
        acc += product(x)
    mean = sums / n
    return (acc / n - torch.outer(mean, mean)) * (n / (n - 1))


def _plain(parts: Sequence[Tensor]) -> Tensor:
    return _raw(parts, lambda x: x.float().T @ x.float())


def _rounded(parts: Sequence[Tensor]) -> Tensor:
    return _raw(parts, lambda x: (x.T @ x).float())
