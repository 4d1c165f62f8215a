"""What a Moments takes, what it refuses, and what it sets aside; a refusal leaves it as it was, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import emocore.sums
from emocore.blocks import as_rows
from emocore.errors import ArgumentError, EmocoreError, FitError, LabelError, LedgerError, ShapeError
from emocore.moments import Moments

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gathered(x: Any, labels: Any = None, weights: Any = None, k: int | None = None) -> Moments:
    m = Moments(k, covariance=True)
    m.update(x, labels, weights)
    m.ledger.check()
    return m


def assert_same(a: Moments, b: Moments, ledger: bool = True) -> None:
    """Every tensor and every setting of the state, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    for state in (a, b) if not ledger else ():
        del state["settings"]["ledger"]
    assert a.pop("settings") == b.pop("settings")
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- shapes and memory


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (1, 3, 2, 5)])
def test_leading_axes_are_rows(shape: tuple[int, ...]) -> None:
    x = randn(6, 5)
    assert_same(gathered(x.reshape(shape)), gathered(x))


def test_one_axis_is_one_row() -> None:
    m = gathered(torch.tensor([1.0, 2.0]), ["1"], [3.0], k=2)
    assert (m.count, m.weight, m.mean.tolist(), m.label_count.tolist()) == (1, 3.0, [1, 2], [0, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 17, 129])
def test_views_give_the_bits_of_their_copies(d: int, dtype: torch.dtype) -> None:
    base = randn(40, 2 * d + 3, dtype=dtype)
    for view in (base[:, 1 : d + 1], base[:, : 2 * d : 2], base[::2, :d], base[:, :d].flip(0), base[:d].T):
        assert_same(gathered(view), gathered(view.contiguous()))
    expanded = base[:1, :d].expand(30, d)
    assert_same(gathered(expanded), gathered(expanded.contiguous()))


def test_rows_are_copied_not_kept() -> None:
    x = randn(10, 3)
    m, wanted = gathered(x), gathered(x.clone())
    x.fill_(torch.nan)
    assert_same(m, wanted)


def test_what_is_read_is_not_the_state() -> None:
    m = gathered(randn(10, 3), [0] * 10, k=1)
    wanted = m.copy()
    for name in ("mean", "variance", "label_mean", "label_variance", "label_count"):
        getattr(m, name).zero_()
    m.covariance().zero_()
    m.within_scatter().zero_()
    for t in list(m.state_dict().values())[1:]:
        t.zero_()
    assert_same(m, wanted)


def test_empty_batch_is_no_op() -> None:
    m = Moments(2, covariance=True)
    m.update(torch.zeros(0, 4, dtype=torch.float16), [], [])
    with pytest.raises(FitError, match="width is not known"):
        _ = m.dim
    m.update(randn(5, 3), [0, 1, 0, 1, 0])
    wanted = m.copy()
    m.update(torch.zeros(0, 3))
    m.update(torch.zeros(4, 0, 3), np.zeros((4, 0), dtype=int))
    assert_same(m, wanted)


# --- dtypes


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_summed_from_their_own_values(dtype: torch.dtype) -> None:
    """What a 16-bit row holds is summed to its last bit: means are float64 sums of it."""
    x = randn(500, 7, dtype=dtype) * 3 + 1
    torch.testing.assert_close(gathered(x).mean, x.double().mean(0), rtol=0, atol=1e-14)


def test_huge_float16_values_do_not_overflow() -> None:
    x = torch.tensor([[65504.0, -65504.0], [-65504.0, 65504.0]]).half()
    m = gathered(x)
    assert m.mean.tolist() == [0, 0]
    assert m.covariance(ddof=0).tolist() == [[65504.0**2, -(65504.0**2)], [-(65504.0**2), 65504.0**2]]
    assert m.mean_norm == pytest.approx(65504 * 2**0.5, rel=1e-15)


