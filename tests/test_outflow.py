"""What a capture on the device stores is what one on the host stores: on the CPU, by the reference of every step."""

import contextlib
import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from emocore import ActivationStore, Moments, Tokens, activations, capture, outflow, roll, shards, store
from emocore.capturing import Tap
from emocore.control import Station
from emocore.errors import CaptureError, LabelError, LedgerError, ShapeError, StoreError
from emocore.places import COLUMNS
from emocore.ring import Ring, sample

BLOCKS = "layers.*"
Run = Callable[[Tap], None]


class Held(NamedTuple):
    """A courier that waits."""

    inside: threading.Event
    go_on: threading.Event


@pytest.fixture(params=["roomy", "tight"])
def laps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that hold everything, and rings of two forwards, from which every forward is brought at once."""
    if request.param == "tight":
        monkeypatch.setattr("emocore.outflow.LEAST", 1)
        monkeypatch.setattr("emocore.outflow.RUN", 1)


def ids(b: int, t: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 14, (b, t), generator=torch.Generator().manual_seed(seed))


def both(model: nn.Module, run: Run, folder: Path, points: Any = BLOCKS, **options: Any) -> dict[str, Any]:
    """The same forwards stored by way of the device and of the host: the stores must agree. Returns the first."""
    found, ledgers = [], []
    given = {name: options.pop(name) for name in ("labels", "dtype", "policy", "shard_rows") if name in options}
    for resident in (True, False):
        path = folder / str(resident)
        with ActivationStore(path, **given) as kept, torch.no_grad():
            sinks = points(kept) if callable(points) else dict.fromkeys([points], kept)
            with capture(model, sinks, resident=resident, **options) as tap:
                run(tap)
            assert tap.resident == resident
        store.verify(path)
        found.append(activations(path))
        ledgers.append(kept.ledger)
    mine, other = found
    assert ledgers[0] == ledgers[1]
    assert sorted(mine) == sorted(other)
    for name in mine:
        assert torch.equal(mine[name].rows, other[name].rows)
        for column in COLUMNS:
            assert torch.equal(getattr(mine[name].places, column), getattr(other[name].places, column)), column
        assert mine[name].places.names == other[name].places.names
    return mine


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("skip", [0, 2])
def test_padded_batches_with_labels_and_requests(tokenwise, laps, tmp_path: Path, side: str, skip: int) -> None:
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, : 4 if side == "left" else 6] = 0
    mask[2, slice(0, 2) if side == "left" else slice(4, 6)] = 0

    def run(tap: Tap) -> None:
        for i, labels in enumerate((["calm", None, "tense"], ["tense", "tense", "calm"], ["calm"] * 3)):
            with tap.batch(labels=labels, requests=[f"r{i}", "again", f"s{i}"]):
                tap.model(ids(3, 6, i) * mask, attention_mask=mask)

    found = both(tokenwise(), run, tmp_path, labels=["calm", "tense"], tokens=Tokens(skip=skip))
    assert len(found["layers.0"]) > 10


def test_labels_by_position(tokenwise, laps, tmp_path: Path) -> None:
    where = torch.tensor([[0, 1, -1, 0], [1, 1, 0, -1]])

    def run(tap: Tap) -> None:
        for i in range(3):
            with tap.batch(labels=where.roll(i, 1)):
                tap.model(ids(2, 4, i))

    found = both(tokenwise(), run, tmp_path, labels=2, shard_rows=9)
    assert found["layers.1"].places.label[:8].tolist() == where.flatten().tolist()


def test_forwards_outside_a_batch_are_batches_of_their_own(tokenwise, laps, tmp_path: Path) -> None:
    def run(tap: Tap) -> None:
        for i in range(3):
            tap.model(ids(2, 3, i))
        with tap.batch(requests=["a", "b"]):
            tap.model(ids(2, 2, 7))
        tap.model(ids(1, 2, 8))

    found = both(tokenwise(), run, tmp_path)
    assert found["layers.0"].places.sequence.tolist() == [
        *(s for s in range(6) for _ in range(3)),
        *(6, 6, 7, 7, 8, 8),
    ]


def test_packed_sequences_spans_and_plain_rows(tokenwise, laps, tmp_path: Path) -> None:
    def packed(tap: Tap) -> None:
        for bounds in ([0, 2, 5, 7], [0, 0, 4], [0, 7]):
            cu = torch.tensor(bounds)
            with tap.batch(cu_seqlens=cu, requests=[f"{i}" for i in range(len(cu) - 1)]):
                tap.model(ids(1, 7, len(bounds)))

    both(tokenwise(), packed, tmp_path / "packed", tokens=Tokens(skip=1))

    def spanned(tap: Tap) -> None:
        for i in range(2):
            with tap.batch(spans=[{"said": [(0, 1), (2, 4)]}, {}]):
                tap.model(ids(2, 5, i))

    both(tokenwise(), spanned, tmp_path / "spans", tokens=Tokens(span="said"))
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6))

    def plain(tap: Tap) -> None:
        for n in (5, 1, 8):
            tap.model(torch.randn(n, 3, generator=torch.Generator().manual_seed(n)))

    found = both(layers, plain, tmp_path / "plain", "*")
    assert [found[name].dim for name in found] == [4, 6]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_generation(tiny, laps, tmp_path: Path, family: str) -> None:
    model = tiny(family)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])

    def run(tap: Tap) -> None:
        for i in range(2):
            with tap.batch(requests=[f"a{i}", f"b{i}"]):
                tap.model.generate(ids(2, 5, i), attention_mask=mask, max_new_tokens=6, do_sample=False)

    found = both(model, run, tmp_path, "model.layers.*" if family != "gpt2" else "transformer.h.*")
    assert all(len(view) > 12 for view in found.values())


def test_rows_that_are_not_finite_or_too_large(tokenwise, laps, tmp_path: Path) -> None:
    """Some at one hook point and not at the other; some only in the narrower dtype."""
    model = tokenwise()
    with torch.no_grad():
        model.embed.weight[9] = torch.inf
        model.embed.weight[5] = 1e5 / model.layers[0].scale

    def run(tap: Tap) -> None:
        for i in range(4):
            with tap.batch(requests=["x", "y"]):
                tap.model(ids(2, 9, i))

    both(model, run, tmp_path / "a")
    both(model, run, tmp_path / "b", dtype=torch.float16)


def test_several_rules_optional_modules_and_other_sinks_beside(tokenwise, laps, tmp_path: Path) -> None:
    moments: list[Moments] = []

    def sinks(kept: ActivationStore) -> dict[str, Any]:
        moments.append(Moments())
        return {"layers.0": [kept, moments[-1]], "layers.1": (kept, Tokens(skip=2))}

    def run(tap: Tap) -> None:
        for i in range(5):
            tap.model(ids(2, 6, i))

    found = both(tokenwise(), run, tmp_path / "a", sinks)
    assert (len(found["layers.0"]), len(found["layers.1"])) == (60, 40)
    assert [m.count for m in moments] == [60, 60]
    both(tokenwise(), run, tmp_path / "b", optional=True)


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_pooled_rows(tokenwise, tmp_path: Path, pool: str) -> None:
    def run(tap: Tap) -> None:
        for i in range(3):
            with tap.batch(labels=[0, 1], requests=[f"r{i}", "s"]):
                tap.model(ids(2, 6, i))

    def sinks(kept: ActivationStore) -> dict[str, Any]:
        return {"layers.0": (kept, Tokens(pool=pool)), "layers.1": kept}

    found = both(tokenwise(), run, tmp_path, sinks, labels=2)
    assert len(found["layers.0"]) == 6


def test_sampled_rows_are_those_of_the_host(tokenwise, laps, tmp_path: Path) -> None:
    def run(tap: Tap) -> None:
        for i in range(6):
            tap.model(ids(3, 8, i))

    found = both(tokenwise(), run, tmp_path, policy=sample(0.3, seed=5))
    assert 20 < len(found["layers.0"]) < 70


# --- the ring


def test_many_laps(tokenwise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Forwards of 1 to 40 rows through rings of 80: what comes out is what went in, row by row."""
    monkeypatch.setattr("emocore.outflow.LEAST", 1)
    monkeypatch.setattr("emocore.outflow.RUN", 200)
    model, x = tokenwise(dim=7), []
    g = torch.Generator().manual_seed(3)
    with ActivationStore(tmp_path, shard_rows=3000) as kept, torch.no_grad():
        with capture(model, BLOCKS, kept, resident=True) as tap:
            for i in range(400):
                t = 40 if i == 0 else int(torch.randint(1, 41, (), generator=g))
                shown = ids(1, t, i)
                tap.model(shown)
                x.append(shown[0])
            (flow,) = tap._way.seats.flows
            assert flow.capacity == 80
        assert kept.generation >= 2  # commits while the model went on
    expected = model.layers[0](model.embed(torch.cat(x))).detach()
    assert len(expected) > 90 * 80
    assert torch.equal(activations(tmp_path)["layers.0"].rows, expected)
    store.verify(tmp_path)


