"""Watch: what the host's monitor keeps, in fixed memory, and how names, alarms and sums are read off it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emocore import ops
from emocore.alarms import Alarm, Threshold
from emocore.calibration import Calibration, StreamReference
from emocore.directions import Directions
from emocore.errors import ArgumentError, CalibrationError, LedgerError, ShapeError
from emocore.monitoring import Monitor, Watcher, monitor
from emocore.sinks import Observed, Whose
from emocore.watching import Rule, Watch

POINTS = ("p", "q")
NEAR = 1e-5


@pytest.fixture(params=["reference", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.use(request.param):
        yield request.param


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def advance(watch: Watch, parts: Mapping[str, Tensor], marks: Tensor | None = None) -> None:
    """One forward of named sequences, each with scores [M, t, K], in rows that a gap of NaN parts."""
    points, _, k = next(iter(parts.values())).shape
    n = sum(z.shape[1] + 1 for z in parts.values())
    scores, first, at = torch.full((points, n, k), torch.nan), [], 0
    for z in parts.values():
        first.append(at)
        scores[:, at : at + z.shape[1]] = z
        at += z.shape[1] + 1
    slots, serials = watch.places(list(parts))
    kept = [z.shape[1] for z in parts.values()]
    marks = torch.ones(points, n, dtype=torch.int8) if marks is None else marks
    counts = (torch.tensor(count, dtype=torch.int32) for count in (first, kept))
    watch.step(*(t.to(watch.device) for t in (scores, *counts, marks, slots, serials)))


def watch_of(device: torch.device, k: int = 1, slots: int = 8, **options: Any) -> Watch:
    """A watch at "p" of direction 0 alone: above 4, until below 2."""
    given: dict[str, Any] = {"alpha": 0.5, "window": 2, **options}
    rules: Mapping[str, Sequence[Rule]] = given.pop("rules", {"p": [("a", 0, 0, 4.0, 2.0)]})
    return Watch(k, ["p"], rules, given.pop("alpha"), given.pop("window"), slots, device, **given)


def row(*values: float) -> Tensor:
    """Scores [1, t, 1]."""
    return torch.tensor(values)[None, :, None]


# --- as the host does


class Host:
    """The monitor of the host, fed scores instead of a model; its alarms read every statistic."""

    def __init__(self, k: int, alpha: float, window: int, limit: int) -> None:
        eye, zero, one = torch.eye(k).double(), torch.zeros(k).double(), torch.ones(k).double()
        stream = StreamReference(alpha, window, 9, torch.zeros(3, k), torch.ones(3, k), torch.zeros(3, 1, k))
        self.names = tuple(f"d{i}" for i in range(k))
        model = nn.ModuleDict({point: nn.Identity() for point in POINTS})
        vectors = Directions(
            self.names, eye, eye.float(), zero, 1.0, one, calibration=Calibration(zero, one, 9, None, stream)
        )
        rules = zip(self.names, ("token", "ema", "window"), (1.0, 0.3, 0.5), strict=False)
        alarms = {name: Threshold(z=z, on=on, release=z / 2) for name, on, z in rules}
        self.monitor: Monitor = monitor(
            model, dict.fromkeys(POINTS, vectors), alarms, alpha=alpha, window=window, max_sequences=limit
        )

    @property
    def watchers(self) -> dict[str, Watcher]:
        return self.monitor.watchers

    def advance(self, parts: Mapping[str, Tensor], marks: Tensor) -> None:
        for m, point in enumerate(POINTS):
            rows, sequence, at = [], [], 0
            for b, z in enumerate(parts.values()):
                there = marks[m, at : at + z.shape[1]] != 0
                rows.append(z[m, there])
                sequence += [b] * int(there.sum())
                at += z.shape[1] + 1
            which = torch.tensor(sequence, dtype=torch.long)
            whose = Whose(which, torch.arange(len(which)), len(parts), list(parts))
            self.watchers[point].observe(Observed(point, torch.cat(rows).double(), whose))


def ordered(alarms: Sequence[Alarm]) -> list[Alarm]:
    return sorted(alarms, key=lambda a: (a.hook_point, a.name, a.sequence, a.position, a.value))


@pytest.mark.parametrize(
    ("k", "alpha", "window", "sequences", "forwards"), [(1, 1.0, 1, 4, 9), (3, 0.125, 16, 4, 12), (171, 0.3, 2, 4, 4)]
)
def test_equals_the_monitor_of_the_host(
    k: int, alpha: float, window: int, sequences: int, forwards: int, device: torch.device
) -> None:
    host = Host(k, alpha, window, 100)
    rules = {point: watcher.rules for point, watcher in host.watchers.items()}
    watch = Watch(k, POINTS, rules, alpha, window, 101, device)
    draw = torch.Generator().manual_seed(k)
    found: list[Alarm] = []
    for step in range(forwards):
        names = [f"r{i}" for i in torch.randperm(sequences, generator=draw)[: sequences - 1].tolist()]
        sizes = torch.randint(0, 5 if k < 9 else 3, (len(names),), generator=draw).tolist()
        parts = {name: randn(2, sizes[i], k, seed=97 * step + i) for i, name in enumerate(names)}
        marks = (torch.rand(2, sum(sizes) + len(sizes), generator=draw) > 0.2).to(torch.int8)
        host.advance(parts, marks)
        advance(watch, parts, marks)
        if step % 3 == 2:
            found += watch.alarms()
    found += watch.alarms()
    expected = ordered(host.monitor.alarms)
    assert len(expected) > 3
    for one, other in zip(ordered(found), expected, strict=True):
        assert one == Alarm(other.name, other.sequence, other.position, one.value, other.level, other.hook_point)
        assert one.value == pytest.approx(other.value, abs=NEAR)
    for read in ("scores", "peaks"):
        torch.testing.assert_close(
            getattr(watch, read)(), reordered(watch, getattr(host.monitor, read)), **exactly(NEAR)
        )
    for point in POINTS:
        totals, reference = watch.totals(point), host.watchers[point].reference()
        assert totals.tokens == reference.count
        mean = totals.sums / totals.tokens
        torch.testing.assert_close(mean, reference.mean, **exactly(NEAR))
        std = (totals.squares / totals.tokens - mean**2).clamp_min(0).sqrt()
        torch.testing.assert_close(std, reference.std, **exactly(NEAR))
        assert totals.largest.shape == reference.largest.shape
        for one, other in zip(totals.largest.flatten(1), reference.largest.flatten(1), strict=True):
            torch.testing.assert_close(one.sort().values, other.sort().values, **exactly(NEAR))


def exactly(near: float) -> dict[str, float]:
    return {"rtol": 0, "atol": near}


def reordered(watch: Watch, found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The host's answer in the order of the watch's names."""
    return {point: {name: some[name] for name in watch.scores()[point]} for point, some in found.items()}


