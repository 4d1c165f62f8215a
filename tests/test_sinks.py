"""Sinks: what may take rows, under which rule, and whose label each row gets."""

import pytest
import torch
from torch import nn

from emocore import Moments, Rows, Tokens, capture
from emocore.errors import ArgumentError, LabelError, ShapeError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


def settle(tap, offered: int, selected: int) -> None:
    """Every ledger adds up to what one forward was fed."""
    for ledger in tap.ledger.values():
        ledger.check()
        assert (ledger.tokens.offered, ledger.tokens.selected, ledger.forwards) == (offered, selected, 1)


# --- what takes rows


def test_a_spec_of_many_modules_takes_a_factory(tiny) -> None:
    with torch.no_grad(), capture(model := tiny("gpt2"), "transformer.h.*", lambda: Moments(covariance=True)) as tap:
        model(IDS)
    assert list(tap.sinks) == [f"transformer.h.{i}" for i in range(3)]
    assert [m.count for m in tap.sinks.values()] == [12] * 3
    settle(tap, 12, 12)


@pytest.mark.parametrize(
    "bind", [lambda m: (["0", "1"], m), lambda m: ({"0": m, "1": m}, None), lambda m: ({"0": [m, m]}, None)]
)
def test_one_moments_bound_twice_is_an_error(bind) -> None:
    with pytest.raises(ArgumentError, match=r"one Moments is bound twice.*factory"):
        capture(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), *bind(Moments()))


def test_a_hook_point_named_twice_is_an_error(tiny) -> None:
    with pytest.raises(ArgumentError, match=r"'model.layers.2' is named twice.*list of sinks"):
        capture(tiny("llama"), {-1: Moments(), "model.layers.2": Moments()})


def test_no_hook_point_is_an_error(tiny) -> None:
    with pytest.raises(ArgumentError, match="hook_points: none given"):
        capture(tiny("llama"), {})


@pytest.mark.parametrize("sink", [None, 3, [None], (object(), Tokens())])
def test_what_cannot_take_rows_is_no_sink(tiny, sink) -> None:
    with pytest.raises(ArgumentError, match=r"sink at 'model.layers.0'; expected an object with update"):
        capture(tiny("llama"), {0: sink})


def test_several_sinks_at_one_hook_point_follow_their_own_rules(tokenwise) -> None:
    model, mask = tokenwise(), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    sinks = [(Rows(), Tokens(skip=2, pool="mean")), (Rows(), Tokens(skip=1)), Rows()]
    with torch.no_grad(), capture(model, {"layers.0": sinks}, tokens=Tokens(pool="last")) as tap:
        model(IDS, mask)
    assert [len(rows) for rows in tap.sinks["layers.0"]] == [2, 6, 3]
    assert [ledger.tokens.skipped for ledger in tap.ledger["layers.0"]] == [6, 3, 0]
    assert [ledger.rows.too_short for ledger in tap.ledger["layers.0"]] == [1, 0, 0]


def test_a_factory_may_give_several_sinks_with_rules(tokenwise) -> None:
    model = tokenwise()
    with torch.no_grad(), capture(model, "layers.*", lambda: [(Rows, Tokens(skip=1)), Rows]) as tap:
        model(IDS)
    assert [[len(rows) for rows in pair] for pair in tap.sinks.values()] == [[9, 12]] * 2


def test_a_sink_that_holds_other_rows_is_refused(tokenwise) -> None:
    model, stats = tokenwise(), Moments()
    with torch.no_grad(), capture(model, {"layers.0": stats}, tokens=Tokens(pool="mean")):
        model(IDS)
    with pytest.raises(
        ArgumentError, match=r"already holds other rows; expected Tokens\(skip=0, pool='mean'.*got Tokens"
    ):
        capture(model, {"layers.0": stats})
    with torch.no_grad(), capture(model, {"layers.0": stats}, tokens=Tokens(pool="mean")):
        model(IDS)
    assert stats.count == 6
    assert stats.ledger.forwards == 2


def test_a_refused_capture_leaves_its_sinks_as_they_were(tokenwise) -> None:
    stats, used = Moments(), Moments()
    used.tokens = Tokens(skip=3)
    with pytest.raises(ArgumentError):
        capture(tokenwise(), {"layers.0": (stats, Tokens(skip=1)), "layers.1": used})
    assert stats.tokens is None


class Watching:
    """A sink that follows sequences."""

    def __init__(self) -> None:
        self.seen = []

    def observe(self, observed) -> None:
        self.seen.append(observed)


def test_a_sink_that_follows_sequences_gets_their_ranks_and_requests(tokenwise) -> None:
    model, mask = tokenwise(), torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])
    watching = Watching()
    with (
        torch.no_grad(),
        capture(model, {"layers.0": (watching, Tokens(skip=1))}) as tap,
        tap.batch(requests=["x", "y"]),
    ):
        model(IDS[:2], mask)
    (seen,) = watching.seen
    assert (seen.hook_point, seen.whose.sequences, seen.whose.requests) == ("layers.0", 2, ["x", "y"])
    assert (seen.whose.sequence.tolist(), seen.whose.rank.tolist()) == ([0, 0], [1, 2])
    assert seen.rows.shape == (2, 5)
    settle(tap, 8, 2)
    assert tap.ledger["layers.0"].rows.accumulated == 2


