"""Rows more than 2^31 elements apart: offsets are 64 bits wide, in and out. Absurd numbers of threads."""

import pytest
import torch
from torch import Tensor

from emocore import ops
from emocore.linalg import tile_count

D, STEP, ROWS = 40, 1 << 25, 66  # the last two rows begin at 2^31 elements and past it


@pytest.fixture(scope="module")
def far() -> Tensor:
    """Rows [66, 40] that span 4.4 GB of address space, of which only their own pages are ever touched."""
    memory = torch.empty(STEP * (ROWS - 1) + D, dtype=torch.bfloat16)
    x = memory.as_strided((ROWS, D), (STEP, 1))
    assert x.storage_offset() + STEP * (ROWS - 1) > 2**31
    return x.copy_(torch.randn(ROWS, D, generator=torch.Generator().manual_seed(0)))


def outputs(x: Tensor) -> list[Tensor]:
    """What every op on rows makes of x."""
    zero, double = torch.zeros(D, dtype=torch.float64), torch.float64
    rows, norms, finite = torch.empty(ROWS, D, dtype=x.dtype), torch.empty(ROWS, dtype=double), torch.empty(ROWS) > 0
    ops.stage(x, torch.arange(ROWS).flip(0), rows, norms, finite)
    sums, squares = torch.zeros(2, 3, D, dtype=double)
    ops.label_sums(x, (torch.arange(ROWS) % 3).int(), None, zero, sums, squares)
    tiles = torch.zeros(tile_count(D), 128, 128, dtype=double)
    ops.gram(x, None, zero, tiles)
    readers = torch.eye(D)[:5] + 0.5
    return [rows, norms, sums, squares, tiles, ops.project(x, readers, None, True), ops.steer_add(x, torch.ones(D))]


def test_rows_far_apart_are_read_where_they_are(far: Tensor) -> None:
    for a, b in zip(outputs(far), outputs(far.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_rows_far_apart_are_written_where_they_are(far: Tensor) -> None:
    x = far.contiguous()
    out = torch.empty(STEP * (ROWS - 1) + D, dtype=torch.bfloat16).as_strided((ROWS, D), (STEP, 1))
    ops.stage(x, None, out, torch.empty(ROWS, dtype=torch.float64), torch.empty(ROWS) > 0)
    assert torch.equal(out, x)
    ops.steer_add_(out, torch.ones(D))
    assert torch.equal(out, ops.steer_add(x, torch.ones(D)))


def test_absurd_numbers_of_threads_change_nothing(far: Tensor) -> None:
    few, before = outputs(far), torch.get_num_threads()
    try:
        torch.set_num_threads(5000)
        many = outputs(far)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))
