"""The end of a drain: norms, frozen shifts, the cursor."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from emocore import ops
from emocore.kernels import settle as kernel
from emocore.reference_drain import settle_ref

OUTPUTS = ("frozen", "norm_sum", "norm_count", "cursor")


def ring(device: torch.device, points: int = 3, block: int = 40, blocks: int = 2, ready: int = 1) -> SimpleNamespace:
    """A group whose block is the ring's last; norms that do not count are NaN."""
    g = torch.Generator().manual_seed(points + block)
    capacity = blocks * block
    marks = torch.randint(0, 3, (points, capacity), generator=g).to(torch.int8)
    norms = torch.rand(points, capacity, generator=g) * 100
    norms[marks != 2] = torch.nan
    norms[:, : capacity - block] = torch.nan
    drained = capacity * 7 + capacity - block
    group = {
        "norms": norms,
        "marks": marks,
        "cursor": torch.tensor([drained + ready * block + block // 2, drained]),
        "frozen": torch.zeros(points, dtype=torch.int32),
        "norm_sum": torch.rand(points, generator=g).double(),
        "norm_count": torch.randint(0, 100, (points,), generator=g),
    }
    return SimpleNamespace(block=block, **{name: t.to(device) for name, t in group.items()})


def settled(group: SimpleNamespace, settle=kernel.settle) -> list[Tensor]:
    """What a settle writes, on copies."""
    frozen, norm_sum, norm_count, cursor = (getattr(group, name).clone() for name in OUTPUTS)
    settle(group.norms, group.marks, cursor, group.block, frozen, norm_sum, norm_count)
    return [frozen, norm_sum, norm_count, cursor]


def agree(group: SimpleNamespace) -> None:
    found, wanted = settled(group), settled(group, settle_ref)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-13, atol=0)
    for i in (0, 2, 3):
        assert torch.equal(found[i], wanted[i]), OUTPUTS[i]


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("block", [1, 31, 33, 200])
@pytest.mark.parametrize("tile", [16, 4096])
def test_equals_float64(
    device: torch.device, points: int, block: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "SETTLE_TILE", tile)
    agree(ring(device, points, block))
    agree(ring(device, points, block, blocks=1, ready=3))


def test_literal(device: torch.device) -> None:
    group = ring(device, points=2, block=3)
    group.marks[:, 3:] = torch.tensor([[2, 1, 2], [0, 0, 0]], dtype=torch.int8)
    group.norms[:, 3:] = torch.tensor([[1e8, 5.0, 1.0], [7.0, 8.0, 9.0]])
    group.norm_sum[:] = torch.tensor([1e-8, 4.0])
    group.norm_count[:] = torch.tensor([10, 20])
    group.cursor[:] = torch.tensor([12, 9])
    frozen, norm_sum, norm_count, cursor = settled(group)
    assert frozen.tolist() == [1, 1]
    assert norm_sum.tolist() == [100000001.00000001, 4.0]
    assert norm_count.tolist() == [12, 20]
    assert cursor.tolist() == [12, 12]


@pytest.mark.parametrize("short", [1, 40])
def test_nothing_happens_before_a_block_is_full(device: torch.device, short: int) -> None:
    group = ring(device)
    group.cursor[0] = group.cursor[1] + group.block - short
    for found, name in zip(settled(group), OUTPUTS, strict=True):
        assert torch.equal(found, getattr(group, name)), name


def test_the_next_one_sees_the_cursor(device: torch.device) -> None:
    """Three calls, two full blocks: the second takes the next, around the ring's end, the third nothing."""
    group = ring(device, ready=2)
    capacity = group.norms.shape[1]
    group.norms[:], group.marks[:] = 1.0, 2
    group.norms[:, : capacity - group.block] = 3.0
    group.norm_sum.zero_()
    group.norm_count.zero_()
    start = int(group.cursor[1])
    for blocks, total in ((1, 1), (2, 4), (2, 4)):
        group.frozen, group.norm_sum, group.norm_count, group.cursor = settled(group)
        assert int(group.cursor[1]) == start + blocks * group.block
        assert group.norm_sum.tolist() == [total * group.block] * 3
        assert group.norm_count.tolist() == [blocks * group.block] * 3
        assert group.frozen.tolist() == [1, 1, 1]


def test_bits_do_not_depend_on_the_company(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "SETTLE_TILE", 16)
    group = ring(device, block=100)
    whole = settled(group)
    alone = SimpleNamespace(**vars(group))
    for name in ("norms", "marks", "frozen", "norm_sum", "norm_count"):
        setattr(alone, name, getattr(group, name)[1:2].contiguous())
    for a, b in zip(settled(alone)[:3], whole[:3], strict=True):
        assert torch.equal(a, b[1:2])


def test_the_drain_asks_for_this_kernel() -> None:
    with ops.use("triton"):
        assert ops.step("settle", torch.device("cpu")) is kernel.settle
    with ops.use("reference"):
        assert ops.step("settle", torch.device("cuda")) is settle_ref


COMPILED = """
from emocore import aot
for variant in aot.variants("settle"):
    for arch in aot.ARCHITECTURES:
        built = aot.build(variant, arch)
        assert built.spilled == 0 and built.shared < 1024, built
    if "capacity" in variant.types:
        assert "mul.wide.s32" in built.ptx or "mul.lo.s64" in built.ptx, "offsets must be 64 bit"
        assert "mul.lo.s32" not in built.ptx and "mad.lo.s32" not in built.ptx
"""


def test_it_compiles_without_spills_and_with_wide_offsets(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