def test_forgotten_and_returning_sequences_are_the_hosts(device: torch.device) -> None:
    host = Host(2, 0.25, 3, 3)
    watch = Watch(2, POINTS, {p: w.rules for p, w in host.watchers.items()}, 0.25, 3, 4, device)
    draw = torch.Generator().manual_seed(0)
    for step in range(15):
        names = [f"r{i}" for i in torch.randperm(6, generator=draw)[:2].tolist()]
        parts = {name: randn(2, 1, 2, seed=step * 7 + i) for i, name in enumerate(names)}
        marks = torch.ones(2, 4, dtype=torch.int8)
        host.advance(parts, marks)
        advance(watch, parts, marks)
    tracks = host.watchers["p"].tracks
    assert tracks is not None
    assert watch.evicted == tracks.evicted > 5
    assert set(watch.scores()["p"]) == set(tracks.slots)
    torch.testing.assert_close(watch.scores(), reordered(watch, host.monitor.scores), **exactly(NEAR))
    expected = ordered(host.monitor.alarms)
    found = ordered(watch.alarms())
    assert [(a.name, a.sequence, a.position) for a in found] == [(a.name, a.sequence, a.position) for a in expected]
    assert {a.sequence for a in found} - set(tracks.slots)  # alarms of the forgotten keep their names


# --- names and slots


def test_slots_are_reused_from_the_longest_unseen(device: torch.device) -> None:
    watch = watch_of(device, slots=3)
    assert [watch.slot(name) for name in ("x", "y", "x")] == [(1, 1), (2, 2), (1, 1)]
    assert watch.slot("z") == (2, 3)  # y was seen before x
    assert watch.slot("y") == (1, 4)
    assert watch.evicted == 2
    slots, serials = watch.places(["y", "z"])
    assert (slots.tolist(), slots.dtype) == ([1, 2], torch.int32)
    assert (serials.tolist(), serials.dtype) == ([4, 3], torch.int64)


