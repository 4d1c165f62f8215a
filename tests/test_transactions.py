"""A forward is a transaction: what an exception leaves open reaches no sink, and only our own hooks are removed."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from emocore import Moments, Rows, Tokens, capture
from emocore.errors import CaptureError, LabelError, ShapeError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
POINTS = ["embed", "layers.0", "layers.1"]


def hooks(model: nn.Module) -> list[tuple[str, object]]:
    """Every forward hook there is, by module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return [(name, hook) for name, m in model.named_modules() for kind in kinds for hook in getattr(m, kind).values()]


class Bomb:
    """A foreign hook that raises once, after `wait` calls."""

    def __init__(self, error: type[BaseException], wait: int = 0) -> None:
        self.error, self.wait, self.calls = error, wait, 0

    def __call__(self, *rest) -> None:
        self.calls += 1
        if self.calls == self.wait + 1:
            raise self.error("bomb")


def feed(model):
    with torch.no_grad():
        return model(IDS)


def staged_before(point: str, when: str, own_first: bool) -> int:
    """How many hook points have staged when a bomb goes off, of those in POINTS."""
    if point == "":
        return len(POINTS) if when == "after" else 0
    return POINTS.index(point) + (when == "after" and own_first)


# --- an exception at every point of a forward


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("own_first", [False, True], ids=["bomb first", "capture first"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", ["", *POINTS])
def test_an_exception_at_any_point_of_a_forward(tokenwise, point, when, own_first, error) -> None:
    model, bomb = tokenwise(), Bomb(error, wait=1)
    pristine = feed(model)
    module = model.get_submodule(point)
    register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
    if not own_first:
        register(bomb)
    with capture(model, POINTS, lambda: [Rows(), (Rows(), Tokens(pool="mean"))]) as tap:
        if own_first:
            register(bomb)
        assert torch.equal(feed(model), pristine)
        with pytest.raises(error, match="bomb"):
            feed(model)
        assert torch.equal(feed(model), pristine)
    assert hooks(model) == [(point, bomb)]
    # a hook on the root that runs after ours raises when the forward has ended well: it stays committed
    late = (point, when, own_first) == ("", "after", True)
    committed = 3 if late else 2
    staged = 0 if late else staged_before(point, when, own_first)
    for i, name in enumerate(POINTS):
        for ledger in tap.ledger[name]:
            ledger.check()
            assert (ledger.tokens.selected, ledger.tokens.rolled_back) == (8 * committed, 8 * (i < staged))
            assert ledger.forwards == ledger.fires.expected == ledger.fires.seen == committed
        single, pooled = tap.sinks[name]
        assert torch.equal(single.rows[:8], single.rows[-8:])
        assert (len(single), len(pooled)) == (8 * committed, 2 * committed)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_batch_after_its_forward(tokenwise, error) -> None:
    """Token rows were committed with their forward; pooled rows are dropped with the batch, and counted."""
    model = tokenwise()
    with capture(model, {1: [Rows(), (Rows(), Tokens(pool="max"))]}) as tap:
        with pytest.raises(error), tap.batch():  # noqa: PT012
            feed(model)
            raise error
        with tap.batch():
            feed(model)
    single, pooled = tap.sinks["layers.1"]
    first, second = tap.ledger["layers.1"]
    first.check()
    second.check()
    assert (len(single), len(pooled)) == (16, 2)
    assert (second.rows.formed, second.rows.dropped, second.rows.accumulated) == (4, 2, 2)
    assert not hooks(model)


def test_a_forward_that_failed_inside_a_batch_can_be_run_again_there(tokenwise) -> None:
    model = tokenwise()
    model.layers[1].register_forward_hook(Bomb(RuntimeError))
    with capture(model, {0: Rows(labels=["a", "b"])}, tokens=Tokens(pool="mean")) as tap, tap.batch(labels=["a", "b"]):
        with pytest.raises(RuntimeError):
            feed(model)
        feed(model)
    ledger = tap.ledger["layers.0"]
    ledger.check()
    assert (ledger.tokens.rolled_back, ledger.tokens.selected, ledger.tokens.reseen) == (8, 8, 0)
    assert tap.sinks["layers.0"].ids.tolist() == [0, 1]


def test_an_interrupted_last_forward_is_rolled_back_when_the_capture_ends(tokenwise) -> None:
    model = tokenwise()
    model.layers[1].register_forward_hook(Bomb(KeyboardInterrupt, wait=1))
    with pytest.raises(KeyboardInterrupt), capture(model, {0: Rows()}) as tap:  # noqa: PT012
        feed(model)
        feed(model)
    ledger = tap.ledger["layers.0"]
    ledger.check()
    assert (ledger.tokens.offered, ledger.tokens.selected, ledger.tokens.rolled_back) == (16, 8, 8)


def test_what_a_failed_forward_has_staged_is_let_go_at_once(tokenwise) -> None:
    """After running out of memory the retry needs the room."""
    model = tokenwise()
    model.layers[1].register_forward_hook(Bomb(MemoryError))
    with capture(model, {0: Rows()}) as tap:
        with pytest.raises(MemoryError):
            feed(model)
        assert tap.ledger["layers.0"].tokens.rolled_back == 8
        with pytest.raises(CaptureError, match="ran outside a forward"):
            model.layers[0](torch.ones(1, 2, 5))
        feed(model)
    ledger = tap.ledger["layers.0"]
    ledger.check()
    assert (ledger.tokens.selected, ledger.tokens.rolled_back, ledger.tokens.orphan) == (8, 8, 2)


def test_a_forward_that_is_interrupted_in_a_batch_is_rolled_back_with_the_batch(tokenwise) -> None:
    model = tokenwise()
    model.layers[1].register_forward_hook(Bomb(KeyboardInterrupt))
    with capture(model, {0: Rows()}) as tap:
        with pytest.raises(KeyboardInterrupt), tap.batch():
            feed(model)
        assert tap.ledger["layers.0"].tokens.rolled_back == 8
        feed(model)
    tap.ledger["layers.0"].check()
    assert (len(tap.sinks["layers.0"]), tap.ledger["layers.0"].tokens.rolled_back) == (8, 8)


# --- sinks that raise


class Refusing(Rows):
    """A sink that raises at its second update."""

    def update(self, x, labels=None) -> None:
        if len(self):
            raise OSError("no room")
        super().update(x, labels)


def test_a_sink_that_raises_leaves_every_ledger_exact(tokenwise) -> None:
    model, sinks = tokenwise(), [Rows(), Refusing(), Rows()]
    with capture(model, {"layers.0": sinks, "layers.1": Rows()}) as tap:
        model(IDS)
        with pytest.raises(OSError, match="no room"):
            model(IDS)
    before, refusing, after = tap.ledger["layers.0"]
    for ledger in (before, refusing, after, tap.ledger["layers.1"]):
        ledger.check()
    assert (before.tokens.selected, before.rows.accumulated) == (16, 16)
    assert (refusing.tokens.selected, refusing.rows.accumulated, refusing.rows.dropped) == (16, 8, 8)
    assert (after.tokens.selected, after.tokens.rolled_back, after.rows.accumulated) == (8, 8, 8)
    assert [len(rows) for rows in tap.sinks["layers.0"]] == [16, 8, 8]
    assert not hooks(model)


def test_a_sink_that_raises_for_pooled_rows_leaves_every_ledger_exact(tokenwise) -> None:
    model, sinks = tokenwise(), [Rows(), Refusing(), Rows()]
    with capture(model, {"layers.0": sinks}, tokens=Tokens(pool="mean")) as tap:
        model(IDS)
        with pytest.raises(OSError, match="no room"):
            model(IDS)
    for ledger in tap.ledger["layers.0"]:
        ledger.check()
    assert [ledger.rows.dropped for ledger in tap.ledger["layers.0"]] == [0, 2, 2]
    assert [ledger.rows.accumulated for ledger in tap.ledger["layers.0"]] == [4, 2, 2]


def test_moments_of_another_width_refuse_and_the_ledger_stays_exact(tokenwise) -> None:
    stats = Moments(dim=7)
    with pytest.raises(ShapeError, match="width"), capture(tokenwise(), {"layers.0": stats}) as tap:
        tap.model(IDS)
    stats.ledger.check()
    assert (stats.count, stats.ledger.rows.dropped) == (0, 8)


# --- random programs

STEPS = ["feed", "nested", "bomb", "bad labels", "no labels", "around", "foreign hook"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=8))
def test_any_program_leaves_no_hook_loses_no_foreign_one_and_counts_exactly(tokenwise, program) -> None:
    model = tokenwise()
    pristine = feed(model)
    before = hooks(model)

    def foreign(*rest) -> None:
        return None

    with contextlib.suppress(CaptureError), capture(model, {0: Rows(labels=["a"])}) as tap:
        for step in program:
            with contextlib.ExitStack() as stack:
                if step == "foreign hook":
                    model.layers[0].register_forward_hook(foreign)
                    continue
                if step == "nested":
                    stack.enter_context(capture(model, {1: Moments(), 0: Moments()}))
                if step == "bomb":
                    stack.callback(model.layers[1].register_forward_hook(Bomb(RuntimeError)).remove)
                if step in ("bomb", "bad labels", "no labels", "around"):
                    stack.enter_context(pytest.raises((RuntimeError, LabelError)))
                if step != "no labels":
                    stack.enter_context(tap.batch(labels=["a", "b" if step == "bad labels" else None]))
                if step == "around":
                    model.layers[0](model.embed(IDS))
                assert torch.equal(feed(model), pristine)
    assert hooks(model) == [*before, *[("layers.0", foreign)] * program.count("foreign hook")]
    ledger, good = tap.ledger["layers.0"], program.count("feed") + program.count("nested")
    ledger.check()
    assert (ledger.tokens.selected, ledger.forwards, len(tap.sinks["layers.0"])) == (8 * good, good, 8 * good)
    assert ledger.tokens.rolled_back == 8 * program.count("bomb")
    assert ledger.tokens.orphan == 8 * program.count("around")
