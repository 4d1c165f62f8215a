"""Pools: one row a sequence, equal to what a direct computation over its tokens gives."""

import pytest
import torch

import emocore
from emocore import Rows, Tokens, capture
from emocore.pooling import Pool

ROWS = torch.tensor([[1.0, -8.0], [2.0, 4.0], [3.0, 5.0], [7.0, 0.5]])
OF = torch.tensor([0, 2, 0, 2])
EVERY = torch.ones(4, dtype=torch.bool)


def pooled(kind: str, rows=ROWS, sequence=OF, finite=EVERY, parts=(4,)):
    pool = Pool(kind, 3, rows.shape[1], rows.device)
    for part in torch.arange(len(rows)).split(list(parts)):
        pool.add(rows[part], sequence[part], finite[part], rows[part].double().norm(dim=1), EVERY[part])
    return pool.close()


@pytest.mark.parametrize("parts", [(4,), (1, 3), (2, 2), (1, 1, 1, 1), (0, 4)])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("mean", [[2.0, -1.5], [4.5, 2.25]]), ("last", [[3.0, 5.0], [7.0, 0.5]]), ("max", [[3.0, 5.0], [7.0, 4.0]])],
)
def test_pooled_rows_by_hand_however_the_tokens_come(kind, expected, parts) -> None:
    got = pooled(kind, parts=parts)
    assert got.rows.tolist() == expected
    assert got.sequence.tolist() == [0, 2]
    assert (got.too_short, got.nonfinite, got.overrange) == (1, 0, 0)


def test_max_of_negative_tokens_is_negative() -> None:
    assert pooled("max", rows=-ROWS.abs()).rows.tolist() == [[-1.0, -5.0], [-2.0, -0.5]]


@pytest.mark.parametrize("kind", ["mean", "last", "max"])
def test_one_bad_token_quarantines_its_whole_row_and_no_other(kind) -> None:
    bad = ROWS.clone()
    bad[2] = 0  # staging writes zeros for it
    got = pooled(kind, rows=bad, finite=torch.tensor([True, True, False, True]))
    assert got.sequence.tolist() == [2]
    assert torch.equal(got.rows, pooled(kind).rows[1:])
    assert (got.too_short, got.nonfinite) == (1, 1)
    assert torch.equal(got.norms, ROWS[[1, 3]].double().norm(dim=1))


@pytest.mark.parametrize("kind", ["mean", "last", "max"])
def test_a_sequence_stays_bad_when_good_tokens_follow(kind) -> None:
    got = pooled(kind, finite=torch.tensor([False, True, True, True]), parts=(1, 3))
    assert got.sequence.tolist() == [2]
    assert got.nonfinite == 1


def test_the_mean_of_16_bit_tokens_is_taken_in_float64() -> None:
    """A bfloat16 sum of ones stands still at 256."""
    rows = torch.ones(1000, 3, dtype=torch.bfloat16)
    pool = Pool("mean", 1, 3, rows.device)
    every = torch.ones(1000, dtype=torch.bool)
    pool.add(rows, torch.zeros(1000, dtype=torch.long), every, torch.ones(1000, dtype=torch.float64), every)
    got = pool.close().rows
    assert got.dtype == torch.float32
    assert got.tolist() == [[1.0, 1.0, 1.0]]


def test_a_row_beyond_float32_is_counted_not_handed_over() -> None:
    got = pooled("mean", rows=ROWS.double() * torch.tensor([[1.0], [1e300], [1.0], [1.0]]))
    assert got.sequence.tolist() == [0]
    assert (got.overrange, got.too_short, got.nonfinite) == (1, 1, 0)


def test_a_pool_that_saw_nothing_is_all_too_short() -> None:
    got = Pool("mean", 3, 2, torch.device("cpu")).close()
    assert (len(got.rows), got.too_short, len(got.norms)) == (0, 3, 0)


# --- in a capture

IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 0, 0], [6, 0, 0, 0, 0]])
MASK = (IDS != 0).long()


