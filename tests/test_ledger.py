"""The ledger: counts add up, or it says so."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emocore.errors import LedgerError
from emocore.ledger import Ledger, RowCounts, TokenCounts

TOKENS = [name for name in TokenCounts().as_dict() if name != "offered"]
ROWS = [name for name in RowCounts().as_dict() if name != "formed"]
COUNTS = st.integers(0, 2**70)


@st.composite
def ledgers(draw) -> Ledger:
    """Ledgers that add up."""
    found = Ledger()
    tokens = {name: draw(COUNTS) for name in TOKENS}
    rows = {name: draw(COUNTS) for name in ROWS}
    fires = draw(COUNTS)
    found.tokens.add(offered=sum(tokens.values()), **tokens)
    found.rows.add(formed=sum(rows.values()), **rows)
    found.fires.add(expected=fires, seen=fires)
    found.forwards, found.unmasked = draw(COUNTS), draw(COUNTS)
    return found


def test_the_names_are_the_identity_of_the_design() -> None:
    assert " ".join(TOKENS) == "selected masked skipped reseen nonfinite recomputed rolled_back orphan"
    assert " ".join(ROWS) == "accumulated nonfinite overrange bad_label too_short dropped sampled_out pending"


def test_an_empty_ledger_adds_up() -> None:
    Ledger().check()


@pytest.mark.parametrize("name", ["offered", *TOKENS])
def test_one_token_too_many_anywhere_is_an_error(name) -> None:
    ledger = Ledger()
    ledger.tokens.add(offered=8, **dict.fromkeys(TOKENS, 1))
    ledger.check()
    ledger.tokens.add(**{name: 1})
    with pytest.raises(LedgerError, match=f"tokens: counts do not add up.*{name} {9 if name == 'offered' else 2}"):
        ledger.check()


@pytest.mark.parametrize("name", ["formed", *ROWS])
def test_one_row_too_many_anywhere_is_an_error(name) -> None:
    ledger = Ledger()
    ledger.rows.add(formed=8, **dict.fromkeys(ROWS, 1))
    ledger.check()
    ledger.rows.add(**{name: 1})
    with pytest.raises(LedgerError, match="rows: counts do not add up"):
        ledger.check()


def test_a_missing_fire_is_an_error_naming_where() -> None:
    ledger = Ledger()
    ledger.fires.add(expected=3, seen=2)
    with pytest.raises(LedgerError, match=r"hook point 'x': fires.*expected 3; got 2.*optional=True"):
        ledger.check("hook point 'x'")


@given(ledgers(), ledgers())
def test_merged_ledgers_add_up_and_subtract_inverts_merge(one, other) -> None:
    before, part = one.as_dict(), other.as_dict()
    one.merge(other)
    one.check()
    assert one.tokens.offered == before["tokens"]["offered"] + part["tokens"]["offered"]
    one.subtract(other)
    assert one.as_dict() == before
    assert other.as_dict() == part


@given(ledgers())
def test_counts_survive_json_exactly(ledger) -> None:
    assert Ledger.from_dict(json.loads(json.dumps(ledger.as_dict()))) == ledger


def test_counts_never_round() -> None:
    ledger = Ledger()
    ledger.tokens.add(offered=2**53, selected=2**53)
    ledger.tokens.add(offered=1, masked=1)
    ledger.check()
    assert ledger.tokens.offered == 2**53 + 1


def test_an_unknown_count_is_refused() -> None:
    with pytest.raises(AttributeError, match="lost"):
        Ledger().tokens.add(lost=1)


def test_a_printed_ledger_shows_what_is_not_zero() -> None:
    ledger = Ledger()
    ledger.tokens.add(offered=1234, selected=1200, masked=34)
    ledger.rows.add(formed=1200, accumulated=1200)
    ledger.fires.add(expected=2, seen=2)
    assert str(ledger) == (
        "tokens offered 1,234  selected 1,200  masked 34\n"
        "rows   formed 1,200  accumulated 1,200\n"
        "fires  expected 2  seen 2"
    )
