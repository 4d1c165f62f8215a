"""The numerical contract, by measurement: every bound of precision.py over scales and ratios of mean to deviation."""

import pytest
import torch
from torch import Tensor

from emocore import _C, ops, precision
from emocore.errors import ArgumentError
from emocore.linalg import tile_count, unpack_tiles
from emocore.moments import Moments
from emocore.sums import shift_of

DTYPES = list(precision.FLOATS)
RATIOS = [0, 0.5, 1, 2, 3, 10, 100]
D = 48


def rows(dtype: torch.dtype, n: int, ratio: float, seed: int) -> Tensor:
    """Correlated Gaussian columns of random scales, as many decades as the dtype holds, moved by ratio deviations."""
    g = torch.Generator().manual_seed(seed)
    decades = 1 if dtype == torch.float16 else 6
    scale = 10 ** ((torch.rand(D, generator=g, dtype=torch.float64) * 2 - 1) * decades)
    mix = torch.randn(D, D, generator=g, dtype=torch.float64) / D**0.5
    z = torch.randn(n, D, generator=g, dtype=torch.float64)
    return (scale * (z @ mix + ratio)).to(dtype)


def errors(covariance: Tensor, x: Tensor) -> tuple[float, float, float]:
    """Worst relative error of a variance, worst error of a correlation, mean signed relative error of the variances.

    Against centred rows multiplied in float64, which are good to 1e-13 themselves.
    """
    y = x.double() - x.double().mean(0)
    y -= y.mean(0)
    exact = (y.T @ y) / (len(y) - 1)
    std = exact.diag().sqrt()
    off = (covariance - exact) / std / std[:, None]
    signed = off.diag()
    return float(signed.abs().max()), float(off.abs().max()), float(signed.mean().abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_bound_holds_whatever_the_mean_and_scale(dtype: torch.dtype, ratio: float) -> None:
    for seed, n in enumerate((200, 512, 8192, 20_000)):
        bound = precision.BOUND[dtype if n >= precision.FREEZE_ROWS else torch.float64]
        x = rows(dtype, n, ratio, seed)
        m = Moments(covariance=True, strict=True)
        m.update(x)
        variance, correlation, _ = errors(m.covariance(), x)
        # a shift that is not frozen yet may lie a little farther off
        assert bound <= m.precision()["variance_bound"] <= bound * (1 if n >= precision.FREEZE_ROWS else 2)
        assert variance <= bound, n
        assert correlation <= bound, n


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_flat_in_the_number_of_rows(dtype: torch.dtype) -> None:
    """A drift would grow with the blocks; what a block's rounding leaves does not."""
    for ratio in (0, 3, 100):
        x = rows(dtype, 8192 * 12, ratio, seed=9)
        m = Moments(covariance=True)
        m.update(x)
        assert errors(m.covariance(), x)[2] <= precision.BOUND[dtype]


@pytest.mark.parametrize("values", [2, 3])
def test_columns_of_few_values_stay_under_the_worst_case(values: int) -> None:
    """Equal roundings add up: half an ulp for each row of a chain and each chain of a block, at most."""
    g = torch.Generator().manual_seed(0)
    z = torch.randint(0, values, (20_000, D), generator=g).double()
    x = (z * 10 ** (torch.rand(D, generator=g, dtype=torch.float64) * 4)).float()
    m = Moments(covariance=True)
    m.update(x)
    assert errors(m.covariance(), x)[0] <= (precision.CHAIN + precision.BLOCK_CHAINS) * 2.0**-24


# --- the offset


def summed_about(shift: Tensor, x: Tensor) -> Tensor:
    """Covariance from sums about a shift that is given, block after block."""
    tiles = torch.zeros(tile_count(D), 128, 128, dtype=torch.float64)
    total = torch.zeros(1, D, dtype=torch.float64)
    for block in x.split(precision.BLOCK_ROWS):
        ops.gram(block, None, shift, tiles)
        ops.label_sums(block, None, None, shift, total, None)
    return (unpack_tiles(tiles, D) - total.T @ total / len(x)) / (len(x) - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.25, precision.OFFSET_LIMIT, 4.0, 100.0, 1e4])
def test_bound_covers_the_measured_error_at_every_offset(dtype: torch.dtype, offset: float) -> None:
    for seed in range(2):
        x = rows(torch.float64, 8192, 0.0, seed)
        x = (x / x.std(0)).to(dtype)
        mean, std = x.double().mean(0), x.double().std(0)
        shift = (mean - offset**0.5 * std).float().double()
        variance, correlation, _ = errors(summed_about(shift, x), x)
        bound = precision.variance_bound(dtype, offset)
        assert variance <= bound
        assert correlation <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_exact_in_any_dtype(dtype: torch.dtype) -> None:
    x = rows(dtype, precision.FREEZE_ROWS - 1, 3.0, seed=0)
    m = Moments(covariance=True)
    m.update(x)
    assert errors(m.covariance(), x)[1] <= precision.BOUND[torch.float64]


