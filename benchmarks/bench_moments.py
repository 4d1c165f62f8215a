"""Moments: gram, label sums, and a whole update, against the usual expressions on the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emocore import Moments, ops
from emocore.linalg import tile_count, unpack_tiles
from emocore.precision import BOUND

ROWS, LABELS = 8192, 171


@pytest.mark.parametrize("dim", [384, 768, 2048])
def test_gram(race, dim: int) -> None:
    x = torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(dim, dtype=torch.float64)
    tiles = torch.zeros(tile_count(dim), 128, 128, dtype=torch.float64)
    values = x.numpy()

    def ours() -> torch.Tensor:
        ops.gram(x, None, zero, tiles)  # accumulates, as it does in a stream; the first call is checked
        return tiles

    exact = x.double().T @ x.double()
    others = {"torch mm": lambda: x.T @ x, "numpy": lambda: torch.from_numpy(values.T @ values)}
    # relative to the diagonal, about sqrt(256) roundings of float32 remain
    race(
        f"gram float32 D={dim}",
        {"emocore": ours, **others},
        exact,
        1e-6,
        ROWS * dim * (dim + 1),
        "GFLOP/s",
        read=lambda packed: unpack_tiles(packed, dim),
    )


@pytest.mark.parametrize("order", ["runs", "shuffled"])
def test_label_sums(race, order: str) -> None:
    dim = 384
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, dim, generator=g)
    labels = torch.randint(LABELS, (ROWS,), generator=g)
    labels = labels.sort().values if order == "runs" else labels
    ids, places, zero = labels.int(), labels.numpy(), torch.zeros(dim, dtype=torch.float64)
    exact = torch.zeros(LABELS, dim, dtype=torch.float64).index_add_(0, labels, x.double())

    def ours() -> torch.Tensor:
        sums = torch.zeros(LABELS, dim, dtype=torch.float64)
        ops.label_sums(x, ids, None, zero, sums, None)
        return sums

    def add_at() -> torch.Tensor:
        sums = np.zeros((LABELS, dim), dtype=np.float32)
        np.add.at(sums, places, x.numpy())
        return torch.from_numpy(sums)

    others = {"torch index_add_": lambda: torch.zeros(LABELS, dim).index_add_(0, labels, x), "np.add.at": add_at}
    race(f"label sums, {order}", {"emocore": ours, **others}, exact, 1e-14, x.numel() * 4, "GB/s")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_update(race, dtype: torch.dtype) -> None:
    """Per-label means and the full covariance, against float64 sums in torch."""
    dim = 384
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(ROWS, dim, generator=g) + 2).to(dtype)
    labels = torch.randint(LABELS, (ROWS,), generator=g)
    ids = labels.int()
    exact = torch.cov(x.double().T)

    def ours() -> torch.Tensor:
        moments = Moments(LABELS, covariance=True)
        moments.update(x, ids)
        return moments.covariance()

    def plain() -> torch.Tensor:
        y = x.double()
        torch.zeros(LABELS, dim, dtype=torch.float64).index_add_(0, labels, y)
        return torch.cov(y.T)

    name = str(dtype).removeprefix("torch.")
    race(
        f"update {name} D={dim}",
        {"emocore": ours, "torch float64": plain},
        exact,
        BOUND[dtype],
        x.numel() * x.element_size(),
        "GB/s",
    )
