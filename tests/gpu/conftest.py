"""Kernels on a GPU where there is one, else under Triton's interpreter on the CPU: the same tests."""

from collections.abc import Iterator

import pytest
import torch

from emocore import ops


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def triton_kernels() -> Iterator[None]:
    """Every op is served by its Triton kernel, wherever the tensors are."""
    with ops.use("triton"):
        yield
