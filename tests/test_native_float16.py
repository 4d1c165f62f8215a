"""float16 rows in emocore._C: every value widened and rounded as IEEE 754 says, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from emocore import _C, ops


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


EVERY = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)


def added(x: np.ndarray, delta: np.ndarray) -> np.ndarray:
    out = np.full_like(x, np.nan)
    _C.steer_add(x, delta, out, 1)
    return out


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """The same bits, but for those of a NaN."""
    nan = np.isnan(a)
    return np.array_equal(nan, np.isnan(b)) and np.array_equal(a[~nan].view(np.uint16), b[~nan].view(np.uint16))


def test_by_hand(isa: str) -> None:
    # 11 bits: 2048 + 1 is a tie and goes to even, 2050 + 1 up to 2052; 65504 + 16 is halfway to infinity; half of the
    # smallest number is a tie with zero
    x = np.array([[2048, 2050, 65504, 65504, 0, 0]], np.float16)
    delta = np.array([1, 1, 15.99, 16, 2.0**-25, 2.0**-24], np.float32)
    assert added(x, delta).tolist() == [[2048, 2052, 65504, np.inf, 0, 2.0**-24]]


@pytest.mark.parametrize("width", [256, 7])
def test_every_value_is_read(isa: str, width: int) -> None:
    """As float32 where it is added to, as float64 where it is summed."""
    x = np.resize(EVERY, (-(-EVERY.size // width), width))
    assert same(added(x, np.full(width, -0.0, np.float32)), x)
    finite = np.where(np.isfinite(x), x, np.float16(0))
    sums = np.zeros((len(x), width))
    _C.label_sums(finite, np.arange(len(x), dtype=np.int32), None, np.zeros(width), sums, None, 1)
    assert np.array_equal(sums, finite.astype(np.float64))


@pytest.mark.parametrize("width", [4096, 4095])
def test_sums_are_rounded_to_nearest_even(isa: str, width: int) -> None:
    """Every value of the format, what lies halfway to the next and just beside it, and float32 of any exponent."""
    values = np.unique(EVERY[np.isfinite(EVERY)].astype(np.float32))
    end = np.float32(65536)
    halfway = (np.append(values, end) + np.append(-end, values)) / 2
    beside = [np.nextafter(halfway, np.float32(side)) for side in (-np.inf, np.inf)]
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    everything = np.concatenate([values, halfway, *beside, bits.view(np.float32)])
    zeros = np.zeros((1, width), np.float16)
    with np.errstate(all="ignore"):
        expected = (everything + np.float32(0)).astype(np.float16)
    for start in range(0, len(everything) - width, width):
        delta = everything[start : start + width]
        assert same(added(zeros, delta)[0], expected[start : start + width])


def test_one_bad_value_clears_its_row(isa: str) -> None:
    x = np.ones((3, 37), np.float16)
    x[1, 36] = np.inf
    out, norms, finite = np.full_like(x, np.nan), np.full(3, np.nan), np.full(3, 7, np.uint8)
    assert _C.stage(x, None, out, norms, finite, 1) == 1
    assert out.tolist() == [[1.0] * 37, [0.0] * 37, [1.0] * 37]
    assert norms.tolist() == [37**0.5, 0, 37**0.5]


def test_rows_are_multiplied_as_their_float32s(isa: str) -> None:
    """Gram and scores of float16 rows have the very bits of those of the same rows in float32."""
    rng = np.random.default_rng(0)
    x, shift = rng.standard_normal((700, 150)).astype(np.float16), rng.standard_normal(150).astype(np.float32)
    V = rng.standard_normal((5, 150)).astype(np.float32)
    found = []
    for rows in (x, x.astype(np.float32)):
        tiles, scores = np.zeros((3, 128, 128)), np.full((700, 5), np.nan, np.float32)
        _C.gram(rows, None, shift.astype(np.float64), tiles, 2)
        _C.project(rows, V, shift.astype(np.float64), True, scores, 2)
        found.append((tiles, scores))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])


@pytest.mark.parametrize("index", [None, torch.tensor([2, 0, 1, 2])])
def test_rows_are_staged_as_their_float32s(isa: str, index: torch.Tensor | None) -> None:
    x = torch.randn(3, 37, generator=torch.Generator().manual_seed(0)).half()
    x[1, 5] = torch.nan
    found = []
    for given in (x, x.float()):
        n = 3 if index is None else 4
        rows, norms, finite = torch.full((n, 37), torch.nan), torch.full((n,), torch.nan).double(), torch.ones(n).bool()
        ops.stage(given, index, rows, norms, finite)
        found.append((rows, norms, finite))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not found[0][2].all()
