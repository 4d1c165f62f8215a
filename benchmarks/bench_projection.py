"""Projection: scores of rows on K directions, centred and as cosines."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from emocore import ops

ROWS, DIM = 8192, 384


@pytest.mark.parametrize("k", [1, 16, 171])
def test_centered(race, k: int) -> None:
    g = torch.Generator().manual_seed(0)
    x, v, c = torch.randn(ROWS, DIM, generator=g), torch.randn(k, DIM, generator=g), torch.randn(DIM, generator=g)
    wide = c.double()
    contenders = {
        "emocore": lambda: ops.project(x, v, wide, False),
        "torch (x - c) @ V.T": lambda: (x - c) @ v.T,
        "torch linear": lambda: functional.linear(x, v, -(v @ c)),
    }
    exact = (x.double() - c.double()) @ v.double().T
    race(f"project K={k}", contenders, exact, 1e-6, 2 * ROWS * DIM * k, "GFLOP/s")


def test_cosine(race) -> None:
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(ROWS, DIM, generator=g), torch.randn(171, DIM, generator=g)
    contenders = {
        "emocore": lambda: ops.project(x, v, None, True),
        "torch normalize": lambda: functional.normalize(x) @ v.T,
    }
    exact = functional.normalize(x.double()) @ v.double().T
    race("cosine K=171", contenders, exact, 1e-6, 2 * ROWS * DIM * 171, "GFLOP/s")
