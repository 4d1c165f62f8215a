"""freeze and convert: kernels against the float64 reference, bit for bit, literal expectations, hostile rows."""

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from emocore import ops
from emocore.kernels.convert import convert_kernel
from emocore.reference_drain import convert_ref, freeze_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAN = float("nan")


@dataclass
class Ring:
    """What the two steps read and write: one full block at the end of a ring that went round three times."""

    rows: Tensor  # [S, capacity, D]
    marks: Tensor  # [S, capacity]
    cursor: Tensor  # [2]
    block: int
    frozen: Tensor  # [S]
    shift: Tensor  # [S, D]
    exponent: Tensor  # [S, D]
    y: Tensor  # [S, P, block, D]
    overrange: Tensor  # [S]

    @classmethod
    def of(cls, rows: Tensor, block: int, marks: Tensor | None = None) -> "Ring":
        """A ring around rows [S, capacity, D], its outputs poisoned."""
        s, capacity, dim = rows.shape
        device, drained = rows.device, 4 * capacity - block
        return cls(
            rows,
            torch.ones(s, capacity, dtype=torch.int8, device=device) if marks is None else marks,
            torch.tensor([drained + block, drained], device=device),
            block,
            torch.zeros(s, dtype=torch.int32, device=device),
            torch.full((s, dim), NAN, dtype=torch.float64, device=device),
            torch.full((s, dim), 99, dtype=torch.int32, device=device),
            torch.full((s, 1 + (rows.dtype == torch.float32), block, dim), NAN, dtype=torch.float16, device=device),
            torch.full((s,), 5, dtype=torch.int64, device=device),
        )

    def clone(self) -> "Ring":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Ring(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()})

    def freeze(self, step: Callable[..., None] | None = None) -> "Ring":
        step = step or ops.step("freeze", self.rows.device)
        step(self.rows, self.marks, self.cursor, self.block, self.frozen, self.shift, self.exponent)
        return self

    def convert(self, step: Callable[..., None] | None = None) -> "Ring":
        step = step or ops.step("convert", self.rows.device)
        step(self.rows, self.marks, self.cursor, self.block, self.shift, self.exponent, self.y, self.overrange)
        return self

    def tail(self) -> Tensor:
        """The block's rows [S, block, D] in float64."""
        return self.rows[:, -self.block :].double()


def same(a: Ring, b: Ring) -> None:
    for f in fields(Ring):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if isinstance(left, Tensor):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=f.name)


def noisy(dtype: torch.dtype, device: torch.device, s: int, capacity: int, dim: int, seed: int = 0) -> Tensor:
    """Columns of random scales and means, up to many deviations from 0."""
    g = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand(dim, generator=g).double() * 3 - 1.5)
    mean = 4 * torch.randn(dim, generator=g).double() ** 3
    return (scale * (torch.randn(s, capacity, dim, generator=g).double() + mean)).to(dtype).to(device)


def column(values: list[float], dtype: torch.dtype, device: torch.device, repeat: int = 32) -> Tensor:
    """Rows [1, N, 1] that take the values in turn."""
    return torch.tensor(values, dtype=dtype, device=device).repeat(repeat).reshape(1, -1, 1)


