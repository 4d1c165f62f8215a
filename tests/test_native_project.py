"""Projection on the CPU: every instruction set, every way in which rows and readers are multiplied, hostile input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from emocore import _C, ops, packing, reference, reference_steering

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 3, 15, 17, 65, 100, 300)
COUNTS = (0, 1, 3, 8, 16, 31, 97)  # of rows, about the edges of few, of a tile and of a band
READERS = (1, 2, 3, 15, 16, 17, 171)  # about the edges of few and of a line

# LANES partial sums of a chain, then the chains: roundings that wander (tests/test_native.py), of |x| |v|.
UNITS = _C.CHAIN**0.5 + 4
ROUNDING = {dtype: UNITS * (2.0**-53 if dtype == torch.float64 else 2.0**-24) for dtype in DTYPES}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


@pytest.fixture(autouse=True, params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.use(request.param):
        yield request.param


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bound(x: Tensor, v: Tensor, centre: Tensor | None = None) -> Tensor:
    """What the scores may err by [N, K]."""
    y = x.double() if centre is None else x.double() - centre
    return ROUNDING[x.dtype] * y.norm(dim=1)[:, None] * v.double().norm(dim=1) + 1e-30


# --- worked by hand


@pytest.mark.parametrize("n", [2, 40])
@pytest.mark.parametrize("k", [3, 40])
def test_by_hand(n: int, k: int) -> None:
    """The same two rows and three readers, alone and among others: few and many of each."""
    x, v = torch.full((n, 2), 9.0), torch.full((k, 2), 7.0)
    x[:2], v[:3] = torch.tensor([[4.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]])
    centre = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert ops.project(x, v, centre, False)[:2, :3].tolist() == [[3, 7, -8], [0, 0, 0]]
    expected = torch.tensor([[3, 7, -8], [0, 0, 0]], dtype=torch.float64) / 5
    assert torch.equal(ops.project(x, v, centre, True)[:2, :3], expected.float())


# --- hostile shapes


@each_dtype
@pytest.mark.parametrize("d", WIDTHS)
def test_scores(dtype: torch.dtype, d: int) -> None:
    x, v, centre = normals(max(COUNTS), d, dtype=dtype), normals(max(READERS), d, seed=1), normals(d, seed=2).double()
    for n in COUNTS:
        for k in READERS:
            found = ops.project(x[:n], v[:k], centre, False)
            exact = (x[:n].double() - centre) @ v[:k].double().T
            assert found.shape == (n, k)
            assert ((found - exact).abs() <= bound(x[:n], v[:k], centre)).all()


@pytest.mark.parametrize(("n", "k", "d"), [(4097, 171, 65), (33, 512, 8191), (5, 512, 2880), (4097, 1, 384)])
def test_large(n: int, k: int, d: int) -> None:
    x, v = normals(n, d), normals(k, d, seed=1)
    assert ((ops.project(x, v, None, False) - x.double() @ v.double().T).abs() <= bound(x, v)).all()


@each_dtype
@pytest.mark.parametrize("k", [3, 20])
def test_cosines(dtype: torch.dtype, k: int) -> None:
    x, v, centre = normals(50, 300, dtype=dtype), normals(k, 300, seed=1), normals(300, seed=2).double()
    x[7] = centre.to(dtype)
    zero = x[7].double() == centre
    x, centre = x.where(zero, 0), centre.where(zero, 0)
    for n in (5, 50):
        found, y = ops.project(x[:n], v, centre, True), x[:n].double() - centre
        exact = reference.project_ref(x[:n], v, centre, True)
        limit = ROUNDING[dtype] * v.double().norm(dim=1) + (0 if dtype == torch.float64 else 2.0**-24)
        assert ((found.double() - exact.double()).abs() <= limit).all()
        assert (found[y.norm(dim=1) == 0] == 0).all()


# --- memory


@each_dtype
@pytest.mark.parametrize("k", [2, 20])
@pytest.mark.parametrize("n", [3, 40])
def test_views_are_bitwise_their_copies(dtype: torch.dtype, n: int, k: int) -> None:
    base, v = normals(2 * 60, 2 * 90, dtype=dtype), normals(2 * k, 2 * 90, seed=1)
    views = {
        "strided": (base[1 : 2 * n : 2, 5:75], v[::2, 3:73]),
        "stride 0": (base[4, :70].expand(n, 70), v[2, :70].expand(k, 70)),
        "offset": (base.flatten()[3 : 3 + n * 70].view(n, 70), v.flatten()[1 : 1 + k * 70].view(k, 70)),
        "transposed": (base[:70, :n].T, v[:, :k].T[:, : 2 * k]),
    }
    for name, (x, readers) in views.items():
        readers = readers if name != "transposed" else normals(70, k, seed=2).T
        found = ops.project(x, readers, None, True)
        assert torch.equal(found, ops.project(x.contiguous(), readers.contiguous(), None, True)), name


@pytest.mark.parametrize("k", [2, 20])
def test_rows_that_cannot_be_written(k: int) -> None:
    x = normals(40, 30)
    frozen = x.numpy()
    frozen.flags.writeable = False
    out = torch.empty(40, k)
    _C.project(frozen, normals(k, 30, seed=1).numpy(), None, False, out.numpy(), 1)
    assert torch.equal(out, ops.project(x, normals(k, 30, seed=1), None, False))


@each_dtype
@pytest.mark.parametrize("k", [1, 5, 16, 40])
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, k: int) -> None:
    for n in (3, 60):
        x, v = normals(n, 100, dtype=dtype), normals(k, 100, seed=1)
        clean = ops.project(x, v, None, True)
        x[1, 37] = torch.nan
        found = ops.project(x, v, None, True)
        assert found[1].isnan().all()
        kept = torch.arange(n) != 1
        assert torch.equal(found[kept], clean[kept])


@pytest.mark.parametrize("n", [3, 60])
def test_a_reader_that_is_not_finite_spoils_its_own_scores(n: int) -> None:
    x, v = normals(n, 100), normals(40, 100, seed=1)
    clean = ops.project(x, v, None, False)
    v[17, 99] = torch.nan
    found = ops.project(x, v, None, False)
    assert found[:, 17].isnan().all()
    kept = torch.arange(40) != 17
    assert torch.equal(found[:, kept], clean[:, kept])


# --- the same bits


@each_dtype
@pytest.mark.parametrize("d", [17, 300, 1000])
def test_a_score_does_not_know_its_neighbours(dtype: torch.dtype, d: int) -> None:
    """However many rows and readers stand beside: few of either, and tiles of both."""
    x, v, centre = normals(60, d, dtype=dtype), normals(45, d, seed=1), normals(d, seed=2).double()
    whole = ops.project(x, v, centre, True)
    for rows in (slice(0, 1), slice(3, 5), slice(7, 16), slice(20, 37), slice(59, 60), slice(0, 60)):
        for readers in (slice(0, 1), slice(2, 5), slice(8, 16), slice(11, 27), slice(12, 45)):
            assert torch.equal(ops.project(x[rows], v[readers], centre, True), whole[rows, readers])


@each_dtype
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(dtype: torch.dtype, threads: int) -> None:
    x, v, centre = normals(700, 300, dtype=dtype), normals(171, 300, seed=1), normals(300, seed=2).double()
    before = torch.get_num_threads()
    try:
        for n, k in ((700, 171), (700, 2), (2, 171), (40, 171), (700, 17)):
            torch.set_num_threads(1)
            one = ops.project(x[:n], v[:k], centre, True)
            torch.set_num_threads(threads)
            assert torch.equal(ops.project(x[:n], v[:k], centre, True), one)
    finally:
        torch.set_num_threads(before)


# --- what is made of the scores in the same pass


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(2, 20), (40, 2), (40, 20)])
def test_means_and_deviations(dtype: torch.dtype, n: int, k: int) -> None:
    x, v, centre = normals(n, 65, dtype=dtype), normals(k, 65, seed=1), normals(65, seed=2).double()
    mean, std = normals(k, seed=3).double(), normals(k, seed=4).double().abs() + 0.5
    found = ops.project(x, v, centre, False, mean, std)
    exact = ((x.double() - centre) @ v.double().T - mean) / std
    assert ((found - exact).abs() <= (bound(x, v, centre) + 2.0**-23 * (exact * std).abs()) / std).all()
    assert ops.project(x[:, :1] * 0, v[:, :1], None, False, mean, std).double().allclose(-mean / std)


@each_dtype
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("n", "k"), [(2, 20), (40, 2), (40, 20)])
def test_packed_readers(dtype: torch.dtype, parts: int, n: int, k: int) -> None:
    x, centre = normals(n, 100, dtype=dtype), normals(100, seed=2).double()
    packed, offset = packing.pack(normals(k, 100, seed=1), centre, dtype, parts)
    whole = packed.double().sum(0)
    for normalise in (False, True):
        found = ops.project_packed(x, packed, offset, normalise)
        exact = reference_steering.project_packed_ref(x, packed, offset, normalise).double()
        size = x.double().norm(dim=1)[:, None] if normalise else 1.0
        limit = bound(x, whole) / size + 2.0**-23 * exact.abs()
        assert ((found.double() - exact).abs() <= limit).all()


def test_rows_of_several_hook_points() -> None:
    rows, packed, offset = normals(3, 40, 65), normals(3, 1, 20, 65, seed=1), normals(3, 20, seed=2)
    out = torch.full((3, 50, 20), 5.0)
    ops.project_rows(rows, packed, offset, torch.tensor([33]), out[:, :40])
    for s in range(3):
        assert torch.equal(out[s, :33], ops.project_packed(rows[s, :33], packed[s], offset[s], False))
    assert (out[:, 33:] == 5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 7, 171])
def test_pooled(dtype: torch.dtype, k: int) -> None:
    scores = normals(50, k, dtype=dtype)
    scores[20, 0] = torch.nan
    starts = torch.tensor([0, 7, 7, 30, 50], dtype=torch.int32)
    largest, mean = ops.pool_scores(scores, starts)
    exact = reference_steering.pool_scores_ref(scores, starts)
    torch.testing.assert_close(largest, exact[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(mean, exact[1], rtol=1e-6, atol=1e-7, equal_nan=True)


def test_pooled_by_hand() -> None:
    largest, mean = ops.pool_scores(torch.tensor([[1.0, -3.0], [2.0, -1.0], [9.0, 9.0]]), torch.tensor([0, 2, 3]))
    assert largest.tolist() == [[2, -1], [9, 9]]
    assert mean.tolist() == [[1.5, -2], [9, 9]]


def test_sequences_lie_within_the_scores() -> None:
    with pytest.raises(IndexError, match=r"pool_scores: starts must be in \[0, 4\)"):
        ops.pool_scores(torch.zeros(3, 2), torch.tensor([0, 4]))