def test_one_bfloat16_of_a_shifted_row_would_not_do() -> None:
    """Its rounding is no bias, but 65,536 rows do not average it out: why such rows are multiplied in two parts."""
    x = rows(torch.bfloat16, 65_536, 1.0, seed=0)
    y = x.double() - shift_of(x[:8192])
    parts = [y.bfloat16().double(), (y - y.bfloat16().double()).bfloat16().double()]
    one, two = (errors(torch.cov(p.T), y)[0] for p in (parts[0], parts[0] + parts[1]))
    assert 1.5e-5 < one < 2e-4
    assert two < 0.1 * precision.BOUND[torch.bfloat16]


def test_variance_bound_is_the_contract_up_to_the_limit_and_grows_with_the_second_moment() -> None:
    for dtype in DTYPES:
        assert precision.variance_bound(dtype, 0.0) == precision.BOUND[dtype]
        assert precision.variance_bound(dtype, precision.OFFSET_LIMIT) == precision.BOUND[dtype]
        assert precision.variance_bound(dtype, 199.0) == 100 * precision.BOUND[dtype]


# --- the shift


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_shift_lies_near_the_mean_and_in_few_bits(dtype: torch.dtype, ratio: float) -> None:
    x = rows(dtype, 8192, ratio, seed=3).double()
    shift, std = shift_of(x.to(dtype)), x.std(0)
    near = 0.6 if dtype == torch.bfloat16 else 0.3  # NEAR_ZERO, or half a step of at most std; the median's own error
    assert ((x.mean(0) - shift) ** 2 <= near * std**2).all()
    assert torch.equal(shift, shift.float().double())
    step = torch.exp2(std.log2().floor() - 1)  # runs scatter: their median deviation may lie in the octave below
    assert torch.equal((shift / step).round() * step, shift)


@pytest.mark.parametrize(("ratio", "moved"), [(0.7, False), (0.8, True)])
def test_bfloat16_columns_near_zero_stay_there(ratio: float, moved: bool) -> None:
    x = torch.tensor([ratio + 1, ratio - 1]).repeat(4096).unsqueeze(1)
    assert bool(shift_of(x.bfloat16())) == moved
    assert bool(shift_of(x))


def test_shift_of_a_centred_column_is_zero() -> None:
    assert not shift_of(torch.tensor([[1.0, 5.0], [-1.0, -5.0]]).repeat(300, 1)).any()


def test_shift_is_not_moved_by_rows_that_are_few_and_huge() -> None:
    x = torch.randn(512, 3, generator=torch.Generator().manual_seed(0))
    x[:: 512 // 14] = 1e6
    assert (shift_of(x).abs() <= 1).all()


def test_shift_of_a_constant_column_is_its_value() -> None:
    x = torch.full((600, 1), 0.1, dtype=torch.float64)
    assert shift_of(x).item() == 0.1
    x[0] = 7.0
    assert shift_of(x, torch.tensor([0.0] + [1.0] * 599).double()).item() == 0.1


# --- what is in the table


def test_table_agrees_with_the_kernels() -> None:
    assert (precision.CHAIN, precision.BLOCK_CHAINS, precision.TILE) == (_C.CHAIN, _C.BLOCK_CHAINS, _C.TILE)
    assert precision.BLOCK_ROWS == 8192
    assert precision.FREEZE_ROWS % precision.CHAIN == 0


def test_table_keeps_the_published_bounds() -> None:
    published = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1.5e-5, torch.float16: 1.5e-5}
    assert set(precision.BOUND) == set(precision.FLOATS) == set(published)
    assert all(precision.BOUND[t] <= published[t] for t in published)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_wait_and_are_multiplied_in(dtype: torch.dtype) -> None:
    assert precision.held(dtype) == (torch.float32 if dtype == torch.float16 else dtype)
    assert precision.accumulator(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert precision.check_dtype(dtype) == dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_with_the_way_out(dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match=r"x\.float\(\)"):
        precision.check_dtype(dtype)


def test_merged_streams_carry_the_coarser_contract() -> None:
    wide, narrow = Moments(covariance=True), Moments(covariance=True)
    wide.update(torch.randn(600, 2, dtype=torch.float64))
    narrow.update(torch.randn(600, 2).half())
    assert wide.precision()["variance_bound"] == 1e-12
    wide.merge(narrow)
    assert wide.precision()["variance_bound"] == 2e-6
    resumed = Moments()
    resumed.load_state_dict(wide.state_dict())
    assert resumed.precision()["variance_bound"] == 2e-6


def test_means_are_float64_sums_for_any_rows() -> None:
    m = Moments()
    m.update(torch.randn(600, 2))
    assert m.precision()["variance_bound"] == 1e-12


def test_a_dead_dimension_counts_as_constant() -> None:
    """Values near 1e-31, as a layer norm of weight zero leaves: their squares are nothing in float32."""
    x = rows(torch.float32, 8192, 0.0, seed=1)
    x[:, 0] = 1e-31 * torch.randn(8192, generator=torch.Generator().manual_seed(0)) + 3e-31
    m = Moments(covariance=True, strict=True)
    m.update(x[:600])
    m.update(x)
    assert m.variance[0] < 1e-38
    assert m.precision()["offset"] < precision.OFFSET_LIMIT