# --- against the reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("s", "capacity", "block", "dim"), [(2, 192, 64, 1), (1, 1056, 1056, 17), (1, 96, 96, 65)])
def test_freeze_is_the_reference(
    dtype: torch.dtype, s: int, capacity: int, block: int, dim: int, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(1)
    marks = torch.randint(0, 3, (s, capacity), generator=g).to(torch.int8)
    marks[:, -block : -block + 3 * block // 32] = 0  # three runs have no row that counts
    rows = noisy(dtype, device, s, capacity, dim)
    marks = marks.to(device)
    rows[marks == 0] = NAN
    rows[:, :-block] = torch.inf  # not of the block
    ring = Ring.of(rows, block, marks)
    expected = ring.clone().freeze(freeze_ref)
    same(ring.freeze(), expected)
    assert expected.shift.isfinite().all()
    assert ((expected.exponent >= -8) & (expected.exponent <= 6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("s", "capacity", "block", "dim"),
    [
        (2, 99, 33, 1),
        (3, 64, 32, 3),
        (1, 31, 31, 17),
        (2, 1, 1, 65),
        (1, 66, 33, 100),
        (2, 80, 40, 384),
        (1, 9, 9, 1000),
    ],
)
def test_convert_is_the_reference(
    dtype: torch.dtype, s: int, capacity: int, block: int, dim: int, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(2)
    marks = torch.randint(0, 3, (s, capacity), generator=g).to(torch.int8).to(device)
    rows = noisy(dtype, device, s, capacity, dim)
    huge = torch.rand(s, capacity, generator=g).to(device) < 0.2
    rows[..., -1:] = rows[..., -1:].masked_fill(huge[..., None], 6e4)
    rows[marks == 0] = NAN
    rows[:, :-block] = torch.inf
    ring = Ring.of(rows, block, marks.clone())
    ring.shift = rows[0, -1:].double().nan_to_num(1.0).expand(s, dim).contiguous()
    ring.exponent = torch.randint(-3, 9, (s, dim), generator=g).int().to(device)
    ring.shift[:, -1], ring.exponent[:, -1] = 0.0, -3
    expected = ring.clone().convert(convert_ref)
    same(ring.convert(), expected)
    lost = (huge & (marks > 0))[:, -block:]
    assert expected.y.isfinite().all()
    assert torch.equal(ring.overrange, 5 + lost.sum(1))
    assert torch.equal(ring.marks[:, -block:] > 0, (marks[:, -block:] > 0) & ~lost)
    assert not ring.y[:, 0][ring.marks[:, -block:] == 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_any_address_are_read(dtype: torch.dtype, device: torch.device) -> None:
    rows = noisy(dtype, device, 1, 64, 32)
    moved = torch.zeros(rows.numel() + 1, dtype=dtype, device=device)[1:].view(rows.shape)
    moved.copy_(rows)
    expected = Ring.of(rows, 64).freeze().convert()
    same(Ring.of(moved, 64).freeze().convert(), expected)
    assert expected.y.isfinite().all()


# --- what is left alone


def test_a_block_that_is_not_full_changes_nothing(device: torch.device) -> None:
    ring = Ring.of(noisy(torch.bfloat16, device, 2, 64, 5), 32)
    ring.cursor[0] -= 1
    for freeze, convert in ((None, None), (freeze_ref, convert_ref)):
        same(ring.clone().freeze(freeze).convert(convert), ring)


def test_only_what_is_not_frozen_is_set(device: torch.device) -> None:
    ring = Ring.of(noisy(torch.bfloat16, device, 3, 64, 5), 32)
    ring.frozen[1] = 1
    ring.freeze()
    assert ring.shift.isnan().all(1).tolist() == [False, True, False]
    assert (ring.exponent == 99).all(1).tolist() == [False, True, False]
    assert ring.frozen.tolist() == [0, 1, 0]


# --- the rule, by hand


BY_HAND = {  # two values that take turns: shift, exponent
    (-1.0, 1.0): (0.0, 0),
    (9.0, 11.0): (10.0, 0),  # std 1
    (6.0, 10.0): (8.0, 1),  # std 2
    (5.0, 9.0): (8.0, 1),  # mean 7: half way, up
    (-5.0, -9.0): (-6.0, 1),
    (-1.0, 3.0): (0.0, 1),  # |mean| = std / 2
    (-0.75, 3.25): (2.0, 1),
    (0.0625, -0.0625): (0.0, -4),
    (0.375, 0.625): (0.5, -3),
    (0.0625, 0.4375): (0.25, -3),  # std 3/16
    (512.0, 516.0): (514.0, 1),  # 9 bits
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_literal_freeze(dtype: torch.dtype, device: torch.device) -> None:
    rows = torch.cat([column(list(values), dtype, device) for values in BY_HAND], 2)
    for step in (freeze_ref, None):
        ring = Ring.of(rows, 64).freeze(step)
        assert list(zip(ring.shift[0].tolist(), ring.exponent[0].tolist(), strict=True)) == list(BY_HAND.values())


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.float16, 0.5), (torch.float32, 2.0**-14)])
def test_a_shift_has_no_more_bits_than_the_rows(dtype: torch.dtype, ulp: float, device: torch.device) -> None:
    rows = column([1000.0, 1000.0, 1000.0, 1000.0 + ulp], dtype, device)  # std 0.43 ulp
    for step in (freeze_ref, None):
        ring = Ring.of(rows, 128).freeze(step)
        assert ring.shift.item() == 1000.0
        assert ring.exponent.item() == torch.tensor(ulp).log2() - 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_literal_convert(dtype: torch.dtype, device: torch.device) -> None:
    for step in (convert_ref, None):
        ring = Ring.of(column([10.0, 14.0, 4.0, 10.5], dtype, device, repeat=8), 32)
        ring.shift.fill_(10.0)
        ring.exponent.fill_(1)
        ring.marks[0, 1] = 0
        ring.convert(step)
        assert ring.y[0, 0, :4, 0].tolist() == [0.0, 0.0, -3.0, 0.25]
        assert not ring.y[0, 1:].any()


def test_literal_two_parts(device: torch.device) -> None:
    for step in (convert_ref, None):
        ring = Ring.of(column([1.0 + 2**-11, 3 - 2**-20], torch.float32, device, repeat=16), 32)
        ring.shift.fill_(0.0)
        ring.exponent.fill_(0)
        ring.convert(step)
        assert ring.y[0, :, 0, 0].tolist() == [1.0, 1.0]  # half way goes to the even one
        assert ring.y[0, :, 1, 0].tolist() == [3.0, -(2.0**-9)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_and_empty_columns(dtype: torch.dtype, device: torch.device) -> None:
    rows = torch.full((1, 64, 3), 0.1, dtype=dtype, device=device)
    rows[..., 1] = 0.0
    rows[..., 2] = -300.0
    marks = torch.ones(1, 64, dtype=torch.int8, device=device)
    for step in (freeze_ref, None):
        ring = Ring.of(rows, 64, marks).freeze(step)
        assert torch.equal(ring.shift[0], rows[0, 0].double())
        assert not ring.exponent.any()
        assert not ring.convert().y.any()
        nothing = Ring.of(rows, 64, torch.zeros_like(marks)).freeze(step)
        assert not nothing.shift.any()
        assert not nothing.exponent.any()


# --- rows that are far off


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_first_row_of_3000_changes_nothing_that_matters(dtype: torch.dtype, device: torch.device) -> None:
    rows = 8 * noisy(dtype, device, 1, 512, 16, seed=3)
    rows[..., 0] = 0.25
    rows[0, 0] = 3000.0
    ring = Ring.of(rows, 512).freeze().convert()
    x = ring.tail()[0, 1:, 1:]
    mean, std = x.mean(0), x.std(0)
    assert ((mean - ring.shift[0, 1:]).abs() <= 0.6 * std).all()  # half a step of at most std, and the medians' error
    spread = torch.ldexp(std, -ring.exponent[0, 1:])
    assert ((spread >= 0.9) & (spread < 2.2)).all()
    y = torch.ldexp(ring.y[0, :, :, 0].double(), ring.exponent[0, 0]) + ring.shift[0, 0]  # of a constant column
    assert (y[0, 1:] == 0.25).all()
    assert y[0, 0] == (3000 if dtype != torch.bfloat16 else 3008)


def test_rare_values_of_a_column_that_hardly_moves_are_kept(device: torch.device) -> None:
    """In most runs nothing but zeros: the scale is then that of all of the block."""
    rows = torch.zeros(1, 1024, 2, device=device)
    rows[0, ::200] = torch.tensor([3e5, 3e-7], device=device)
    ring = Ring.of(rows, 1024).freeze().convert()
    assert ring.overrange.item() == 5
    high, low = ring.y[0].double()
    y = torch.ldexp(high + low / 2048, ring.exponent[0])
    torch.testing.assert_close(y, rows[0].double(), rtol=2.0**-20, atol=0)
    assert not ring.shift.any()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_float32_rows_at_the_end_of_the_range(device: torch.device) -> None:
    g = torch.Generator().manual_seed(4)
    z = torch.randn(1, 256, 3, generator=g).clamp(-3, 3)
    rows = (z * torch.tensor([1e38, 1e37, 1.0]) + torch.tensor([0.0, 3e38, 0.0])).to(device)
    rows[0, 7, 2] = 3.4e38
    rows[0, 9, 2] = -3.4e38
    ring = Ring.of(rows, 256)
    expected = ring.clone().freeze(freeze_ref).convert(convert_ref)
    same(ring.freeze().convert(), expected)
    assert ring.exponent[0].tolist()[1:] in ([122, -1], [123, -1], [122, 0], [123, 0])
    assert ring.overrange.item() == 7
    assert ring.marks[0, 6:10].tolist() == [1, 0, 1, 0]
    spread = ring.y[0, 0].double().std(0)
    assert ((spread >= 0.9) & (spread < 2.2)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_row_that_should_not_be_there_takes_only_its_run_out(bad: float, device: torch.device) -> None:
    rows = noisy(torch.float32, device, 1, 256, 4)
    rows[0, 100, 2] = bad
    ring = Ring.of(rows, 256)
    same(ring.clone().freeze(), ring.freeze(freeze_ref))
    assert ring.shift.isfinite().all()
    ring.convert()
    assert ring.overrange.item() == 6
    assert ring.y.isfinite().all()
    assert not ring.y[0, :, 100].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sign", [1, -1])
def test_65504_is_kept_and_the_next_number_is_not(dtype: torch.dtype, sign: int, device: torch.device) -> None:
    most = 65504.0 if dtype == torch.float16 else 65504 + 2**-8
    rows = torch.ones(1, 32, 300, dtype=dtype, device=device)
    rows[0, 3, 299] = sign * 65504.0
    rows[0, 4, 299] = sign * most / (1 + (dtype == torch.float16))
    ring = Ring.of(rows, 32)
    ring.shift.fill_(0.0)
    ring.exponent.fill_(0)
    ring.exponent[0, 299] = 0 if dtype == torch.float32 else -1
    ring.convert()
    lost = [4] if dtype == torch.float32 else [3]
    assert (ring.marks[0] == 0).nonzero().flatten().tolist() == lost
    assert not ring.y[0, :, lost[0]].any()
    assert ring.y[0, 0, 7 - lost[0], 299].item() == sign * 65504.0
    assert ring.overrange.item() == 6


# --- what is rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_are_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    """Every number of the dtype that stays in range, about shifts of 11 bits: float64 rounded to fp16 directly."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.abs().double() <= 60000]  # NaN is not
    every = every[: len(every) // 64 * 64]
    g = torch.Generator().manual_seed(5)
    rows = every.view(1, 64, -1).transpose(1, 2)[:, : len(every) // 64].contiguous().to(device)  # [1, N, 64]
    ring = Ring.of(rows, rows.shape[1])
    step = torch.randint(0, 3, (1, 64), generator=g)  # of the shift, over that of the scale
    ring.exponent = torch.randint(0, 5, (1, 64), generator=g).int().to(device)
    whole = torch.randint(-2047, 2048, (1, 64), generator=g)
    ring.shift = torch.ldexp(whole.double(), step).to(device)
    ring.shift = torch.ldexp(ring.shift, ring.exponent)
    ring.convert()
    exact = torch.ldexp(ring.tail() - ring.shift[:, None], -ring.exponent[:, None]).cpu().numpy()
    assert ring.overrange.item() == 5
    assert np.array_equal(ring.y[:, 0].cpu().numpy(), exact.astype(np.float16))


def test_float32_rows_keep_22_bits(device: torch.device) -> None:
    ring = Ring.of(noisy(torch.float32, device, 1, 128, 40, seed=6), 128).freeze().convert()
    exact = torch.ldexp(ring.tail()[0] - ring.shift[0], -ring.exponent[0])
    high, low = ring.y[0].double()
    assert ((high + low / 2048 - exact).abs() <= 2.0**-22 * exact.abs() + 2.0**-36).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_and_shift_keep_the_contract(dtype: torch.dtype, device: torch.device) -> None:
    """std(y) in [1, 2), |mean(y)| <= 1/2 std(y), and the shift in as many bits as x - s may have."""
    ring = Ring.of(noisy(dtype, device, 1, 2048, 32, seed=7), 2048).freeze()
    x, k, s = ring.tail()[0], ring.exponent[0], ring.shift[0]
    std, slack = x.std(0), 0.1  # of a median over runs of 64 rows
    y = torch.ldexp(std, -k)
    assert ((y >= 1 - slack) & (y < 2 + 2 * slack)).all()
    assert ((x.mean(0) - s).abs() <= (0.5 + slack) * std).all()
    assert (s[x.mean(0).abs() < (0.5 - slack) * std] == 0).all()
    whole = torch.ldexp(s, -k)
    assert torch.equal(whole, whole.round())
    assert torch.equal(s, s.float().double())
    if dtype != torch.float32:
        assert torch.equal(torch.ldexp(s.frexp().mantissa, torch.tensor(11)).frac(), torch.zeros_like(s))


# --- on hardware


def untouched(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that costs nothing until it is written."""
    if device.type == "cuda":
        return torch.empty(shape, dtype=dtype, device=device)
    size = int(np.prod(shape)) * torch.empty(0, dtype=dtype).element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)


def test_offsets_pass_two_to_the_31(device: torch.device) -> None:
    """Two hook points of 2^21 + 64 rows of 1024 columns, of which each launch reaches the first few rows."""
    block, dim = (1 << 21) + 64, 1024
    rows = untouched((2, block, dim), torch.float16, device)
    y = untouched((2, 1, block, dim), torch.float16, device)
    marks = untouched((2, block), torch.int8, device)
    few = slice(0, 8)
    rows[:, few] = torch.tensor([1.0, 2.0], dtype=torch.float16, device=device)[:, None, None]
    marks[:, few] = 1
    shift = torch.zeros(2, dim, dtype=torch.float64, device=device)
    exponent = torch.zeros(2, dim, dtype=torch.int32, device=device)
    overrange = torch.zeros(2, dtype=torch.int64, device=device)
    cursor = torch.tensor([block, 0], device=device)
    args = (rows, marks, cursor, shift, exponent, y, overrange, block, block, dim)
    convert_kernel[(1, 2)](*args, BLOCK_N=8, BLOCK_D=128)
    assert (y[0, 0, few] == 1).all()
    assert (y[1, 0, few] == 2).all()
    assert not overrange.any()


COMPILED = """
import re
from emocore import aot
for variant in aot.variants("convert"):
    built = aot.build(variant, 90)
    assert built.spilled == 0 and built.shared <= 2048 and built.registers <= 96, built
    assert ".ftz" not in built.ptx and not re.search(r"(red|atom)[.][^;]*[.]f(16|32|64)", built.ptx)
    if variant.kernel.__name__ == "convert_kernel":
        parts = 2 if "fp32" in built.name else 1
        # a tile of 4096 by 256 threads: what is read, and exponents; what is written, here and where a row is lost
        assert built.ptx.count("ld.global.v4") == 2 * parts + 2, built.name
        assert built.ptx.count("st.global.v4") == 4 * parts, built.name
        assert len(re.findall(r"red[.]global[^;]*[.]u64", built.ptx)) == 1
        assert "cvt.rn.f16.f32" in built.ptx and "cvt.rn.f16.f64" not in built.ptx
"""


def test_both_compile_to_16_byte_accesses_without_spills(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