def test_float16_stream_takes_float32_and_bfloat16_rows() -> None:
    m = gathered(randn(4, 3, dtype=torch.float16))
    m.update(randn(4, 3))
    m.update(randn(4, 3, dtype=torch.bfloat16))
    assert m.count == 12


@pytest.mark.parametrize(("first", "then"), [(torch.bfloat16, torch.float16), (torch.float32, torch.float64)])
def test_wider_rows_are_refused(first: torch.dtype, then: torch.dtype) -> None:
    m = gathered(randn(4, 3, dtype=first))
    with pytest.raises(ArgumentError, match="Construct it with Moments"):
        m.update(randn(4, 3, dtype=then))
    both = Moments(dtype=torch.float64)
    both.update(randn(4, 3, dtype=first))
    both.update(randn(4, 3, dtype=then))
    assert both.count == 8


def test_float64_state_takes_narrow_rows_exactly() -> None:
    x = randn(300, 3, dtype=torch.bfloat16)
    m = Moments(covariance=True, dtype=torch.float64)
    m.update(x)
    assert torch.equal(m.covariance(), gathered(x.double()).covariance())


def test_rows_that_require_grad_are_read_without_graph() -> None:
    m = gathered(randn(3, 2).requires_grad_())
    assert not m.mean.requires_grad


