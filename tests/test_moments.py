"""What a Moments says, against hand-worked figures, NumPy in float64, and sums done directly."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from emocore.errors import FitError, LabelError, PrecisionError, PrecisionWarning
from emocore.moments import Moments
from emocore.precision import BLOCK_CHAINS, CHAIN

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 3, 17, 129]


def randn(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gathered(x: Tensor, labels: list[int] | Tensor | None = None, **options: object) -> Moments:
    k = None if labels is None else int(max(labels)) + 1
    m = Moments(k, covariance=True, **options)
    m.update(x, labels)
    m.ledger.check()
    return m


def close(a: Tensor, b: Tensor | np.ndarray, tolerance: float = 1e-12) -> None:
    """Equal to `tolerance` of the largest entry."""
    b = torch.as_tensor(b)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()), equal_nan=True)


# --- worked by hand


def test_hand_worked_statistics() -> None:
    m = Moments(["calm", "sad", "never"], covariance=True)
    m.update(torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]]), ["calm", "calm", "sad"])
    assert (m.count, m.weight, m.dim) == (3, 3.0, 2)
    assert m.mean.tolist() == [3, 3]
    assert m.variance.tolist() == [4, 3]
    assert m.covariance().tolist() == [[4, 3], [3, 3]]
    assert m.covariance(ddof=0).tolist() == [[8 / 3, 2], [2, 2]]
    assert m.total_scatter().tolist() == [[8, 6], [6, 6]]
    assert m.within_scatter().tolist() == [[2, 0], [0, 0]]
    assert m.between_scatter().tolist() == [[6, 6], [6, 6]]
    assert m.label_count.tolist() == [2, 1, 0]
    assert m.label_mean[:2].tolist() == [[2, 2], [5, 5]]
    assert m.label_variance[:2].tolist() == [[2, 0], [0, 0]]
    assert m.label_mean[2].isnan().all()
    assert m.label_variance[2].isnan().all()
    assert repr(m) == "Moments(3 rows, D=2, 3 labels, covariance)"


def test_hand_worked_mean_norm() -> None:
    m = Moments()
    m.update(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    m.update(torch.tensor([[torch.nan, 0.0], [0.0, 6.0]]))
    assert m.mean_norm == (5 + 1 + 6) / 3


def test_shrinkage_blends_with_the_scaled_identity() -> None:
    m = gathered(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
    assert m.covariance(ddof=0).tolist() == [[2, 0], [0, 0.5]]
    assert m.covariance(ddof=0, shrinkage=0.5).tolist() == [[1.625, 0], [0, 0.875]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_moments_come_back_exactly(dtype: torch.dtype) -> None:
    """Rows mean + scale * (a Hadamard matrix's columns): mean and covariance known without rounding in any dtype."""
    h = torch.ones(1, 1)
    while len(h) < 1024:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    mean, scale = torch.tensor([0.0, 2.0, -12.0, 96.0]), torch.tensor([1.0, 0.5, 4.0, 2.0])
    m = gathered((mean + scale * h[:, 1:5]).to(dtype))
    assert m.mean.tolist() == mean.tolist()
    assert torch.equal(m.covariance(ddof=0), (scale**2).double().diag())


# --- against NumPy


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 3.0, 1e4])
def test_float64_equals_numpy(d: int, offset: float) -> None:
    x = randn(3000, d) * torch.linspace(0.1, 10, d) + offset
    m, wanted = gathered(x), np.asarray(x, dtype=np.longdouble)
    deviations = wanted - wanted.mean(0)
    close(m.mean, wanted.mean(0).astype(np.float64))
    close(m.covariance(), (deviations.T @ deviations / (len(x) - 1)).astype(np.float64))
    close(m.variance, deviations.var(0, ddof=1).astype(np.float64))


def test_label_statistics_equal_numpy_label_by_label() -> None:
    x, ids = randn(2000, 17) + 5, torch.arange(2000) % 7
    m = gathered(x, ids)
    for k in range(7):
        part = x[ids == k].numpy()
        close(m.label_mean[k], part.mean(0))
        close(m.label_variance[k], part.var(0, ddof=1))
        assert m.label_count[k] == len(part)


def test_means_only_keeps_the_same_means_and_variances() -> None:
    x, ids = randn(9000, 5) + 2, torch.arange(9000) % 3
    full, lean = gathered(x, ids), Moments(3)
    lean.update(x, ids)
    assert torch.equal(full.mean, lean.mean)
    assert torch.equal(full.label_variance, lean.label_variance)
    close(lean.variance, full.variance)
    assert len(lean.state_dict()["tiles"]) == 0
    with pytest.raises(FitError, match="only means"):
        lean.covariance()