def test_a_slot_that_changes_hands_begins_from_nothing(device: torch.device) -> None:
    watch = watch_of(device, slots=2)
    advance(watch, {"x": row(9.0, 9.0, 9.0)})
    advance(watch, {"y": row(8.0)})
    assert list(watch.scores()["p"]) == ["y"]
    assert watch.scores()["p"]["y"].tolist() == watch.peaks()["p"]["y"].tolist() == [4.0]
    assert watch.totals("p").largest.flatten().tolist() == [8.0, 4.0, 8.0]
    assert [(a.sequence, a.position) for a in watch.alarms()] == [("x", 0), ("y", 0)]  # x was active, y was not


def test_a_sequence_without_tokens_is_not_there(device: torch.device) -> None:
    watch = watch_of(device, slots=3)
    watch.slot("never")
    advance(watch, {"x": row(1.0), "none": row()})
    assert list(watch.scores()["p"]) == ["x"]
    assert watch.totals("p").largest.shape == (3, 1, 1)
    advance(watch, {"other": row(5.0)}, torch.zeros(1, 2, dtype=torch.int8))
    assert watch.scores()["p"] == {}  # nor is x, whose slot it took


def test_a_forward_that_does_not_count_moves_nothing_and_a_new_sequence_still_begins(device: torch.device) -> None:
    counts, number = torch.ones(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    watch = watch_of(device, slots=2, whole=counts, forward=number)
    advance(watch, {"x": row(7.0, 7.0)})
    counts.zero_()
    advance(watch, {"y": row(5.0, 1.0)})
    assert watch.scores()["p"] == {}
    counts.fill_(1)
    number.fill_(41)
    advance(watch, {"y": row(6.0)})
    assert watch.scores()["p"]["y"].tolist() == [3.0]
    assert number.item() == 41  # the capture's own count
    assert watch.state.records[:2, 0].tolist() == [0, 41]
    assert [(a.sequence, a.position, a.value) for a in watch.alarms()] == [("x", 0, 7.0), ("y", 0, 6.0)]


def test_a_batch_must_fit_and_name_each_sequence_once(device: torch.device) -> None:
    watch = watch_of(device, slots=3)
    with pytest.raises(ArgumentError, match="at most 2 names, none twice; got 3, 3 of them different"):
        watch.places(["x", "y", "z"])
    with pytest.raises(ArgumentError, match="got 2, 1 of them different"):
        watch.places(["x", "x"])
    assert watch.slot("x") == (1, 1)  # a batch that was refused took no slot


# --- alarms


def test_hysteresis_joins_what_stays_above_the_release(device: torch.device) -> None:
    watch = watch_of(device)
    for value in (5.0, 3.0, 5.0, 2.0, 5.0, 1.9, 4.0, 4.1):
        advance(watch, {"r": row(value)})
    assert watch.alarms() == [Alarm("a", "r", 0, 5.0, 4.0, "p"), Alarm("a", "r", 7, pytest.approx(4.1), 4.0, "p")]
    assert watch.alarms() == []


def test_alarms_come_in_one_order_however_they_were_recorded(device: torch.device) -> None:
    rules = {"p": [("a", 0, 0, 0.5, 0.4), ("b", 0, 1, 0.5, 0.4)], "q": [("c", 0, 1, 0.5, 0.4)]}
    watch = Watch(2, ["p", "q"], rules, 0.5, 2, 8, device)
    ones, zeros = torch.ones(2, 1, 2), torch.zeros(2, 1, 2)
    advance(watch, {"x": torch.cat([ones, zeros, ones], 1), "y": ones})
    advance(watch, {"y": torch.cat([zeros, ones], 1)})
    n = int(watch.state.raised)
    for table in (watch.state.records, watch.state.values):
        table[:n] = table[:n].flip(0)
    found = [(a.hook_point, a.sequence, a.position, a.name) for a in watch.alarms()]
    first = [("p", "x", 0, "a"), ("p", "x", 0, "b"), ("p", "x", 2, "a"), ("p", "x", 2, "b"), ("p", "y", 0, "a")]
    first += [("p", "y", 0, "b"), ("q", "x", 0, "c"), ("q", "x", 2, "c"), ("q", "y", 0, "c")]
    assert found == [*first, ("p", "y", 2, "a"), ("p", "y", 2, "b"), ("q", "y", 2, "c")]


def test_more_alarms_than_fit_are_an_error_that_loses_none_of_the_rest(device: torch.device) -> None:
    watch = watch_of(device, record_capacity=3)
    advance(watch, {"r": row(*[5.0, 1.0] * 5)})
    with pytest.raises(LedgerError, match=r"2 were not recorded; expected at most 3 between two readings; got 5\."):
        watch.alarms()
    assert [a.position for a in watch.alarms()] == [0, 2, 4]
    advance(watch, {"r": row(*[5.0, 1.0] * 3)})
    assert [a.position for a in watch.alarms()] == [10, 12, 14]  # there is room again


def test_names_of_the_forgotten_are_kept_until_their_alarms_are_read(device: torch.device) -> None:
    watch = watch_of(device, slots=2)
    for i in range(9):
        advance(watch, {f"r{i}": row(5.0)})
    assert len(watch._names) == 9
    assert [a.sequence for a in watch.alarms()] == [f"r{i}" for i in range(9)]
    assert list(watch._names.values()) == ["r8"]


def test_names_never_read_are_bounded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emocore.watching.PENDING", 4)
    watch = watch_of(device, slots=2, record_capacity=6)
    for i in range(20):
        advance(watch, {f"r{i}": row(5.0)})
        assert len(watch._names) <= 6
    assert [a.sequence for a in watch.alarms()] == [f"r{i}" for i in range(20)]
    quiet = watch_of(device, slots=2, rules={})
    for i in range(20):
        quiet.slot(f"r{i}")
    assert len(quiet._names) == 1


# --- memory and arguments


def test_memory_is_what_the_docstring_says(device: torch.device) -> None:
    for sums, more in ((True, 48), (False, 0)):
        watch = Watch(40, ["p", "q"], {"q": [("a", 0, 1, 4.0, 2.0)]}, 0.5, 16, 32, device, sums=sums)
        by_slot = [t for t in watch.state if isinstance(t, Tensor) and 32 in t.shape and t.shape[-1] == 40]
        assert sum(t.nbytes for t in by_slot) == (25 + 4 * 16 + more) * 40 * 32 * 2


def test_without_rules_and_sums_there_is_neither(device: torch.device) -> None:
    watch = watch_of(device, rules={}, sums=False)
    advance(watch, {"r": row(99.0, 1.0)})
    assert watch.alarms() == []
    assert watch.scores()["p"]["r"].tolist() == [25.25]
    with pytest.raises(CalibrationError, match="no sums are kept"):
        watch.totals("p")


def test_made_in_inference_mode_and_used_outside(device: torch.device) -> None:
    with torch.inference_mode():
        watch = watch_of(device)
        advance(watch, {"r": row(5.0)})
    advance(watch, {"r": row(7.0)})
    assert watch.scores()["p"]["r"].tolist() == [4.75]
    assert len(watch.alarms()) == 1


def test_arguments_without_a_meaning_are_refused(device: torch.device) -> None:
    with pytest.raises(ArgumentError, match="slots >= 2"):
        watch_of(device, slots=1)
    with pytest.raises(ArgumentError, match="record_capacity >= 1"):
        watch_of(device, record_capacity=0)
    with pytest.raises(ArgumentError, match=r"rules at 'p'; expected one a direction; got \[0, 0\]"):
        watch_of(device, rules={"p": [("a", 0, 0, 4.0, 2.0), ("b", 1, 0, 4.0, 2.0)]})
    with pytest.raises(ArgumentError, match=r"hook points of \('p',\); got \['q'\]"):
        watch_of(device, rules={"q": []})
    watch = watch_of(device)
    with pytest.raises(ShapeError, match=r"scores, marks; expected \[1, n, 1\], \[1, n\]"):
        advance(watch, {"r": torch.zeros(1, 3, 2)})
    with pytest.raises(ShapeError, match="scores, marks"):
        advance(watch, {"r": row(1.0)}, torch.ones(1, 1, dtype=torch.int8))
