"""Token rules: which positions count, by real-token rank, whatever the padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emocore.errors import ArgumentError, ShapeError, TokenError
from emocore.tokens import Tokens, packed_layout, padded_layout, plain_layout, select, without_stops

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
RIGHT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def ranks(mask: torch.Tensor, past: int = 0) -> list[int]:
    layout = padded_layout((len(mask), mask.shape[1] - past), mask, past, None)
    return layout.rank[layout.real].tolist()


# --- the rule itself


@pytest.mark.parametrize("skip", [-1, 1.5, True, "2", None])
def test_skip_must_be_a_count(skip) -> None:
    with pytest.raises(ArgumentError, match="skip"):
        Tokens(skip=skip)


def test_pool_must_be_known() -> None:
    with pytest.raises(ArgumentError, match=r"pool.*'mean', 'last' or 'max'.*'median'"):
        Tokens(pool="median")


def test_rule_survives_a_round_trip_through_its_fields() -> None:
    rule = Tokens(skip=49, pool="mean", span="assistant")
    assert Tokens(**rule.as_dict()) == rule


# --- ranks


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_ranks_count_real_tokens_whatever_the_padding_side(mask) -> None:
    assert ranks(mask) == [0, 1, 2, 0, 1, 2, 3, 4]


def test_padding_inside_a_sequence_takes_no_rank() -> None:
    assert ranks(torch.tensor([[0, 1, 0, 1, 0, 1, 0]])) == [0, 1, 2]


def test_decoding_takes_the_last_columns_of_the_mask_and_ranks_over_all_of_it() -> None:
    layout = padded_layout((2, 1), torch.cat([LEFT, torch.ones(2, 1, dtype=torch.long)], 1), 5, None)
    assert layout.rank.tolist() == [3, 5]
    assert layout.real.tolist() == [True, True]


def test_without_a_mask_ranks_go_on_from_the_past() -> None:
    assert padded_layout((2, 3), None, 4, None).rank.tolist() == [4, 5, 6] * 2


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 4), torch.ones(1, 5), torch.ones(10), torch.ones(2, 1, 5, 5)],
    ids=["too short", "other batch", "1-D", "4-D"],
)
def test_a_mask_that_does_not_fit_is_refused(mask) -> None:
    with pytest.raises(ShapeError, match=r"attention_mask; expected \[2, 5\]"):
        padded_layout((2, 5), mask, 0, None)


def test_an_empty_batch_has_no_tokens() -> None:
    layout = padded_layout((2, 0), torch.ones(2, 0), 0, None)
    kept = select(layout, Tokens(skip=1))
    assert (kept.offered, kept.masked, kept.skipped, len(kept.index)) == (0, 0, 0, 0)


# --- skip, spans, and what falls away


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_skip_drops_the_first_real_tokens_whatever_the_padding_side(mask) -> None:
    layout = padded_layout((2, 5), mask, 0, None)
    kept = select(layout, Tokens(skip=2))
    assert layout.rank[kept.index].tolist() == [2, 2, 3, 4]
    assert (kept.offered, kept.masked, kept.skipped, kept.reseen) == (10, 2, 4, 0)


def test_skip_of_49_starts_at_the_50th_token() -> None:
    layout = padded_layout((1, 60), None, 0, None)
    assert select(layout, Tokens(skip=49)).index.tolist() == list(range(49, 60))


def test_a_sequence_shorter_than_the_skip_keeps_nothing() -> None:
    kept = select(padded_layout((2, 5), RIGHT, 0, None), Tokens(skip=3))
    assert kept.sequence.tolist() == [1, 1]
    assert kept.skipped == 6


def test_the_first_token_of_a_sequence_is_not_counted_in_the_norm() -> None:
    kept = select(padded_layout((2, 5), LEFT, 0, None), Tokens())
    assert kept.counted.tolist() == [False, True, True, False, True, True, True, True]


def test_spans_keep_ranks_not_columns() -> None:
    layout = padded_layout((2, 5), LEFT, 0, None)
    kept = select(
        layout, Tokens(span="answer"), [{"answer": [(1, 3)]}, {"answer": [(0, 1), (4, 9)], "other": [(2, 3)]}]
    )
    assert kept.index.tolist() == [3, 4, 5, 9]
    assert (kept.masked, kept.skipped) == (2, 4)


def test_a_sequence_without_the_named_span_keeps_nothing() -> None:
    kept = select(padded_layout((2, 5), RIGHT, 0, None), Tokens(span="answer"), [{}, {"answer": [(0, 2)]}])
    assert kept.sequence.tolist() == [1, 1]


def test_a_span_rule_without_spans_is_an_error() -> None:
    with pytest.raises(TokenError, match="span 'answer': the batch names no spans"):
        select(padded_layout((2, 5), RIGHT, 0, None), Tokens(span="answer"))


def test_spans_come_one_mapping_a_sequence() -> None:
    with pytest.raises(ShapeError, match="expected 2 mappings, one a sequence; got 1"):
        select(padded_layout((2, 5), RIGHT, 0, None), Tokens(span="answer"), [{}])


def test_tokens_seen_before_are_not_selected_again() -> None:
    first = padded_layout((2, 5), LEFT, 0, None)
    again = padded_layout((2, 6), torch.cat([LEFT, torch.ones(2, 1, dtype=torch.long)], 1), 0, first.shown())
    kept = select(again, Tokens())
    assert first.shown().tolist() == [3, 5]
    assert kept.index.tolist() == [5, 11]
    assert (kept.offered, kept.masked, kept.reseen) == (12, 2, 8)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(0, 7))
def test_every_position_is_selected_masked_or_skipped(rows, skip) -> None:
    layout = padded_layout((len(rows), 6), torch.tensor(rows), 0, None)
    kept = select(layout, Tokens(skip=skip))
    assert kept.offered == len(kept.index) + kept.masked + kept.skipped == 6 * len(rows)
    assert len(kept.index) == sum(max(sum(row) - skip, 0) for row in rows)


# --- packed and plain rows


def test_packed_sequences_have_ranks_of_their_own_and_the_rest_is_padding() -> None:
    layout = packed_layout(8, torch.tensor([0, 3, 3, 7]), None)
    assert layout.sequence[layout.real].tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert layout.rank[layout.real].tolist() == [0, 1, 2, 0, 1, 2, 3]
    kept = select(layout, Tokens(skip=2))
    assert kept.index.tolist() == [2, 5, 6]
    assert (kept.offered, kept.masked, kept.skipped) == (8, 1, 4)


@pytest.mark.parametrize(
    "bounds", [[1, 4], [0, 5, 3], [0, 9], [], [[0, 4]]], ids=["not from 0", "falling", "too far", "empty", "2-D"]
)
def test_bounds_that_make_no_sense_are_refused(bounds) -> None:
    with pytest.raises(ShapeError, match=r"cu_seqlens; expected .* rising from 0 to at most 8"):
        packed_layout(8, torch.tensor(bounds, dtype=torch.int32), None)


def test_plain_rows_are_all_kept_and_counted() -> None:
    kept = select(plain_layout(4), Tokens())
    assert kept.index.tolist() == [0, 1, 2, 3]
    assert kept.counted.all()


def test_plain_rows_have_no_rank_to_skip_by() -> None:
    with pytest.raises(TokenError, match=r"skip: plain rows .* no place in a sequence"):
        select(plain_layout(4), Tokens(skip=1))


# --- rows that have ended


def test_stop_ids_after_the_prompt_are_padding() -> None:
    ids = torch.tensor([[7, 1, 8, 1, 0], [7, 8, 9, 9, 1]])
    layout = without_stops(padded_layout((2, 5), None, 0, None), ids, 3, {0, 1})
    assert layout.real.reshape(2, 5).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def test_without_known_stop_ids_every_token_stays() -> None:
    layout = padded_layout((2, 5), None, 0, None)
    assert without_stops(layout, torch.zeros(2, 5, dtype=torch.long), 0, set()) is layout