def test_offset_of_1e4_costs_float32_nothing() -> None:
    x = (randn(20_000, 9) + 1e4).float()
    m, wanted = gathered(x), np.cov(x.double().numpy(), rowvar=False)
    close(m.covariance(), wanted, 1e-6)
    assert m.precision()["variance_bound"] == 1e-6


# --- scatters


def test_within_and_between_add_up_to_total() -> None:
    m = gathered(randn(5000, 12) + torch.arange(5000).remainder(4).unsqueeze(1), torch.arange(5000) % 4)
    close(m.within_scatter() + m.between_scatter(), m.total_scatter(), 1e-14)


def test_scatters_equal_the_direct_sums() -> None:
    x, ids = randn(700, 6) * 3 + 40, torch.arange(700) % 5
    m = gathered(x, ids)
    within = sum((y := x[ids == k] - x[ids == k].mean(0)).T @ y for k in range(5))
    means = torch.stack([x[ids == k].mean(0) - x.mean(0) for k in range(5)])
    close(m.within_scatter(), within)
    close(m.between_scatter(), 140 * means.T @ means)


def test_unlabelled_rows_count_overall_and_in_no_label() -> None:
    m = Moments(["a", "b"], covariance=True)
    m.update(torch.tensor([[1.0], [2.0], [9.0]]), ["a", "b", None])
    m.update(torch.tensor([[4.0]]))
    assert m.count == 4
    assert m.mean.tolist() == [4]
    assert m.label_count.tolist() == [1, 1]
    assert m.label_mean.tolist() == [[1], [2]]
    m.ledger.check()
    assert m.ledger.rows.bad_label == 0
    for scatter in (m.within_scatter, m.between_scatter):
        with pytest.raises(LabelError, match="2 of 4 rows unlabelled"):
            scatter()


# --- weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frequency_weights_equal_repeated_rows(dtype: torch.dtype) -> None:
    x, ids = randn(400, 5, dtype=dtype) + 3, torch.arange(400) % 3
    times = torch.arange(400) % 4
    weighted, repeated = Moments(3, covariance=True), Moments(3, covariance=True)
    weighted.update(x, ids, times)
    repeated.update(x.repeat_interleave(times, 0), ids.repeat_interleave(times))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert weighted.weight == repeated.weight == repeated.count
    close(weighted.mean, repeated.mean)
    close(weighted.label_variance, repeated.label_variance)
    close(weighted.covariance(), repeated.covariance(), tolerance)
    close(weighted.within_scatter(), repeated.within_scatter(), tolerance)


def test_fractional_weights_equal_numpy() -> None:
    x, w = randn(500, 4) + 2, torch.linspace(0.01, 2, 500)
    m = Moments(covariance=True)
    m.update(x, weights=w)
    close(m.mean, np.average(x.numpy(), axis=0, weights=w.numpy().astype(float)))
    wanted = np.cov(x.numpy(), rowvar=False, ddof=0, aweights=w.numpy().astype(float))
    close(m.covariance(ddof=0), wanted)


def test_weight_of_one_is_no_weight() -> None:
    x = randn(9000, 3, dtype=torch.float32)
    plain, ones = Moments(covariance=True), Moments(covariance=True)
    plain.update(x)
    ones.update(x[:100])
    ones.update(x[100:], weights=torch.ones(8900))
    assert torch.equal(plain.covariance(), ones.covariance())


def test_row_of_weight_zero_moves_no_statistic_and_no_shift() -> None:
    x = torch.cat([torch.full((1, 2), 1e6), torch.full((600, 2), 0.1, dtype=torch.float64)])
    m = Moments(covariance=True)
    m.update(x, weights=[0.0] + [1.0] * 600)
    assert m.mean.tolist() == [0.1, 0.1]
    assert not m.covariance().any()


def test_weights_that_add_up_to_nothing_have_no_mean() -> None:
    m = Moments()
    m.update(torch.ones(2, 2), weights=[0, 0])
    with pytest.raises(FitError, match="add up to nothing"):
        _ = m.mean


# --- no freedom, no variance


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_row_has_variance_exactly_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e-3, 0.1, 3000.0]], dtype=dtype)
    m = gathered(x, [0])
    assert torch.equal(m.mean, x[0].double())
    assert torch.equal(m.label_mean, x.double())
    for zero in (m.variance, m.label_variance, m.covariance(), m.covariance(ddof=0), m.within_scatter()):
        assert not zero.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 300, 20_000])
