"""One stream of rows, however it comes: batches, threads, pauses, splits. Ordinals of rows alone fix the blocks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emocore import ops
from emocore.blocks import Block, Blocks
from emocore.errors import ArgumentError, LabelError, ShapeError
from emocore.moments import Moments
from emocore.tokens import Tokens

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
N, K = 20_000, 3


def randn(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2 + 3).to(dtype)


def ids_of(n: int) -> Tensor:
    return torch.randint(-1, K, (n,), generator=torch.Generator().manual_seed(1))


def fed(x: Tensor, cuts: list[int], weights: Tensor | None = None, **options: Any) -> Moments:
    """Moments of rows fed in batches that end at `cuts`."""
    m, start, ids = Moments(K, covariance=True, **options), 0, ids_of(len(x))
    for end in [*cuts, len(x)]:
        m.update(x[start:end], ids[start:end], None if weights is None else weights[start:end])
        start = end
    m.ledger.check()
    return m


def assert_bitwise(a: Moments, b: Moments) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.pop("settings") == b.pop("settings")
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_near(a: Moments, b: Moments, tolerance: float) -> None:
    """Counts alike; means, variances and covariance to `tolerance` of their own scale."""
    assert (a.count, a.label_count.tolist(), a.ledger) == (b.count, b.label_count.tolist(), b.ledger)
    scale = b.variance.max()
    for found, wanted, size in (
        (a.mean, b.mean, scale.sqrt()),
        (a.label_mean, b.label_mean, scale.sqrt()),
        (a.label_variance, b.label_variance, scale),
        (a.covariance(), b.covariance(), scale),
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=float(tolerance * size))


CUTS = {
    "one batch": [],
    "in the block": [1, 2, 300, 513, 8000],
    "at the block": [8192, 16384],
    "around the block": [8191, 8193, 16383, 16385],
    "many": list(range(0, N, 77)),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", CUTS)
def test_streamed_equals_whole_bitwise(cuts: str, dtype: torch.dtype) -> None:
    x = randn(N, 5, dtype)
    assert_bitwise(fed(x, CUTS[cuts]), fed(x, [9000]))


@pytest.mark.parametrize("block_rows", [512, 768, 16384])
def test_streamed_equals_whole_bitwise_for_any_block(block_rows: int) -> None:
    x, w = randn(N, 5), torch.linspace(0, 2, N)
    for cuts in CUTS.values():
        assert_bitwise(fed(x, cuts, w, block_rows=block_rows), fed(x, [9000], w, block_rows=block_rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [3, 200])
@pytest.mark.usefixtures("threads")
def test_thread_count_changes_no_bit(d: int, dtype: torch.dtype) -> None:
    x, found = randn(9000, d, dtype), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(fed(x, [100, 5000]))
    assert_bitwise(found[0], found[1])
    assert_bitwise(found[0], found[2])


def test_scalar_instructions_agree_with_the_widest() -> None:
    x = randn(9000, 20)
    with ops.use("scalar"):
        scalar = fed(x, [])
    assert_near(scalar, fed(x, []), 1e-6)


def test_reading_midway_changes_no_bit() -> None:
    x = randn(N, 5)
    read, start = Moments(K, covariance=True), 0
    for end in (1, 300, 8192, 8500, N):
        read.update(x[start:end], ids_of(N)[start:end])
        _ = read.mean, read.covariance(), read.state_dict(), read.copy()
        start = end
    assert_bitwise(read, fed(x, []))


def test_absorbed_rows_equal_updated_rows_bitwise() -> None:
    x, ids = randn(N, 5), ids_of(N).int()
    m = Moments(K, covariance=True)
    for part in (slice(0, 100), slice(100, 8192), slice(8192, N)):  # staged, staged to the brim, whole blocks first
        m.absorb(x[part], ids[part], x[part].double().norm(dim=1))
        m.ledger.rows.add(formed=len(x[part]))
    wanted = fed(x, [])
    assert m.mean_norm == pytest.approx(wanted.mean_norm, rel=1e-14)
    m._norm_sum = wanted._norm_sum  # |x| is rounded otherwise by torch
    assert_bitwise(m, wanted)


def test_pooled_rows_are_summed_in_float64() -> None:
    x = randn(700, 4)
    m = Moments(covariance=True)
    m.tokens = Tokens(pool="mean")
    m.absorb(x, None, torch.ones(1))
    wanted = Moments(covariance=True)
    wanted.update(x.double())
    assert torch.equal(m.covariance(), wanted.covariance())


# --- splits: merge, save, resume


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize("cut", [1, 300, 600, 8192, 10_000])
def test_split_points_agree(cut: int, dtype: torch.dtype, tolerance: float) -> None:
    """Merged halves, either way round, and a stream saved and resumed, against the stream in one piece."""
    x, ids, whole = randn(N, 5, dtype), ids_of(N), fed(randn(N, 5, dtype), [])

    def part(rows: slice) -> Moments:
        m = Moments(K, covariance=True)
        m.update(x[rows], ids[rows])
        return m

    a, b = part(slice(0, cut)), part(slice(cut, N))
    kept = b.copy()
    forth, back, resumed = a.copy(), b.copy(), Moments()
    forth.merge(b)
    back.merge(a)
    resumed.load_state_dict(a.state_dict())
    resumed.update(x[cut:], ids[cut:])
    for split in (forth, back, resumed):
        assert_near(split, whole, tolerance)
    assert_bitwise(b, kept)


def test_resumed_state_is_the_saved_one_bitwise() -> None:
    m = fed(randn(9000, 5), [])
    m.tokens = Tokens(skip=3)
    resumed = Moments(["other"], dim=7)
    resumed.load_state_dict(m.state_dict())
    assert_bitwise(resumed, m)
    assert (resumed.labels, resumed.tokens, resumed.mean_norm) == (m.labels, m.tokens, m.mean_norm)
    empty = Moments()
    empty.load_state_dict(Moments(2, covariance=True).state_dict())
    assert (empty.count, empty.labels, empty.keeps_covariance) == (0, ("0", "1"), True)


def test_loading_keeps_the_ledger_that_a_capture_counts_in() -> None:
    m, saved = Moments(), fed(randn(10, 2), [])
    ledger = m.ledger
    m.load_state_dict(saved.state_dict())
    assert m.ledger is ledger
    assert ledger == saved.ledger
    m.reset()
    assert m.ledger is ledger
    assert ledger.rows.formed == 0


WRONG_STATES: dict[str, tuple[Any, type[Exception]]] = {
    "not a state": (lambda s: {"mean": s["total"]}, ArgumentError),
    "a setting missing": (lambda s: s["settings"].pop("frozen") and s, ArgumentError),
    "a tensor missing": (lambda s: {k: t for k, t in s.items() if k != "tiles"}, ShapeError),
    "another width": (lambda s: s | {"shift": torch.zeros(4).double()}, ShapeError),
    "narrow sums": (lambda s: s | {"total": s["total"].float()}, ShapeError),
    "another covariance": (lambda s: s | {"settings": s["settings"] | {"covariance": False}}, ShapeError),
    "more labels": (lambda s: s | {"settings": s["settings"] | {"labels": list("abcd")}}, ShapeError),
    "labels doubled": (lambda s: s | {"settings": s["settings"] | {"labels": ["a", "a", "b"]}}, LabelError),
    "no dtype": (lambda s: s | {"settings": s["settings"] | {"dtype": "load"}}, ArgumentError),
    "no block": (lambda s: s | {"settings": s["settings"] | {"block_rows": 0}}, ArgumentError),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_wrong_state_is_refused_and_changes_nothing(case: str) -> None:
    spoil, kind = WRONG_STATES[case]
    m = fed(randn(600, 3), [])
    wanted = m.copy()
    with pytest.raises(kind):
        m.load_state_dict(spoil(m.state_dict()))
    assert_bitwise(m, wanted)


# --- memory


class Allocations(TorchDispatchMode):
    """Counts results of torch operations that are new memory of at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.numel() >= self.size and out.untyped_storage().data_ptr() not in inputs:
            self.found.append(str(func))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_copies_rows_once_into_memory_that_it_keeps(dtype: torch.dtype) -> None:
    x, ids = randn(8192, 384, dtype), ids_of(8192)
    m = Moments(K, covariance=True)
    with Allocations(8192 * 384) as first:
        m.update(x, ids)
    assert len(first.found) == 1  # the buffer
    with Allocations(8192 * 384) as later:
        m.update(x, ids)
        m.update(x[:5000], ids[:5000])
        m.update(x, ids)
    assert later.found == []


def test_absorb_passes_whole_blocks_on_uncopied() -> None:
    x = randn(8192, 32)
    m = Moments(covariance=True)
    with Allocations(8192 * 32) as found:
        m.absorb(x, None, torch.zeros(0))
    assert found.found == []


def test_small_streams_stay_small() -> None:
    blocks = Blocks(8192, torch.empty(0, 4))
    for _ in range(10):
        assert list(blocks.append(Block(torch.ones(10, 4), torch.zeros(10), None))) == []
    assert len(blocks) == 100
    assert len(blocks._rows) <= 200