@pytest.mark.parametrize("kind", ["mean", "last", "max"])
def test_pooled_capture_equals_the_direct_computation(tokenwise, kind) -> None:
    model = tokenwise()
    with torch.no_grad(), capture(model, {"layers.0": Rows()}, tokens=Tokens(skip=1, pool=kind)) as tap:
        model(IDS, MASK)
    hidden = model.layers[0](model.embed(IDS)).detach()
    tokens = [hidden[0, 1:5], hidden[1, 1:3]]
    direct = {"mean": lambda x: x.double().mean(0).float(), "last": lambda x: x[-1], "max": lambda x: x.amax(0)}[kind]
    # float64 sums of a handful of float32 values are exact up to the last rounding, which both share
    torch.testing.assert_close(
        tap.sinks["layers.0"].rows, torch.stack([direct(x) for x in tokens]), rtol=2**-23, atol=0
    )
    ledger = tap.ledger["layers.0"]
    ledger.check()
    assert (ledger.tokens.offered, ledger.tokens.selected, ledger.tokens.masked, ledger.tokens.skipped) == (15, 6, 6, 3)
    assert (ledger.rows.formed, ledger.rows.accumulated, ledger.rows.too_short) == (3, 2, 1)


def test_sequence_and_token_weighting_differ_by_the_predicted_amount(tokenwise) -> None:
    """Token means weigh sequence q by n_q, sequence means by one: they differ by cov(n_q, a_q) / mean(n)."""
    model, kept = tokenwise(), Tokens(pool="mean")
    sinks = [(emocore.Moments(), kept), (emocore.Moments(), Tokens()), (Rows(), kept)]
    with torch.no_grad(), capture(model, {"layers.1": sinks}) as tap:
        model(IDS, MASK)
    by_sequence, by_token, rows = tap.sinks["layers.1"]
    a, n = rows.rows.double(), MASK.sum(1).double()
    predicted = ((n - n.mean()).unsqueeze(1) * (a - a.mean(0))).mean(0) / n.mean()
    assert predicted.abs().min() > 1e-3
    # the pooled rows are rounded to float32 once, the tokens not at all
    torch.testing.assert_close(by_token.mean - by_sequence.mean, predicted, rtol=0, atol=2**-23 * a.abs().max().item())
    assert (by_sequence.count, by_token.count) == (3, 9)
    for ledger in tap.ledger["layers.1"]:
        ledger.check()
        assert ledger.tokens.selected == 9


def test_mean_norm_is_of_the_tokens_before_pooling_without_the_first(tokenwise) -> None:
    model = tokenwise()
    sinks = [(emocore.Moments(), Tokens(pool="mean")), (emocore.Moments(), Tokens())]
    with torch.no_grad(), capture(model, {"layers.0": sinks}) as tap:
        model(IDS, MASK)
    hidden = model.layers[0](model.embed(IDS)).detach().double()
    norms = torch.cat([hidden[0, 1:5], hidden[1, 1:3]]).norm(dim=1)
    for moments in tap.sinks["layers.0"]:
        assert moments.mean_norm == pytest.approx(norms.mean().item(), rel=1e-14)


def test_a_pooled_row_closes_at_the_end_of_the_batch_not_of_the_forward(tiny) -> None:
    model, ids = tiny("llama"), torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
    whole, parts = Rows(), Rows()
    with torch.no_grad(), capture(model, {1: whole}, tokens=Tokens(pool="mean")):
        model(ids)
    with torch.no_grad(), capture(model, {1: parts}, tokens=Tokens(pool="mean")) as tap, tap.batch():
        first = model(ids[:, :4], use_cache=True)
        assert len(parts) == 0
        model(ids[:, 4:], past_key_values=first.past_key_values)
        assert len(parts) == 0
    assert len(parts) == 2
    # a cached forward rounds attention otherwise: a few units in the last place through two blocks
    torch.testing.assert_close(parts.rows, whole.rows, rtol=1e-5, atol=1e-6)
    ledger = tap.ledger["model.layers.1"]
    assert (ledger.tokens.selected, ledger.rows.accumulated, ledger.forwards) == (12, 2, 2)


def test_pooled_rows_of_a_batch_that_fails_are_dropped_and_counted(tokenwise) -> None:
    model, rows = tokenwise(), Rows()
    with capture(model, {"layers.0": rows}, tokens=Tokens(pool="mean")) as tap:
        with pytest.raises(ZeroDivisionError), tap.batch():  # noqa: PT012
            model(IDS, MASK)
            raise ZeroDivisionError
        with tap.batch():
            model(IDS[:2], MASK[:2])
    ledger = tap.ledger["layers.0"]
    assert len(rows) == ledger.rows.accumulated == 2
    assert (ledger.rows.formed, ledger.rows.dropped) == (5, 3)
