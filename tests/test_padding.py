"""Padding: whatever stands there, on whatever side, the statistics are those of the real tokens alone, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emocore import Moments, Rows, Tokens, capture
from emocore.errors import ShapeError, TokenError

TEXTS = [[5, 6, 7, 8, 9, 10], [11], [3, 4, 5, 6], [12, 13, 14, 15]]
RULES = [Tokens(), Tokens(skip=2), Tokens(pool="mean"), Tokens(skip=1, pool="last"), Tokens(pool="max")]


def padded(texts, left, width):
    """Ids and mask with `left(i)` pads before text i; pads have id 0, whose hidden state is NaN."""
    ids, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
    for i, text in enumerate(texts):
        at = slice(left(i), left(i) + len(text))
        ids[i, at], mask[i, at] = torch.tensor(text), 1
    return ids, mask


SIDES = {
    "right": lambda i: 0,
    "left": lambda i: 9 - len(TEXTS[i]),
    "both": lambda i: (9 - len(TEXTS[i])) // 2,
    "mixed": lambda i: (9 - len(TEXTS[i])) * (i % 2),
}


def new_sinks():
    return [(Moments(labels=["a", "b"], covariance=True), rule) for rule in RULES] + [(Rows(), Tokens())]


def read(model, feeds):
    """Sinks and ledgers after the feeds: (ids, mask or None, labels, cu_seqlens or None) each."""
    with torch.no_grad(), capture(model, "layers.1", new_sinks) as tap:
        for ids, mask, labels, bounds in feeds:
            with tap.batch(labels=labels, cu_seqlens=bounds):
                model(ids) if mask is None else model(ids, mask)
    for ledger in tap.ledger["layers.1"]:
        ledger.check()
    return tap.sinks["layers.1"], tap.ledger["layers.1"]


LABELS = ["a", "b", None, "a"]


def unpadded(model):
    """The same texts one by one, without a pad anywhere."""
    return read(model, [(torch.tensor([t]), None, [k], None) for t, k in zip(TEXTS, LABELS, strict=True)])


def assert_same_state(got, expected) -> None:
    *moments, rows = got
    *others, alone = expected
    assert torch.equal(rows.rows, alone.rows)
    for one, other in zip(moments, others, strict=True):
        state, reference = one.state_dict(), other.state_dict()
        assert one.count == other.count > 0
        for name in reference.keys() - {"settings"}:
            assert torch.equal(state[name], reference[name]), name


@pytest.mark.parametrize("side", SIDES)
def test_padding_poison_leaves_the_state_identical(tokenwise, side) -> None:
    model = tokenwise()
    got, ledgers = read(model, [(*padded(TEXTS, SIDES[side], 9), LABELS, None)])
    assert_same_state(got, unpadded(model)[0])
    for ledger in ledgers:
        assert (ledger.tokens.offered, ledger.tokens.masked, ledger.tokens.nonfinite) == (36, 21, 0)


def test_packed_sequences_leave_the_state_identical(tokenwise) -> None:
    model = tokenwise()
    ids = torch.tensor([[token for text in TEXTS for token in text] + [0, 0, 0]])
    bounds = torch.tensor([0, 6, 7, 11, 15], dtype=torch.int32)
    got, ledgers = read(model, [(ids, None, LABELS, bounds)])
    assert_same_state(got, unpadded(model)[0])
    for ledger in ledgers:
        assert (ledger.tokens.offered, ledger.tokens.masked, ledger.unmasked) == (18, 3, 0)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_padding_and_any_batches_leave_the_state_identical(tokenwise, data) -> None:
    model = tokenwise()
    cuts = sorted(data.draw(st.sets(st.integers(1, 3))))
    feeds = []
    for start, stop in zip([0, *cuts], [*cuts, 4], strict=True):
        texts = TEXTS[start:stop]
        width = max(map(len, texts)) + data.draw(st.integers(0, 4))
        lefts = [data.draw(st.integers(0, width - len(t))) for t in texts]
        feeds.append((*padded(texts, lefts.__getitem__, width), LABELS[start:stop], None))
    assert_same_state(read(model, feeds)[0], unpadded(model)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "mixtral"])
@pytest.mark.parametrize("side", SIDES)
def test_padded_statistics_of_a_causal_model_equal_unpadded_ones(tiny, family, side) -> None:
    model = tiny(family)
    ids, mask = padded(TEXTS, SIDES[side], 9)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    both, alone = Moments(covariance=True), Moments(covariance=True)
    with torch.no_grad(), capture(model, {2: both}, tokens=Tokens(skip=1)):
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
    with torch.no_grad(), capture(model, {2: alone}, tokens=Tokens(skip=1)):
        for text in TEXTS:
            model(input_ids=torch.tensor([text]))
    assert both.count == alone.count == 11
    assert both.ledger.tokens.masked == 21
    # float32 attention over other shapes rounds otherwise; three blocks deep it stays under 1e-5 of values around 1
    torch.testing.assert_close(both.mean, alone.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.covariance(), alone.covariance(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_real_token_that_is_not_finite_takes_its_row_and_nothing_else(tokenwise, bad) -> None:
    """Token rows lose the token, pooled rows the sequence: what is left has the same bits as if they were masked."""
    model, rules = tokenwise(), [Tokens(), Tokens(pool="mean"), Tokens(pool="max"), Tokens(pool="last")]
    model.embed.weight.data[8, 3] = bad  # the fourth token of the first text
    ids, mask = padded(TEXTS, SIDES["left"], 9)
    token, sequence = mask * (ids != 8), mask * torch.tensor([[0], [1], [1], [1]])
    got, *others = ([], [], [])
    for feed, sinks in ((mask, got), (token, others[0]), (sequence, others[1])):
        with torch.no_grad(), capture(model, {0: [(Moments(covariance=True), rule) for rule in rules]}) as tap:
            model(ids, feed)
        sinks.extend(tap.sinks["layers.0"])
    for one, other in zip(got, [others[0][0], *others[1][1:]], strict=True):
        one.ledger.check()
        assert one.count == other.count > 0
        assert torch.equal(one.covariance(), other.covariance())
        assert one.mean_norm == other.mean_norm
        assert one.ledger.tokens.nonfinite == 1
    assert [stats.ledger.rows.nonfinite for stats in got] == [0, 1, 1, 1]


def test_texts_shorter_than_the_skip_form_no_row(tokenwise) -> None:
    model, rows = tokenwise(), Rows()
    with torch.no_grad(), capture(model, {"layers.0": rows}, tokens=Tokens(skip=4, pool="mean")) as tap:
        model(*padded(TEXTS, SIDES["left"], 9))
    ledger = tap.ledger["layers.0"]
    assert (len(rows), ledger.rows.formed, ledger.rows.too_short) == (1, 4, 3)
    assert (ledger.tokens.selected, ledger.tokens.skipped, ledger.tokens.masked) == (2, 13, 21)


def test_a_batch_that_is_all_padding_changes_nothing(tokenwise) -> None:
    model = tokenwise()
    nothing = torch.zeros(2, 5, dtype=torch.long)
    feed = [(*padded(TEXTS, SIDES["left"], 9), LABELS, None)]
    got, ledgers = read(model, [(nothing, nothing, ["a", "b"], None), *feed, (nothing, nothing, ["a", None], None)])
    assert_same_state(got, unpadded(model)[0])
    assert ledgers[0].tokens.masked == 21 + 20
    assert (ledgers[2].rows.accumulated, ledgers[2].rows.too_short) == (4, 4)


def test_padding_ids_without_a_mask_are_an_error(tokenwise) -> None:
    model = tokenwise()
    with capture(model, {"layers.0": Moments()}) as tap:
        with pytest.raises(TokenError, match=r"holds the padding id 0.*attention_mask"):
            model(torch.tensor([[5, 6, 0]]))
        model(torch.tensor([[5, 6, 7]]))
    assert tap.ledger["layers.0"].tokens.offered == 3


def test_a_padding_id_that_ends_texts_too_is_a_real_token(tiny) -> None:
    model, rows = tiny("gpt2", pad_token_id=1), Rows()
    with torch.no_grad(), capture(model, {0: rows}) as tap:
        model(torch.tensor([[5, 6, 1]]))
    assert (len(rows), tap.ledger["transformer.h.0"].unmasked) == (3, 1)


def test_a_padding_id_among_several_end_ids_is_a_real_token(tiny) -> None:
    model, rows = tiny("llama", pad_token_id=1, eos_token_id=[1, 3]), Rows()
    with torch.no_grad(), capture(model, {0: rows}):
        model(torch.tensor([[5, 6, 1]]))
    assert len(rows) == 3


def test_forwards_without_a_mask_are_recorded(tokenwise) -> None:
    model, ids = tokenwise(), torch.tensor([[5, 6]])
    with capture(model, {"layers.0": Moments()}) as tap:
        model(ids)
        model(ids, torch.ones_like(ids))
        with tap.batch(mask=torch.tensor([[1, 0]])):
            model(ids)
    ledger = tap.ledger["layers.0"]
    assert (ledger.forwards, ledger.unmasked) == (3, 1)
    assert (ledger.tokens.selected, ledger.tokens.masked) == (5, 1)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 1, 3, 3), torch.ones(2, 4), torch.ones(1, 3), {"full_attention": None}],
    ids=["4-D", "too wide", "other batch", "dict"],
)
def test_a_mask_that_does_not_tell_tokens_apart_is_refused(tokenwise, mask) -> None:
    model, ids = tokenwise(), torch.full((2, 3), 5)
    with capture(model, {"layers.0": Moments()}) as tap:
        with (
            pytest.raises(ShapeError, match=r"attention_mask; expected \[2, 3\].*tap.batch\(mask=...\)"),
            tap.batch(mask=mask),
        ):
            model(ids)
        with tap.batch(mask=torch.ones(2, 3)):
            model(ids, attention_mask=mask)
    assert tap.ledger["layers.0"].tokens.offered == 6
