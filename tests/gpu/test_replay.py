"""A forward recorded once and replayed on other tokens counts what eager code counts: nothing is baked in."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emocore import (
    ActivationStore,
    Calibration,
    Directions,
    Moments,
    Threshold,
    Tokens,
    activations,
    capture,
    monitor,
    steer,
    store,
)
from emocore.errors import ArgumentError, CaptureError
from emocore.places import COLUMNS

_spec = importlib.util.spec_from_file_location("replay", Path(__file__).with_name("replay.py"))
replay = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(replay)

B, T, ROUNDS = 3, 6, 4


def tokens(round_: int, device: torch.device, shape: tuple[int, int] = (B, T)) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(round_)
    mask = (torch.rand(shape, generator=g) > 0.25).long()
    return torch.randint(3, 14, shape, generator=g).to(device), mask.to(device)


def labelled() -> Moments:
    return Moments(labels=["calm", "tense"], covariance=True, block_rows=512)


def run(model: nn.Module, device: torch.device, recorder, **options):
    """ROUNDS batches of two forwards each; with a recorder, the first forward is run, the second recorded, then all are
    replayed."""
    shown, mask = torch.zeros(B, T, dtype=torch.long, device=device), torch.ones(B, T, dtype=torch.long, device=device)
    with torch.no_grad(), capture(model, "layers.*", labelled, resident=True, **options) as tap:
        for i in range(ROUNDS):
            with tap.batch(labels=[["calm", "tense", None], ["tense", None, "calm"]][i % 2]):
                for _ in range(2):
                    for memory, value in zip((shown, mask), tokens(i, device), strict=True):
                        memory.copy_(value)
                    if recorder is None or i == 0:
                        model(shown, attention_mask=mask)
                    elif recorder.calls:
                        recorder.replay()
                    else:
                        with recorder:
                            model(shown, attention_mask=mask)
    return tap


@pytest.mark.parametrize("rule", [Tokens(), Tokens(skip=1), Tokens(skip=1, pool="mean"), Tokens(pool="last")], ids=str)
def test_replays_are_eager_forwards(tokenwise, device, monkeypatch, rule: Tokens) -> None:
    model = tokenwise(dim=5).to(device)
    with torch.no_grad():
        model.embed.weight[9] = torch.inf  # some rows are quarantined
    eager = run(model, device, None, tokens=rule)
    recorder = replay.Recorder(monkeypatch)
    replayed = run(model, device, recorder, tokens=rule)
    assert recorder.calls
    assert replayed.ledger == eager.ledger
    for name in eager.sinks:
        mine, other = replayed.sinks[name], eager.sinks[name]
        assert torch.equal(mine.mean, other.mean)
        assert torch.equal(mine.label_mean, other.label_mean)
        assert torch.equal(mine.covariance(), other.covariance())
        assert mine.mean_norm == other.mean_norm
    tokens_ = eager.ledger["layers.0"].tokens
    assert tokens_.nonfinite > 0
    assert tokens_.masked > 0
    assert tokens_.reseen > 0


def test_nothing_is_allocated_in_a_steady_forward(tokenwise, device, monkeypatch) -> None:
    model = tokenwise(dim=5).to(device)
    recorder = replay.Recorder(monkeypatch)
    run(model, device, recorder, tokens=Tokens(skip=1))
    assert not replay.ALLOCATES & set(recorder.ours)


def test_blocks_that_fill_in_a_replay_are_drained_there(tokenwise, device, monkeypatch) -> None:
    """Forwards of some 420 rows, blocks of 512: three are filled, one of them in the recording."""
    model, shape = tokenwise(dim=5).to(device), (56, 10)
    shown, mask = torch.zeros(2, *shape, dtype=torch.long, device=device)
    taps, recorder = [], replay.Recorder(monkeypatch)
    for recorded in (False, True):
        with torch.no_grad(), capture(model, "layers.*", labelled, resident=True) as tap:
            for i in range(4):
                for memory, value in zip((shown, mask), tokens(i, device, shape), strict=True):
                    memory.copy_(value)
                with tap.batch(labels=torch.arange(56) % 3 - 1):
                    if recorded and i == 1:
                        with recorder:
                            model(shown, attention_mask=mask)
                    elif recorded and i > 1:
                        recorder.replay()
                    else:
                        model(shown, attention_mask=mask)
            assert tap._way.seats.cursors[0, 1] == 3 * 512
        taps.append(tap)
    for name in taps[0].sinks:
        mine, other = taps[1].sinks[name], taps[0].sinks[name]
        assert torch.equal(mine.label_mean, other.label_mean)
        assert torch.equal(mine.covariance(), other.covariance())
        assert mine.count == other.count
    assert taps[0].ledger == taps[1].ledger


def stored(model: nn.Module, path: Path, device: torch.device, recorder, gate: int) -> ActivationStore:
    """ROUNDS batches of three forwards; with a recorder the first batch is run, its last forward recorded, and the
    others are replayed behind a gate for so many of them."""
    shown, mask = torch.zeros(B, T, dtype=torch.long, device=device), torch.ones(B, T, dtype=torch.long, device=device)
    with ActivationStore(path, labels=["calm", "tense"]) as kept, torch.no_grad():  # noqa: SIM117
        with capture(model, "layers.*", kept, tokens=Tokens(skip=1), resident=True) as tap:
            for i in range(ROUNDS):
                with tap.batch(labels=["calm", None, "tense"][i % 2 :] + [None] * (i % 2), requests=list("abc")):
                    for j in range(3):
                        for memory, value in zip((shown, mask), tokens(i, device), strict=True):
                            memory.copy_(value.flip(1) if j else value)
                        tap._way.plans.seen.zero_()  # every forward shows other tokens
                        if recorder is None or (i == 0 and j < 2):
                            model(shown, attention_mask=mask)
                        elif recorder.calls:
                            if gate and (gate == 1 or j == 0):
                                tap.gate(gate)
                            recorder.replay()
                        else:
                            tap.ledger  # noqa: B018 (what is recorded here is run, too: it finds the ring empty,
                            with recorder:
                                model(shown, attention_mask=mask)
                            tap.gate()  # and is made known)
    return kept


def tight(recorder, monkeypatch) -> None:
    """Rings of two forwards, brought one by one; what is recorded is told from what runs."""
    monkeypatch.setattr("emocore.outflow.LEAST", 1)
    monkeypatch.setattr("emocore.outflow.RUN", 1)
    monkeypatch.setattr("emocore.courier.recording", lambda device: recorder._open or recorder._inside > 0)


@pytest.mark.parametrize("gate", [1, 3])
def test_replays_store_what_eager_forwards_store(tokenwise, device, monkeypatch, tmp_path: Path, gate: int) -> None:
    model = tokenwise(dim=5).to(device)
    with torch.no_grad():
        model.embed.weight[9] = torch.inf
    eager = stored(model, tmp_path / "eager", device, None, 0)
    recorder = replay.Recorder(monkeypatch)
    if gate == 1:
        tight(recorder, monkeypatch)
    else:
        monkeypatch.setattr("emocore.courier.recording", lambda device: recorder._open or recorder._inside > 0)
    replayed = stored(model, tmp_path / "replayed", device, recorder, gate)
    assert replayed.ledger == eager.ledger
    found, right = activations(tmp_path / "replayed"), activations(tmp_path / "eager")
    for name in right:
        assert torch.equal(found[name].rows, right[name].rows)
        for column in COLUMNS:
            assert torch.equal(getattr(found[name].places, column), getattr(right[name].places, column)), column
    assert store.verify(tmp_path / "replayed").rows == sum(len(view) for view in right.values()) > 0


def test_replays_without_a_gate_are_found_out(tokenwise, device, monkeypatch, tmp_path: Path) -> None:
    """What they wrote over is dropped and counted, and said; nothing wrong is stored."""
    model, recorder = tokenwise(dim=5).to(device), replay.Recorder(monkeypatch)
    tight(recorder, monkeypatch)
    with pytest.raises(CaptureError, match=r"a replay has written over rows.*tap\.gate\(\)"):
        stored(model, tmp_path, device, recorder, 0)
    whole = {tuple(row) for i in range(ROUNDS) for row in _rows(model, i, device)}
    found = activations(tmp_path)
    assert {tuple(row) for row in found["layers.0"].rows.tolist()} <= whole
    store.verify(tmp_path)


def _rows(model: nn.Module, round_: int, device: torch.device) -> list[list[float]]:
    with torch.no_grad():
        return model.layers[0](model.embed(tokens(round_, device)[0])).flatten(0, 1).tolist()


def test_a_gate_for_more_than_there_is_room_for(tokenwise, device, monkeypatch, tmp_path: Path) -> None:
    model, recorder = tokenwise(dim=5).to(device), replay.Recorder(monkeypatch)
    tight(recorder, monkeypatch)
    shown = torch.full((B, T), 4, device=device)
    with ActivationStore(tmp_path) as kept, torch.no_grad(), capture(model, "layers.*", kept, resident=True) as tap:
        tap.gate()  # nothing is recorded yet: nothing to wait for
        model(shown)
        with recorder:
            model(shown)
        with pytest.raises(ArgumentError, match="forwards; expected at most 2; got 3"):
            tap.gate(3)


def vectors(dim: int, device: torch.device) -> Directions:
    """Three directions, calibrated."""
    g = torch.Generator().manual_seed(1)
    readers = nn.functional.normalize(torch.randn(3, dim, generator=g).double(), dim=1)
    scale = Calibration(torch.randn(3, generator=g).double(), torch.rand(3, generator=g).double() + 0.5, 1000, None)
    centre, one = torch.randn(dim, generator=g).double(), torch.ones(3).double()
    return Directions(("calm", "tense", "sad"), readers, readers.float(), centre, 2.0, one, calibration=scale)


def test_a_recorded_monitor_follows_the_requests_of_each_batch(tokenwise, device, monkeypatch) -> None:
    model = tokenwise(dim=5).to(device)
    watched = {f"layers.{i}": vectors(5, device) for i in range(2)}
    alarms = {"calm": Threshold(z=0.5, on="token")}
    shown, mask = torch.zeros(2, B, T, dtype=torch.long, device=device)
    found, recorder = [], replay.Recorder(monkeypatch)
    for recorded in (False, True):
        with torch.no_grad(), monitor(model, watched, alarms, window=4, resident=True) as watch:
            for i, names in enumerate((["a", "b", "c"], ["c", "a", "d"], ["b", "e", "a"], ["d", "c", "f"])):
                for memory, value in zip((shown, mask), tokens(i, device), strict=True):
                    memory.copy_(value)
                with watch.batch(requests=names):
                    if recorded and i == 1:
                        with recorder:
                            model(shown, attention_mask=mask)
                    elif recorded and i > 1:
                        recorder.replay()
                    else:
                        model(shown, attention_mask=mask)
        found.append(watch)
    eager, replayed = found
    assert set(replayed.scores["layers.0"]) == set("abcdef")
    for point in watched:
        for name, score in eager.scores[point].items():
            assert torch.equal(replayed.scores[point][name], score)
    assert replayed.alarms == eager.alarms
    assert eager.alarms
    assert replayed.ledger == eager.ledger


def test_recorded_steering_takes_the_requests_of_each_batch(tokenwise, device, monkeypatch) -> None:
    model = tokenwise(dim=5).to(device)
    plans = {
        "up": {"add": {"calm": 0.5}},
        "off": {"ablate": ["tense"]},
        "if": {"add": {"sad": 1.0}, "when": {"sad": 0.0}},
    }
    batches = (["up", None, "off"], ["if", "off", None], [None, "up", "up"], ["off", "if", None])
    shown = torch.zeros(B, T, dtype=torch.long, device=device)
    found, recorder = [], replay.Recorder(monkeypatch)
    for recorded in (False, True):
        outputs, out = [], None
        with torch.no_grad(), steer(model, {"layers.0": vectors(5, device)}, requests=plans) as steering:
            for i, names in enumerate(batches):
                shown.copy_(tokens(i, device)[0])
                with steering.batch(requests=names):
                    if recorded and i == 1:
                        with recorder:
                            out = model(shown)
                    elif recorded and i > 1:
                        recorder.replay()
                    else:
                        out = model(shown)
                outputs.append(out.clone())
        found.append(outputs)
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)
