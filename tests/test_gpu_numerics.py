"""The GPU's numerical contract without a GPU: rows as they are converted, summed as Hopper's tensor cores sum."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from emocore.precision import device_chain
from emocore.reference_drain import convert_ref, freeze_ref

from .emulation import Array, chain, gram

CHAIN = device_chain(torch.float32)  # rows that are summed in one accumulator
BLOCK = 16_384  # rows whose chains are summed in float32
BOUND, CORRELATION_BOUND = 2e-6, 5e-6
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RATIOS = [0, 0.5, 1, 2, 3, 10, 100]
D = 24
PAIRS = 8  # of neighbours, whose correlation is 0.47


class Errors(NamedTuple):
    """Of statistics of D columns: relative of a variance, absolute of a correlation."""

    variance: Array  # [D]
    correlation: Array  # [PAIRS]
    summing: Array  # [blocks, D]: of the variance of the first 1, 2, ... blocks, what the sums of y err


@functools.cache
def noise(n: int) -> Tensor:
    z = torch.randn(n, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (z + 0.7 * z.roll(-1, 1)) / 1.49**0.5


@functools.cache
def rows(dtype: torch.dtype, ratio: float, blocks: int) -> Tensor:
    """Rows [N, D] of random scales, as many decades as the dtype holds, `ratio` deviations from 0."""
    decades = 1 if dtype == torch.float16 else 6
    uniform = torch.rand(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (10 ** ((2 * uniform - 1) * decades) * (noise(blocks * BLOCK) + ratio)).to(dtype)


def converted(x: Tensor) -> tuple[Array, Array, Array]:
    """y [P, N, D], shift [D] and exponent [D], frozen from the first block."""
    n = len(x)
    y = torch.empty(1, 1 + (x.dtype == torch.float32), n, D, dtype=torch.float16)
    shift, exponent = torch.empty(1, D, dtype=torch.float64), torch.empty(1, D, dtype=torch.int32)
    marks, none = torch.ones(1, n, dtype=torch.int8), torch.zeros(1, dtype=torch.int64)
    freeze_ref(x[None], marks, torch.tensor([n, 0]), BLOCK, none, shift, exponent)
    convert_ref(x[None], marks, torch.tensor([n, 0]), n, shift, exponent, y, none)
    assert not none.any()
    return y[0].double().numpy(), shift[0].numpy(), exponent[0].numpy()


@functools.cache
def errors(dtype: torch.dtype, ratio: float, chain_rows: int, blocks: int | None = None) -> Errors:
    """Against float64 sums of the same rows; of float32 rows few do, as what two parts round is nothing here."""
    x = rows(dtype, ratio, blocks or (4 if dtype == torch.float32 else 16))
    y, shift, exponent = converted(x)
    left = np.r_[:D, :PAIRS]
    right = np.r_[:D, 1 : PAIRS + 1]
    a, b = y[:, :, left], y[:, :, right]
    sums = gram(a, b, chain_rows, BLOCK)  # [blocks, D + PAIRS]
    moved = x.double().numpy() - shift
    centred = moved - moved.mean(0)
    exact = (centred[:, left] * centred[:, right]).sum(0)
    total = moved.sum(0)
    found = np.ldexp(sums.sum(0), exponent[left] + exponent[right]) - total[left] * total[right] / len(x)
    size = np.sqrt(exact[left] * exact[right])
    error = (found - exact) / size
    lost = sums[:, :D] - np.square(value(y)).reshape(-1, BLOCK, D).sum(1)
    after = np.arange(1, len(sums) + 1)[:, None] / len(sums)
    return Errors(error[:D], error[D:], np.ldexp(lost.cumsum(0), 2 * exponent) / (exact[:D] * after))


def value(y: Array) -> Array:
    """What the parts of y [P, N, D] stand for."""
    return sum(part / 2048.0**i for i, part in enumerate(y))


# --- the emulation


def test_an_instruction_cuts_what_is_far_under_its_largest_summand() -> None:
    ones = np.ones((32, 1))
    x = np.zeros((32, 1))
    x[0] = 1.0
    for small, expected in (
        ([2**-26] * 15, 1.0),  # under 25 bits: nothing is left of any
        ([2**-25] * 8, 1.0 + 2**-22),  # of exactly 25 bits: all are there, and their sum is
        ([2**-25] * 15, 1.0 + 3 * 2**-23),  # the sum is cut to float32
        ([-(2**-26)] * 15, 1.0),  # toward zero
        ([-(2**-25)] * 1, 1.0 - 2**-24),
    ):
        x[16:] = 0.0
        x[16 : 16 + len(small), 0] = small
        assert chain(x, ones).item() == expected


def test_products_are_exact_and_order_does_not_matter() -> None:
    g = np.random.default_rng(0)
    a, b = g.standard_normal((2, 16, 50)).astype(np.float16).astype(np.float64)
    total, exact = chain(a, b), (a * b).sum(0)
    assert (np.abs(total - exact) <= 17 * np.abs(a * b).max(0) * 2.0**-25 + np.abs(exact) * 2.0**-23).all()
    assert np.array_equal(total, chain(a[::-1], b[::-1]))
    assert np.array_equal(total, total.astype(np.float32))


@pytest.mark.parametrize(("n", "published"), [(65_536, 2.7e-4), (16_384, 5.6e-5), (4096, 1e-5), (1024, 1.9e-6)])
def test_long_chains_of_squares_lose_what_was_published(n: int, published: float) -> None:
    x = torch.randn(n, 48, generator=torch.Generator().manual_seed(0)).bfloat16().double().numpy()
    lost = 1 - chain(x, x) / np.square(x).sum(0)
    assert abs(lost.mean() / published - 1) <= 0.05


# --- the contract


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bounds_hold_whatever_the_mean_and_scale(dtype: torch.dtype, ratio: float) -> None:
    check(errors(dtype, ratio, CHAIN), dtype)


@pytest.mark.parametrize("ratio", RATIOS)
def test_bfloat16_rows_may_be_summed_in_chains_of_512(ratio: float) -> None:
    check(errors(torch.bfloat16, ratio, 512), torch.bfloat16)


def check(e: Errors, dtype: torch.dtype) -> None:
    assert abs(e.variance.mean()) <= BOUND
    assert np.abs(e.summing[-1]).max() <= BOUND
    assert np.abs(e.correlation).max() <= CORRELATION_BOUND
    # What rounds y to 11 bits falls out at random: of 2 y dy, |dy| <= 2^-11 |y|, a normal column keeps 2^-10 / n^1/2.
    n = len(e.summing) * BLOCK
    rounding = 5e-8 if dtype == torch.float32 else 3 * 2.0**-10 / n**0.5
    assert np.abs(e.variance - e.summing[-1]).max() <= rounding


@pytest.mark.parametrize("ratio", [0, 0.5, 3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bias_is_flat_in_the_number_of_rows(dtype: torch.dtype, ratio: float) -> None:
    bias = errors(dtype, ratio, CHAIN).summing.mean(1)
    assert np.ptp(bias) <= 1e-7


# --- why it is what it is


@pytest.mark.parametrize("ratio", [2, 3, 10])
def test_raw_rows_are_biased_from_two_deviations_on(ratio: float) -> None:
    x = rows(torch.bfloat16, ratio, 16)[:BLOCK].double().numpy()
    lost = (gram(x[None], x[None], 512, BLOCK)[0] - np.square(x).sum(0)) / (x.var(0) * BLOCK)
    assert lost.mean() < -1.5 * BOUND


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_long_chain_is_biased(dtype: torch.dtype) -> None:
    assert errors(dtype, 0, BLOCK, blocks=2).summing[-1].mean() < -20 * BOUND


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_512_rows_are_too_long_a_chain_of_11_bits(dtype: torch.dtype) -> None:
    """Products of 22 bits lose half a unit each in the accumulator; those of bfloat16 rows mostly fit."""
    assert errors(dtype, 0, 512, blocks=4).summing[-1].mean() < -BOUND


def test_one_part_is_not_enough_for_float32_rows() -> None:
    y, _, _ = converted(rows(torch.float32, 0, 1))
    high = np.square(y[0]).sum(0) / np.square(value(y)).sum(0) - 1
    assert np.abs(high).max() > BOUND


# --- what is said of it


def table() -> list[str]:
    """Rows of the table in docs/gpu.md, in 1e-6."""
    lines = []
    for name, chain_rows in (("bfloat16", 512), *((name, CHAIN) for name in DTYPES)):
        cells = []
        for ratio in RATIOS:
            e = errors(DTYPES[name], ratio, chain_rows)
            worst = np.abs(e.variance).max(), np.abs(e.correlation).max()
            cells.append(" / ".join(f"{1e6 * x:.2f}" for x in (e.variance.mean(), *worst)))
        lines.append(f"| {name} | {chain_rows} | {' | '.join(cells)} |")
    return lines


def test_the_table_in_the_docs_is_true() -> None:
    text = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text()
    said = [line for line in text.splitlines() if re.match(r"\| b?float\d+ \| \d+ \| -?\d", line)]
    for line, fresh in zip(said, table(), strict=True):
        numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+", s)] for s in (line, fresh)]
        assert line.split("|")[1:3] == fresh.split("|")[1:3]
        assert np.allclose(*numbers, rtol=0.02, atol=0.02), fresh
