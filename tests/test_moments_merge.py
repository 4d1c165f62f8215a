"""The laws of merge, subtract and relabel, in figures; and what they refuse."""

import pytest
import torch

from emocore.errors import ArgumentError, LabelError, ShapeError
from emocore.ledger import Ledger
from emocore.moments import Moments
from emocore.tokens import Tokens

LABELS = ("at ease", "self-critical", "sad")
D = 2


def labelled(x: torch.Tensor, seed: int = 0, **options: object) -> Moments:
    m = Moments(LABELS, covariance=True, **options)
    m.update(x, torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(seed)))
    return m


def randn(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_bitwise(a: Moments, b: Moments) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.pop("settings") == b.pop("settings")
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_nothing_is_the_identity_bitwise() -> None:
    m = labelled(randn(600))
    wanted, empty, dim_only = m.copy(), Moments(LABELS, covariance=True), Moments(LABELS, covariance=True, dim=D)
    m.merge(empty)
    m.subtract(dim_only)
    assert_bitwise(m, wanted)
    for nothing in (empty, dim_only):
        nothing.merge(m)
        assert_bitwise(nothing, wanted)
        nothing.update(randn(3))
        assert nothing.count == 603


def test_what_is_taken_away_whole_leaves_nothing() -> None:
    m = labelled(randn(600) + 1 / 3)
    m.subtract(m.copy())
    assert m.count == m.weight == 0
    assert not any(t.any() for name, t in m.state_dict().items() if name not in ("settings", "norm_sum"))
    later = labelled(randn(700, seed=1))
    m.merge(later)
    assert torch.equal(m.covariance(), later.covariance())


def test_label_taken_away_whole_leaves_no_rounding() -> None:
    m, sad = Moments(["calm", "sad"]), Moments(["calm", "sad"])
    sad.update(randn(50) / 3, ["sad"] * 50, [0.1] * 50)
    m.update(randn(50), ["calm"] * 50)
    m.merge(sad)
    m.subtract(sad)
    assert m.label_count.tolist() == [50, 0]
    assert m.label_mean[1].isnan().all()


def test_merge_leaves_the_other_as_it_was() -> None:
    a, b = labelled(randn(300)), labelled(randn(9000, seed=1))
    kept = b.copy()
    a.merge(b)
    assert_bitwise(b, kept)
    b.update(randn(1), ["sad"])
    assert a.count == 9300


@pytest.mark.parametrize("outlier_first", [True, False])
def test_one_row_of_3000_does_not_set_the_shift_of_a_merge(outlier_first: bool) -> None:
    outlier, rest = labelled(torch.full((1, D), 3000.0).double()), labelled(randn(5000))
    m, other = (outlier.copy(), rest) if outlier_first else (rest.copy(), outlier)
    m.merge(other)
    m.subtract(outlier)
    torch.testing.assert_close(m.covariance(), rest.covariance(), rtol=0, atol=1e-11)  # 3000^2 of 5000 rows: 2000 eps


def test_one_row_of_3000_does_not_set_the_shift_of_a_resumed_stream() -> None:
    x = torch.cat([randn(300), torch.full((1, D), 3000.0), randn(300, seed=1)]).double()
    resumed, whole = Moments(), labelled(x)
    resumed.load_state_dict(labelled(x[:300]).state_dict())
    resumed.update(x[300:301])
    _ = resumed.covariance()
    resumed.update(x[301:])
    torch.testing.assert_close(resumed.covariance(), whole.covariance(), rtol=1e-13, atol=0)


def test_batch_of_no_weight_does_not_move_the_shift() -> None:
    m = Moments()
    m.update([[0.125, 3.0]])
    resumed = Moments()
    resumed.load_state_dict(m.state_dict())
    resumed.update([[7.0, 7.0]], weights=[0.0])
    assert resumed.variance.tolist() == [0, 0]
    assert resumed.precision()["offset"] == 0


def test_many_small_parts_equal_the_whole() -> None:
    x = randn(4000) + 1e4
    whole, merged = Moments(covariance=True), Moments(covariance=True)
    whole.update(x)
    for part in x.split(7):
        small = Moments(covariance=True, strict=True)
        small.update(part)
        merged.merge(small)
    merged.strict = True
    torch.testing.assert_close(merged.covariance(), whole.covariance(), rtol=1e-13, atol=1e-13)


def test_means_only_merge_alike() -> None:
    a, b, whole = Moments(), Moments(), Moments()
    a.update(randn(600) + 50)
    b.update(randn(100, seed=1))
    a.merge(b)
    whole.update(torch.cat([randn(600) + 50, randn(100, seed=1)]))
    torch.testing.assert_close(a.variance, whole.variance, rtol=1e-13, atol=0)
    assert a.mean_norm == pytest.approx(whole.mean_norm, rel=1e-14)


# --- what does not fit


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    m = labelled(randn(20))
    wanted, ruled = m.copy(), labelled(randn(5))
    ruled.tokens = Tokens(skip=4)
    wide = Moments(LABELS, covariance=True)
    wide.update(torch.zeros(1, 3))
    for other, kind in (
        (m, ArgumentError),
        (Moments(LABELS), ArgumentError),
        (Moments(covariance=True), LabelError),
        (Moments(reversed(LABELS), covariance=True), LabelError),
        (wide, ShapeError),
        (ruled, ArgumentError),
    ):
        for combine in (m.merge, m.subtract):
            with pytest.raises(kind):
                combine(other)
    assert_bitwise(m, wanted)


def test_more_than_was_seen_is_not_taken_away() -> None:
    m, sad = labelled(randn(20)), Moments(LABELS, covariance=True)
    wanted = m.copy()
    sad.update(randn(20), ["sad"] * 20)
    for other in (labelled(randn(21)), sad):
        with pytest.raises(ArgumentError, match="at most 20"):
            m.subtract(other)
    with pytest.raises(ArgumentError, match="at most 0"):
        Moments(LABELS, covariance=True).subtract(sad)
    assert_bitwise(m, wanted)


def test_first_merge_brings_the_token_rule() -> None:
    ruled, m = labelled(randn(5)), Moments(LABELS, covariance=True, dim=D)
    ruled.tokens = Tokens(skip=4)
    m.merge(ruled)
    assert m.tokens == Tokens(skip=4)
    with pytest.raises(ArgumentError, match="token rule"):
        m.merge(labelled(randn(5)))


# --- relabel


def test_relabel_equals_labelling_so_from_the_start() -> None:
    names = {"at ease": "positive", "self-critical": "negative", "sad": "negative"}
    x, ids = randn(600) + 2, torch.arange(600) % 3
    fine, coarse = Moments(LABELS, covariance=True), Moments(["positive", "negative"], covariance=True)
    fine.update(x, ids)
    coarse.update(x, [names[LABELS[i]] for i in ids])
    found = fine.relabel(names)
    assert found.labels == coarse.labels
    assert torch.equal(found.label_count, coarse.label_count)
    torch.testing.assert_close(found.label_mean, coarse.label_mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.label_variance, coarse.label_variance, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.within_scatter(), coarse.within_scatter(), rtol=1e-13, atol=1e-12)
    assert torch.equal(found.covariance(), fine.covariance())
    assert found.ledger == fine.ledger


def test_relabel_leaves_the_old_one_and_goes_on() -> None:
    fine = labelled(randn(600))
    kept = fine.copy()
    coarse = fine.relabel({"at ease": "rest", "self-critical": None, "sad": "rest"})
    coarse.update(randn(3), ["rest", None, "rest"])
    assert coarse.label_count.tolist() == [int(kept.label_count[[0, 2]].sum()) + 2]
    assert_bitwise(fine, kept)


def test_relabel_to_nothing_and_of_nothing() -> None:
    none = labelled(randn(9)).relabel(dict.fromkeys(LABELS))
    assert (none.count, none.labels, none.label_count.tolist()) == (9, (), [])
    empty = Moments(LABELS).relabel(dict.fromkeys(LABELS, "all"))
    empty.update(randn(2), ["all", "all"])
    assert empty.label_count.tolist() == [2]


def test_relabel_must_name_every_label() -> None:
    with pytest.raises(LabelError, match="sad"):
        labelled(randn(9)).relabel({"at ease": "a", "self-critical": "b"})


def test_copy_is_independent() -> None:
    m = labelled(randn(9))
    kept, other = m.state_dict(), m.copy()
    other.update(randn(600), ["sad"] * 600)
    other.ledger.rows.add(formed=1)
    resumed = Moments()
    resumed.load_state_dict(kept)
    assert_bitwise(m, resumed)
    assert m.ledger != Ledger()


def test_shift_that_float32_cannot_hold_serves_float32_rows() -> None:
    """What the float32 kernels subtract is what the sums are about, or tiles and totals would not belong together."""
    wide, m = Moments(covariance=True), Moments(covariance=True, dtype=torch.float32)
    x = randn(9000) + (1e9 + 20.3)  # floats of 32 bits lie 64 apart there
    y = 1e9 + 64 * torch.randint(0, 8, (9000, D), generator=torch.Generator().manual_seed(0)).float()
    wide.update(x)
    m.merge(wide)
    m.update(y)
    torch.testing.assert_close(m.covariance(), torch.cov(torch.cat([x, y.double()]).T), rtol=1e-5, atol=0.1)