def test_a_larger_forward_gets_a_larger_ring(tokenwise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("emocore.outflow.LEAST", 1)

    def run(tap: Tap) -> None:
        for t in (1, 2, 9, 3, 30, 4):
            with tap.batch(requests=["a", "b"]):
                tap.model(ids(2, t, t))

    both(tokenwise(), run, tmp_path)


def slow(**options: Any) -> Ring:
    return Ring(slots=2, slot_bytes=4096, **options)


def test_a_forward_waits_for_room(tokenwise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("emocore.outflow.LEAST", 1)
    model = tokenwise(dim=256)
    with slow(throttle=2e6) as ring, ActivationStore(tmp_path, ring=ring) as kept, torch.no_grad():
        began = time.monotonic()
        with capture(model, BLOCKS, kept, resident=True):
            for i in range(40):
                model(ids(4, 8, i))
        assert time.monotonic() - began > 0.5  # 2.6 MB
    assert len(activations(tmp_path)["layers.1"]) == 40 * 32
    store.verify(tmp_path)


def test_a_forward_without_room_is_dropped_and_counted(
    tokenwise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The courier is held up, so that the ring on the device is what runs full."""
    monkeypatch.setattr("emocore.outflow.LEAST", 1)
    model, go_on = tokenwise(dim=8), threading.Event()
    with torch.no_grad():
        model.embed.weight[9] = torch.inf  # of which those in dropped forwards are none of the dropped rows
    receive = ActivationStore.receive

    def held(self: ActivationStore, *args: Any) -> None:
        go_on.wait()
        receive(self, *args)

    monkeypatch.setattr(ActivationStore, "receive", held)
    shown = [ids(2, 8, i) for i in range(6)]
    with ActivationStore(tmp_path, policy="drop") as kept, torch.no_grad():
        with capture(model, BLOCKS, kept, resident=True) as tap:
            for one in shown:
                with tap.batch(requests=["a", "b"]):
                    model(one)
            go_on.set()
            tokens, rows = tap.ledger["layers.0"].tokens, tap.ledger["layers.0"].rows
            assert tokens.selected == rows.formed == rows.pending + rows.dropped
            for one in shown:  # and on it goes
                tap.ledger  # noqa: B018 (waits until all is brought)
                model(one)
        again = sum(int((one != 9).sum()) for one in shown)
        kept_rows = sum(int((one != 9).sum()) for one in shown[:2]) + again
    counts = kept.ledger["layers.1"].rows
    assert (counts.accumulated, counts.dropped) == (kept_rows, sum(int((one != 9).sum()) for one in shown[2:]))
    x = torch.cat([model.layers[0](model.embed(one))[one != 9] for one in shown[:2] + shown])
    assert torch.equal(activations(tmp_path)["layers.0"].rows, x)


# --- what fails


class BrokenError(RuntimeError):
    """Of a model."""


def test_a_forward_that_fails_is_rolled_back(tokenwise, laps, tmp_path: Path) -> None:
    model = tokenwise()

    def run(tap: Tap) -> None:
        for i in range(6):
            handle = model.layers[1].register_forward_hook(_break) if i % 2 else None
            try:
                tap.model(ids(2, 5, i))
            except BrokenError:
                assert handle is not None
                handle.remove()

    found = both(model, run, tmp_path)
    assert len(found["layers.0"]) == 30


def _break(*_: Any) -> None:
    raise BrokenError


@pytest.mark.parametrize("laps", ["tight"], indirect=True)
def test_a_disk_that_fails_is_told_at_the_next_forward(tokenwise, laps, monkeypatch, tmp_path: Path) -> None:
    """What was pending is dropped and counted, and the capture goes on when the disk does."""
    model, fail = tokenwise(dim=64), threading.Event()
    offer = shards.Draft.offer

    def failing(*args: Any) -> Any:
        if fail.is_set():
            raise OSError(errno.ENOSPC, "no space")
        return offer(*args)

    monkeypatch.setattr(shards.Draft, "offer", failing)
    with ActivationStore(tmp_path) as kept, torch.no_grad():
        with capture(model, BLOCKS, kept, resident=True) as tap:
            model(ids(2, 5))
            assert kept.commit() == 1
            fail.set()
            model(ids(2, 5, 1))
            with pytest.raises(StoreError, match=r"could not be written.*No space|no space"):
                tap.ledger  # noqa: B018
            fail.clear()
            for i in range(2, 5):
                model(ids(2, 5, i))
        rows = kept.ledger["layers.0"].rows
        assert (rows.formed, rows.dropped, rows.accumulated + rows.pending) == (50, 10, 40)
    shown = torch.cat([ids(2, 5, i) for i in (0, 2, 3, 4)])
    assert torch.equal(activations(tmp_path)["layers.0"].rows, model.layers[0](model.embed(shown)).reshape(-1, 64))
    store.verify(tmp_path)


def test_an_error_of_the_model_is_not_hidden_by_one_of_the_disk(tokenwise, monkeypatch, tmp_path: Path) -> None:
    def failing(*_: Any) -> Any:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(shards.Draft, "offer", failing)
    model = tokenwise()
    kept = ActivationStore(tmp_path)
    with pytest.raises(BrokenError), torch.no_grad(), capture(model, BLOCKS, kept, resident=True):  # noqa: PT012
        model(ids(2, 5))
        raise BrokenError
    kept.close()
    assert kept.ledger["layers.0"].rows.dropped == 10


def test_reading_the_store_fetches_what_the_device_holds(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    with ActivationStore(tmp_path) as kept, torch.no_grad(), capture(model, BLOCKS, kept, resident=True) as tap:
        for i in range(3):
            model(ids(2, 4, i))
            assert kept.ledger["layers.1"].rows.pending == 8
            assert kept.commit() == i + 1
            assert len(activations(tmp_path)["layers.1"]) == 8 * (i + 1)
            assert tap.ledger["layers.0"].tokens.selected == 8 * (i + 1)


def test_a_store_that_ends_before_its_capture(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    kept = ActivationStore(tmp_path)
    with torch.no_grad():
        tap = capture(model, BLOCKS, kept, resident=True).__enter__()
        model(ids(2, 4))
        kept.close()
        model(ids(2, 4))
        with pytest.raises(StoreError, match="this store is closed"):
            tap.__exit__(None, None, None)
    assert len(activations(tmp_path)["layers.0"]) == 8
    assert kept.ledger["layers.0"].rows.dropped == 8


def test_rows_that_a_store_does_not_take_are_refused_before_they_are_staged(tokenwise, tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept:
        kept.at("layers.0").update(torch.zeros(1, 3))
        with torch.no_grad(), capture(tokenwise(), "layers.1", kept, resident=True) as tap:
            tap.model(ids(1, 2))
        wide = "hook point 'layers.0': width of rows; expected 3; got 5"
        with pytest.raises(ShapeError, match=wide), torch.no_grad():  # noqa: SIM117
            with capture(tokenwise(), BLOCKS, kept, resident=True) as tap:
                tap.model(ids(1, 2))
    with ActivationStore(tmp_path / "b", labels=2) as other, pytest.raises(LabelError, match="labelled"):  # noqa: SIM117
        with torch.no_grad(), capture(tokenwise(), BLOCKS, other, resident=True) as tap:
            tap.model(ids(1, 2))


def test_a_forked_child_is_told(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    with ActivationStore(tmp_path) as kept, torch.no_grad(), capture(model, BLOCKS, kept, resident=True) as tap:
        model(ids(2, 4))
        child = os.fork()
        if not child:
            try:
                tap.ledger  # noqa: B018
            except CaptureError as error:
                os._exit(0 if "after a fork" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.verify(tmp_path)


def test_no_thread_and_no_memory_stays(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    with ActivationStore(tmp_path) as kept, torch.no_grad():
        with capture(model, BLOCKS, kept, resident=True) as tap:
            model(ids(2, 4))
            tap.ledger  # noqa: B018 (waits until all is brought)
            lane = weakref.ref(tap._way)
            assert any(t.name == "emocore courier" for t in threading.enumerate())
        assert all(t.name != "emocore courier" for t in threading.enumerate())
        del tap
        gc.collect()
        assert lane() is None


def test_batches_are_forgotten_when_no_more_rows_come(tokenwise, laps, tmp_path: Path) -> None:
    model = tokenwise()
    with ActivationStore(tmp_path) as kept, torch.no_grad(), capture(model, BLOCKS, kept, resident=True) as tap:
        for i in range(30):
            with tap.batch(requests=["a", "b"]):
                model(ids(2, 4, i))
        tap.ledger  # noqa: B018
        assert not tap._way._courier.roll._batches
        assert not tap._way._courier.roll.left


# --- other threads, interrupts, and memory that is not there


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """The courier stops before it hands over, until `go_on`; `inside` says that it has come there."""
    found, receive = Held(threading.Event(), threading.Event()), ActivationStore.receive

    def wait(self: ActivationStore, *args: Any) -> None:
        found.inside.set()
        found.go_on.wait(20)
        receive(self, *args)

    monkeypatch.setattr(ActivationStore, "receive", wait)
    return found


def test_a_capture_that_ends_while_another_thread_commits_loses_nothing(tokenwise, held, tmp_path: Path) -> None:
    model = tokenwise()
    with ActivationStore(tmp_path) as kept, torch.no_grad():
        with capture(model, BLOCKS, kept, resident=True):
            model(ids(2, 4))
            other = threading.Thread(target=kept.commit)
            other.start()
            held.inside.wait()
            model(ids(2, 4, 1))
            threading.Timer(0.2, held.go_on.set).start()
        other.join()
    assert len(activations(tmp_path)["layers.0"]) == 16


def test_ledgers_that_are_read_while_the_model_runs(tokenwise, tmp_path: Path) -> None:
    model, stop = tokenwise(), threading.Event()
    with ActivationStore(tmp_path) as kept, torch.no_grad(), capture(model, BLOCKS, kept, resident=True) as tap:

        def look() -> None:
            while not stop.is_set():
                tap.ledger["layers.0"].check()
                time.sleep(0.001)

        other = threading.Thread(target=look)
        other.start()
        for i in range(100):
            model(ids(2, 4, i))
        stop.set()
        other.join()
        assert tap.ledger["layers.0"].tokens.selected == 800
        assert tap.ledger["layers.0"].tokens.rolled_back == 0
    assert len(activations(tmp_path)["layers.0"]) == 800


def test_an_interrupt_before_a_drop_is_done_stores_nothing_else(tokenwise, held, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("emocore.outflow.LEAST", 1)
    model, drop, dropped = tokenwise(), outflow.Outflow.drop, []

    def interrupted(self: outflow.Outflow, words: Tensor) -> None:
        dropped.append(1)
        if len(dropped) == 1:
            raise KeyboardInterrupt
        drop(self, words)

    monkeypatch.setattr(outflow.Outflow, "drop", interrupted)
    with ActivationStore(tmp_path, policy="drop") as kept, torch.no_grad():  # noqa: SIM117
        with capture(model, BLOCKS, kept, resident=True) as tap:
            for i in range(3):
                with contextlib.suppress(KeyboardInterrupt):
                    model(ids(1, 4, i))
            held.go_on.set()
            tap.ledger  # noqa: B018 (waits until all is brought)
            model(ids(1, 4, 3))
    shown = torch.cat([ids(1, 4, i) for i in (0, 1, 3)])
    assert torch.equal(activations(tmp_path)["layers.0"].rows, model.layers[0](model.embed(shown)).reshape(12, -1))
    assert kept.ledger["layers.0"].rows.dropped == 4


@pytest.mark.parametrize("first", [True, False])
def test_memory_that_is_not_there_leaves_the_ring_as_it_was(
    tokenwise, monkeypatch, tmp_path: Path, first: bool
) -> None:
    monkeypatch.setattr("emocore.outflow.LEAST", 1)
    model, new_zeros, full = tokenwise(), Tensor.new_zeros, threading.Event()

    def allocate(self: Tensor, *size: Any, **options: Any) -> Tensor:
        if full.is_set() and size and options.get("dtype") == torch.float32:
            raise torch.cuda.OutOfMemoryError
        return new_zeros(self, *size, **options)

    monkeypatch.setattr(Tensor, "new_zeros", allocate)
    shown = []
    with ActivationStore(tmp_path) as kept, torch.no_grad(), capture(model, BLOCKS, kept, resident=True) as tap:
        for i in range(0 if first else 5):
            model(ids(1, 4, i))
            shown.append(ids(1, 4, i))
            tap.ledger  # noqa: B018
        full.set()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            model(ids(1, 9))
        full.clear()
        for i in range(5, 8):
            model(ids(1, 4, i))
            shown.append(ids(1, 4, i))
    expected = model.layers[0](model.embed(torch.cat(shown))).reshape(-1, 5)
    assert torch.equal(activations(tmp_path)["layers.0"].rows, expected)


def test_rows_whose_places_cannot_be_told_are_dropped_and_counted(tokenwise, monkeypatch, tmp_path: Path) -> None:
    model, whose = tokenwise(), roll.Roll.whose
    monkeypatch.setattr(roll.Roll, "whose", lambda *_: (_ for _ in ()).throw(MemoryError))
    with ActivationStore(tmp_path) as kept, torch.no_grad(), capture(model, BLOCKS, kept, resident=True) as tap:
        model(ids(1, 4))
        with pytest.raises(MemoryError):
            tap.ledger  # noqa: B018
        monkeypatch.setattr(roll.Roll, "whose", whose)
        model(ids(1, 4))
        rows = tap.ledger["layers.0"].rows
        assert (rows.formed, rows.dropped, rows.pending) == (8, 4, 4)


def test_every_disk_that_fails_is_told_and_the_others_go_on(tokenwise, monkeypatch, tmp_path: Path) -> None:
    def failing(*_: Any) -> Any:
        raise OSError(errno.EIO, "broken")

    model = tokenwise()
    stores = [ActivationStore(tmp_path / name) for name in "ab"]
    sinks = {f"layers.{i}": one for i, one in enumerate(stores)}
    with torch.no_grad(), capture(model, sinks, resident=True) as tap:
        model(ids(1, 4))
        monkeypatch.setattr(shards.Draft, "offer", failing)
        for name in "ab":
            with pytest.raises(StoreError, match=f"/{name}: could not be written"):
                tap.ledger  # noqa: B018
    for one in stores:
        one.close()
        assert [ledger.rows.dropped for ledger in one.ledger.values()] == [4]


def test_two_captures_into_one_feed_are_both_fetched(tokenwise, tmp_path: Path) -> None:
    models = tokenwise(), tokenwise()
    with ActivationStore(tmp_path) as kept, torch.no_grad():  # noqa: SIM117
        with capture(models[0], "layers.0", kept, resident=True), capture(models[1], "layers.0", kept, resident=True):
            for model in models:
                model(ids(1, 4))
            kept.commit()
            assert len(activations(tmp_path)["layers.0"]) == 8


def test_a_second_batch_beside_an_open_one_is_refused(tokenwise, tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept, torch.no_grad(), capture(tokenwise(), BLOCKS, kept, resident=True) as tap:
        with tap.batch(requests=["a"]):
            with pytest.raises(CaptureError, match="another batch is open"), tap.batch(requests=["b"]):
                pass
            tap.model(ids(1, 3))
        with tap.batch(requests=["c"]):
            tap.model(ids(1, 2))
    places = activations(tmp_path)["layers.0"].places
    assert [places.names[i] for i in places.request] == ["a"] * 3 + ["c"] * 2


def test_the_ledger_after_the_end(tokenwise, tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept, torch.no_grad():
        with capture(tokenwise(), BLOCKS, kept, resident=True) as tap:
            tap.model(ids(1, 3))
        assert tap.ledger["layers.0"].tokens.selected == 3
        assert kept.ledger["layers.0"].rows.pending == 3


def test_a_hook_point_that_never_had_a_row_is_listed_with_its_ledger(tokenwise, tmp_path: Path) -> None:
    def run(tap: Tap) -> None:
        tap.model(ids(2, 3), torch.zeros(2, 3, dtype=torch.long))

    found = both(tokenwise(), run, tmp_path)
    assert {name: len(view) for name, view in found.items()} == {"layers.0": 0, "layers.1": 0}


def test_rows_that_do_not_fit_what_was_counted_are_never_committed(tokenwise, tmp_path: Path) -> None:
    """One more is selected than came, in a shard that would be full."""
    model, kept = tokenwise(), ActivationStore(tmp_path, shard_rows=1)
    with torch.no_grad():
        tap = capture(model, BLOCKS, kept, resident=True).__enter__()
        model(ids(1, 4))
        tap._way.plans.stations[0, Station.SELECTED] += 1
        with pytest.raises(LedgerError, match=r"'layers.0': rows brought from the device; expected 1 more"):
            tap.ledger  # noqa: B018
    assert kept.generation == 0
    rows = kept._feeds["layers.0"].ledger.rows
    assert (rows.accumulated, rows.pending, rows.dropped) == (0, 0, 4)
    for end in (lambda: tap.__exit__(None, None, None), kept.close):
        with pytest.raises(LedgerError, match="counts do not add up"):
            end()
    assert kept.generation == 0