# --- NumPy


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4"])
def test_numpy_rows_equal_torch_rows(kind: str) -> None:
    x = np.linspace(-3, 7, 60).reshape(20, 3).astype(kind)
    same = torch.tensor(x.astype(x.dtype.newbyteorder("=")))
    for array in (x, x[::-1], x[:, ::-1], x[::2, 1:]):
        rows = same if array is x else torch.tensor(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
        assert_same(gathered(array), gathered(rows))


def test_read_only_numpy_rows_are_read() -> None:
    x = np.arange(6.0).reshape(2, 3)
    x.flags.writeable = False
    assert gathered(x).mean.tolist() == [1.5, 2.5, 3.5]


def test_writable_numpy_rows_are_not_copied() -> None:
    x = np.ones((4, 2), dtype=np.float32)
    assert as_rows(x).data_ptr() == x.ctypes.data


# --- inference mode


@pytest.mark.parametrize("inner", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_state_made_inside_inference_mode_goes_on_outside(inner: type) -> None:
    x, ids = randn(700, 3), torch.arange(700) % 2
    wanted = gathered(x, ids, k=2)
    wanted.update(x, ids)
    m, spare = Moments(2, covariance=True, dim=3), Moments(2, covariance=True)
    with torch.inference_mode():
        m.update(x * 1, ids)
        _ = m.mean, m.covariance(), m.state_dict()
        copied, resumed = m.copy(), Moments()
        resumed.load_state_dict(m.state_dict())
        halves = m.relabel({"0": "a", "1": "a"})
        spare.merge(m)
    with inner():
        m.update(x, ids)
        assert_same(m, wanted)
        for other in (copied, resumed, spare):
            other.update(x, ids)
            other.merge(m)
            other.subtract(m)
            torch.testing.assert_close(other.mean, wanted.mean)
            other.reset()
            other.update(x, ids)
        halves.update(x, [0] * 700)
        assert halves.label_count.tolist() == [1400]


# --- refused, with nothing accumulated


BAD_INPUT = {
    "a scalar": (torch.tensor(1.0), None, None, ShapeError),
    "another width": (torch.zeros(2, 4), None, None, ShapeError),
    "no width": (torch.zeros(2, 0), None, None, ShapeError),
    "integers": (torch.zeros(2, 3, dtype=torch.int64), None, None, ArgumentError),
    "NumPy integers": (np.zeros((2, 3), dtype=int), None, None, ArgumentError),
    "NumPy objects": (np.array([[None]]), None, None, ArgumentError),
    "long doubles": (np.zeros((2, 3), dtype=np.longdouble), None, None, ArgumentError),
    "complex": (torch.zeros(2, 3, dtype=torch.complex64), None, None, ArgumentError),
    "wider rows": (torch.zeros(2, 3, dtype=torch.float64), None, None, ArgumentError),
    "too few labels": (torch.zeros(2, 3), [0], None, ShapeError),
    "labels of another shape": (torch.zeros(2, 2, 3), [[0, 1]], None, ShapeError),
    "an unknown label": (torch.zeros(2, 3), ["0", "happy"], None, LabelError),
    "a label too large": (torch.zeros(2, 3), [0, 2], None, LabelError),
    "a label below -1": (torch.zeros(2, 3), torch.tensor([0, -2]), None, LabelError),
    "real labels": (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), None, LabelError),
    "too few weights": (torch.zeros(2, 3), None, [1.0], ShapeError),
    "a negative weight": (torch.zeros(2, 3), None, [1.0, -1.0], ArgumentError),
    "a NaN weight": (torch.zeros(2, 3), None, torch.tensor([1.0, torch.nan]), ArgumentError),
    "words for weights": (torch.zeros(2, 3), None, ["a", "b"], ArgumentError),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_a_typed_error_and_accumulates_nothing(case: str) -> None:
    x, labels, weights, kind = BAD_INPUT[case]
    m = gathered(randn(600, 3), torch.arange(600) % 2, k=2)
    wanted = m.copy()
    with pytest.raises(kind) as caught:
        m.update(x, labels, weights)
    assert isinstance(caught.value, EmocoreError)
    assert_same(m, wanted)


def test_labels_where_none_are_kept_are_refused() -> None:
    m = Moments()
    with pytest.raises(LabelError, match=r"Moments\(labels=\.\.\.\)"):
        m.update(torch.zeros(1, 2), ["calm"])
    assert m.count == 0


@pytest.mark.parametrize("rows", [0, 256, 1000, 8191])
def test_block_rows_must_hold_whole_chains(rows: int) -> None:
    with pytest.raises(ArgumentError, match="a multiple of 256, at least 512"):
        Moments(block_rows=rows)


def test_construction_refuses_what_rows_cannot_be() -> None:
    with pytest.raises(ArgumentError, match="dtype"):
        Moments(dtype=torch.int32)
    with pytest.raises(LabelError, match="distinct"):
        Moments(["a", "a"])


# --- set aside


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_row_is_counted_and_leaves_the_rest_bitwise(value: float, dtype: torch.dtype) -> None:
    x, ids, w = randn(9000, 5, dtype=dtype), torch.arange(9000) % 2, torch.linspace(0, 2, 9000)
    bad = torch.zeros(9000, dtype=torch.bool)
    bad[[0, 255, 4000, 8191, 8192, 8999]] = True
    dirty = x.clone()
    dirty[bad, torch.arange(6) % 5] = value
    m, clean = gathered(dirty, ids, w, k=2), gathered(x[~bad], ids[~bad], w[~bad], k=2)
    assert_same(m, clean, ledger=False)
    rows = m.ledger.rows
    assert (rows.formed, rows.accumulated, rows.nonfinite) == (9000, 8994, 6)


def test_batch_of_non_finite_rows_adds_nothing() -> None:
    m = gathered(randn(5, 3))
    wanted = m.copy()
    m.update(torch.full((4, 3), torch.nan))
    assert_same(m, wanted, ledger=False)
    assert m.ledger.rows.nonfinite == 4
    m.ledger.check()


def test_interrupted_update_is_never_read_as_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    m = gathered(randn(8000, 3))
    state = m.state_dict()

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(emocore.sums.ops, "gram", stop)
        with pytest.raises(KeyboardInterrupt):
            m.update(randn(300, 3))
    assert "interrupted" in repr(m)
    into = Moments(covariance=True)
    for use in (lambda: m.mean, lambda: m.count, m.state_dict, lambda: m.update(randn(1, 3)), lambda: into.merge(m)):
        with pytest.raises(LedgerError, match="interrupted"):
            use()
    m.load_state_dict(state)
    assert m.count == 8000
    m.reset()
    assert m.count == 0