def test_a_sink_that_follows_sequences_takes_no_pool(tokenwise) -> None:
    with pytest.raises(ArgumentError, match=r"pool: the sink at 'layers.0' follows tokens"):
        capture(tokenwise(), {"layers.0": Watching()}, tokens=Tokens(pool="mean"))


def test_requests_come_one_a_sequence(tokenwise) -> None:
    model = tokenwise()
    with capture(model, {"layers.0": Rows()}) as tap:
        with (
            pytest.raises(ArgumentError, match="requests; expected 3 ids, one a sequence; got 2"),
            tap.batch(requests=["x", "y"]),
        ):
            model(IDS)
        model(IDS)
    assert len(tap.sinks["layers.0"]) == 12


# --- labels


def labelled(model, labels, tokens=None):
    rows = Rows(labels=["calm", "at ease", "sad"])
    with torch.no_grad(), capture(model, {"layers.0": rows}, tokens=tokens) as tap, tap.batch(labels=labels):
        model(IDS)
    settle(tap, 12, 12)
    return rows.ids.tolist()


@pytest.mark.parametrize(
    "labels",
    [["sad", None, "at ease"], [2, -1, 1], torch.tensor([2, -1, 1]), ("sad", -1, 1)],
    ids=["names", "ids", "tensor", "mixed"],
)
def test_labels_one_a_sequence(tokenwise, labels) -> None:
    assert labelled(tokenwise(), labels) == [2] * 4 + [-1] * 4 + [1] * 4
    assert labelled(tokenwise(), labels, Tokens(pool="mean")) == [2, -1, 1]


def test_labels_one_a_position(tokenwise) -> None:
    labels = [["calm", "calm", None, "sad"], [None] * 4, ["sad", 1, 0, -1]]
    assert labelled(tokenwise(), labels) == [0, 0, -1, 2, -1, -1, -1, -1, 2, 1, 0, -1]


def test_unlabelled_rows_count_overall_and_not_as_bad_labels(tokenwise) -> None:
    model, stats = tokenwise(), Moments(labels=["a", "b"])
    with torch.no_grad(), capture(model, {"layers.0": stats}) as tap, tap.batch(labels=["a", None, None]):
        model(IDS)
    assert (stats.count, stats.label_count.tolist(), stats.ledger.rows.bad_label) == (12, [4, 0], 0)


def test_labels_of_the_transposed_shape_are_refused(tokenwise) -> None:
    model, labels = tokenwise(), torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(ShapeError, match=r"labels; expected \[3\], one a sequence, or \[3, 4\]; got \[4, 3\]"):
        labelled(model, labels)


@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 0, 0, 0], [0] * 12])
@pytest.mark.parametrize("pool", [None, "mean"])
def test_too_many_or_too_few_labels_are_refused(tokenwise, labels, pool) -> None:
    with pytest.raises(ShapeError, match="labels"):
        labelled(tokenwise(), labels, Tokens(pool=pool))


def test_pooled_rows_take_one_label_a_sequence(tokenwise) -> None:
    with pytest.raises(ShapeError, match=r"labels: of pooled rows; expected \[3\], one a sequence; got \[3, 4\]"):
        labelled(tokenwise(), [[0] * 4] * 3, Tokens(pool="mean"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 3, 0], "row 1.*-1 .. 2; got 3"), ([0, 0, -2], "row 2"), (["calm", "calmm", 0], "row 1.*'calm'")],
)
def test_a_label_out_of_range_or_unknown_is_an_error_before_the_forward(tokenwise, labels, message) -> None:
    model, rows = tokenwise(), Rows(labels=["calm", "at ease", "sad"])
    with capture(model, {"layers.0": rows}) as tap:
        with pytest.raises(LabelError, match=message), tap.batch(labels=labels):
            raise AssertionError("the batch must not open")
        with tap.batch(labels=[0, 1, 2]):
            model(IDS)
    settle(tap, 12, 12)


def test_a_labelled_sink_outside_a_batch_is_an_error(tokenwise) -> None:
    model, rows = tokenwise(), Rows(labels=["calm"])
    with capture(model, {"layers.0": rows}) as tap:
        with pytest.raises(LabelError, match=r"captured without labels.*tap.batch\(labels=...\)"):
            model(IDS)
        with pytest.raises(LabelError, match="captured without labels"), tap.batch():
            raise AssertionError("the batch must not open")
        with tap.batch(labels=[0, 0, 0]):
            model(IDS)
    settle(tap, 12, 12)


def test_sinks_with_other_names_read_the_same_labels(tokenwise) -> None:
    model = tokenwise()
    sinks = {"layers.0": Rows(labels=["a", "b"]), "layers.1": Rows(labels=["b", "c", "a"])}
    with torch.no_grad(), capture(model, sinks) as tap, tap.batch(labels=["a", "b", None]):
        model(IDS)
    settle(tap, 12, 12)
    assert [rows.ids.tolist()[::4] for rows in tap.sinks.values()] == [[0, 1, -1], [2, 0, -1]]


# --- the plainest sink


def test_rows_takes_one_label_a_row() -> None:
    rows = Rows(labels=["a"])
    with pytest.raises(ShapeError, match=r"labels; expected 3, one a row; got \[2\]"):
        rows.update(torch.ones(3, 2), [0, 0])
    assert len(rows) == 0
    assert rows.ids.tolist() == []