def test_constant_column_has_variance_exactly_zero(n: int, dtype: torch.dtype) -> None:
    x = randn(n, 3, dtype=dtype)
    x[:, 1] = 0.1
    m = gathered(x, torch.arange(n) % 2)
    m.merge(m.copy())
    assert m.mean[1] == x[0, 1].double()
    assert m.variance[1] == 0
    assert not m.covariance()[1].any()
    assert not m.covariance()[:, 1].any()
    assert not m.label_variance[:, 1].any()


def test_nothing_seen_has_no_statistics() -> None:
    m = Moments(2, dim=3)
    assert (m.count, m.weight, m.dim, m.label_count.tolist()) == (0, 0.0, 3, [0, 0])
    for name in ("mean", "variance", "label_mean", "label_variance", "mean_norm"):
        with pytest.raises(FitError):
            getattr(m, name)
    with pytest.raises(FitError, match="width is not known"):
        _ = Moments().dim


# --- large counts, by doubling


def doubled(m: Moments, times: int) -> Moments:
    for _ in range(times):
        m.merge(copy.deepcopy(m))
    return m


@pytest.mark.parametrize("times", [24, 31, 40])
def test_counts_stay_exact_past_2_to_the(times: int) -> None:
    x = torch.tensor([[1.0, 0.0], [2.0, 5.0], [6.0, 4.0]])
    once = gathered(x, [0, 1, 1])
    m = doubled(once.copy(), times)
    n = 3 << times
    assert m.count == n
    assert m.label_count.tolist() == [n // 3, 2 * n // 3]
    assert m.ledger.rows.accumulated == m.ledger.rows.formed == n
    m.ledger.check()
    assert torch.equal(m.mean, once.mean)
    assert torch.equal(m.total_scatter(), once.total_scatter() * 2**times)
    assert torch.equal(m.covariance(), m.total_scatter() / (n - 1))  # n - 1 has no float32
    assert m.mean_norm == pytest.approx(once.mean_norm, rel=1e-15)


def test_one_more_row_is_seen_past_2_to_the_31() -> None:
    m = doubled(gathered(torch.tensor([[1.0], [2.0]])), 31)
    m.update(torch.tensor([[1.5]]))
    assert m.count == 2**32 + 1
    assert m.weight == 2.0**32 + 1


# --- shifts that are off


@pytest.mark.parametrize("block_rows", [512, 8192])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_first_row_of_3000_changes_nothing(dtype: torch.dtype, block_rows: int) -> None:
    x = torch.cat([torch.full((1, 6), 3000.0), randn(40_000, 6)]).to(dtype)
    m, rest = gathered(x, block_rows=block_rows), gathered(x[1:])
    # every partial sum of the first block holds 3000^2: roundings of half an ulp that do not average out
    worst = 1e-12 if dtype == torch.float64 else (CHAIN + BLOCK_CHAINS) * 2.0**-24
    close(m.covariance(), np.cov(x.double().numpy(), rowvar=False), worst)
    assert m.precision()["offset"] < 0.25
    m.subtract(gathered(x[:1]))
    close(m.mean, rest.mean, 1e-12)
    close(m.covariance(), rest.covariance(), 300 * worst)  # the variance was 226, and is 1


def drifting(dtype: torch.dtype, step: float) -> tuple[Tensor, Tensor]:
    ids = torch.arange(24_000) // 3000
    return (randn(24_000, 6) + step * ids.unsqueeze(1)).to(dtype), ids


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_ordered_stream_within_the_contract_is_silent(dtype: torch.dtype) -> None:
    x, ids = drifting(dtype, 0.1)
    m = gathered(x, ids, strict=True)
    wanted = np.cov(x.double().numpy(), rowvar=False)
    close(m.covariance(), wanted, m.precision()["variance_bound"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_label_ordered_stream_beyond_the_contract_warns_and_the_bound_holds(dtype: torch.dtype) -> None:
    x, ids = drifting(dtype, 0.1)
    x[8192:] += 30  # all but the first block, a third of the rows: offset (20/14)^2 = 2
    m = gathered(x, ids)
    with pytest.warns(PrecisionWarning, match="standard deviations from the shift"):
        covariance = m.covariance()
    report = m.precision()
    assert 1 < report["offset"] < 3
    close(covariance, np.cov(x.double().numpy(), rowvar=False), report["variance_bound"])
    m.strict = True
    for read in (m.covariance, m.within_scatter, lambda: m.variance):
        with pytest.raises(PrecisionError):
            read()
    assert m.mean.isfinite().all()


def test_overflowed_sums_are_reported() -> None:
    m = gathered(torch.tensor([[1e25], [-1e25], [0.0]]).repeat(200, 1))
    assert math.isinf(m.precision()["variance_bound"])
    with pytest.warns(PrecisionWarning):
        m.covariance()
