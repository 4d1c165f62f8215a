"""Steering: adding one direction to every row."""

from __future__ import annotations

import pytest
import torch

from emocore import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_add(race, dtype: torch.dtype) -> None:
    rows, dim = 8192, 2048
    g = torch.Generator().manual_seed(0)
    x, delta = torch.randn(rows, dim, generator=g).to(dtype), torch.randn(dim, generator=g)
    narrow = delta.to(dtype)
    contenders = {"emocore": lambda: ops.steer_add(x, delta), "torch x + delta": lambda: x + narrow}
    name = str(dtype).removeprefix("torch.")
    race(
        f"steer add {name} D={dim}",
        contenders,
        x.double() + delta.double(),
        torch.finfo(dtype).eps,
        2 * x.numel() * x.element_size(),
        "GB/s",
    )
