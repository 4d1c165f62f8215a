"""Monitors whose state is on the device say what those on the host say: on the CPU, by the reference of every step."""

import pytest
import torch
from torch import Tensor, nn

from emocore import Calibration, Directions, Threshold, Tokens, monitor
from emocore.errors import ArgumentError, CaptureError

NAMES = ("calm", "tense", "sad")
ALARMS = {"calm": Threshold(z=0.8, on="token", release=0.5), "sad": Threshold(z=1.2, on="token")}


def vectors(dim: int, point: str, tokens: Tokens | None = None, k: int = 3) -> Directions:
    g = torch.Generator().manual_seed(len(point))
    readers = nn.functional.normalize(torch.randn(k, dim, generator=g).double(), dim=1)
    scale = Calibration(torch.randn(k, generator=g).double(), torch.rand(k, generator=g).double() + 0.5, 1000, tokens)
    one, centre = torch.ones(k).double(), torch.randn(dim, generator=g).double()
    return Directions(NAMES[:k], readers, readers.float(), centre, 1.0, one, point, calibration=scale)


def ids(b: int, t: int, seed: int) -> Tensor:
    return torch.randint(3, 64, (b, t), generator=torch.Generator().manual_seed(seed))


def both(model: nn.Module, watched, run, **options):
    """The same forwards watched on the device and on the host."""
    found = []
    for resident in (True, False):
        with torch.no_grad(), monitor(model, watched, ALARMS, window=4, resident=resident, **options) as watch:
            run(watch)
        assert watch._tap.resident == resident
        found.append(watch)
    mine, other = found
    assert mine.ledger == other.ledger
    key = lambda alarm: (alarm.hook_point, alarm.sequence, alarm.position, alarm.name)  # noqa: E731
    assert [key(a) for a in sorted(mine.alarms, key=key)] == [key(a) for a in sorted(other.alarms, key=key)]
    for name in ("scores", "peaks"):
        for point in watched:
            a, b = getattr(mine, name)[point], getattr(other, name)[point]
            assert a.keys() == b.keys()
            for sequence in a:
                torch.testing.assert_close(a[sequence], b[sequence], rtol=1e-5, atol=1e-5)
    for point in watched:
        a, b = mine.reference()[point], other.reference()[point]
        assert a.count == b.count
        for part in ("mean", "std"):
            torch.testing.assert_close(getattr(a, part), getattr(b, part), rtol=1e-4, atol=1e-5)
    return mine, other


@pytest.mark.parametrize("rule", [None, Tokens(skip=1)])
def test_requests_go_on_from_batch_to_batch(tokenwise, rule) -> None:
    model = tokenwise(dim=6)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def run(watch) -> None:
        for seed, names in enumerate((["a", "b", "c"], ["c", "a", "d"], ["b", "e", "a"])):
            with watch.batch(requests=names):
                model(ids(3, 5, seed) * mask, attention_mask=mask)

    watched = {f"layers.{i}": vectors(6, f"layers.{i}", rule) for i in range(2)}
    mine, _ = both(model, watched, run)
    assert mine.alarms
    assert set(mine.scores["layers.0"]) == set("abcde")


def test_generation_with_and_without_requests(tiny) -> None:
    model = tiny("llama")
    watched = {f"model.layers.{i}": vectors(16, f"model.layers.{i}") for i in range(3)}
    prompt, mask = ids(2, 4, 0), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])

    def run(watch) -> None:
        for _ in range(2):
            torch.manual_seed(0)
            model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=5, do_sample=True)
        with watch.batch(requests=["x", "y"]):
            model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=3, do_sample=False)

    mine, _ = both(model, watched, run)
    assert set(mine.scores["model.layers.0"]) == {"#0", "#1", "#2", "#3", "x", "y"}


def test_rows_with_nan_advance_nothing(tokenwise) -> None:
    model = tokenwise(dim=6)
    with torch.no_grad():
        model.embed.weight[9] = torch.nan
    shown = torch.tensor([[4, 9, 5, 6], [9, 9, 9, 9]])
    watched = {"layers.0": vectors(6, "layers.0")}
    mine, _ = both(model, watched, lambda watch: model(shown, attention_mask=torch.ones(2, 4)))
    assert mine.ledger["layers.0"].tokens.nonfinite == 5
    assert mine.ledger["layers.0"].rows.accumulated == 3


def test_a_forward_that_fails_advances_nothing() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)

        def forward(self, x: Tensor, fail: bool = False) -> Tensor:
            x = self.first(x)
            if fail:
                raise KeyError("no")
            return x

    model = Breaks()
    with monitor(model, vectors(6, "first"), resident=True) as watch:
        with watch.batch(requests=["a"]):
            model(torch.ones(1, 3, 6))
            before = watch.scores["a"]
            with pytest.raises(KeyError):
                model(torch.ones(1, 3, 6), fail=True)
            assert torch.equal(watch.scores["a"], before)
        assert watch.ledger["first"].tokens.selected == 3


def test_hook_points_scored_one_by_one_where_all_would_not_fit(tokenwise, monkeypatch) -> None:
    monkeypatch.setattr("emocore.onlooking.WORKSPACE", 0)
    model = tokenwise(dim=6)
    watched = {f"layers.{i}": vectors(6, f"layers.{i}") for i in range(2)}
    both(model, watched, lambda watch: model(ids(2, 5, 1)))


def test_more_sequences_than_slots(tokenwise) -> None:
    model = tokenwise(dim=6)
    with monitor(model, vectors(6, "layers.0"), resident=True, max_sequences=2) as watch:
        for name in "abc":
            with watch.batch(requests=[name]):
                model(ids(1, 4, 0))
        assert set(watch.scores) == {"b", "c"}
        with pytest.raises(ArgumentError, match="at most 2"), watch.batch(requests=list("xyz")):
            model(ids(3, 4, 0))


def test_what_cannot_be_watched_on_the_device_is_watched_on_the_host(tokenwise) -> None:
    model = tokenwise(dim=6)
    with pytest.raises(ArgumentError, match="resident"):
        monitor(model, vectors(6, "layers.0"), history=4, resident=True)
    unequal = {"layers.0": vectors(6, "layers.0"), "layers.1": vectors(6, "layers.1", k=2)}
    with pytest.raises(ArgumentError, match="resident"):
        monitor(model, unequal, resident=True)
    with monitor(model, unequal) as watch:
        model(ids(1, 4, 0))
    assert len(watch.scores["layers.1"]["#0"]) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, in its compiler
def test_compiled_whole(tokenwise) -> None:
    model = tokenwise(dim=6)
    watched = {"layers.0": vectors(6, "layers.0")}
    torch._dynamo.reset()
    found = []
    for compiled in (True, False):
        with torch.no_grad(), monitor(model, watched, ALARMS, resident=True) as watch:
            call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            for seed in range(2):
                with watch.batch(requests=["a", "b"]):
                    call(ids(2, 4, seed))
        found.append(watch)
    assert torch.equal(found[0].scores["layers.0"]["b"], found[1].scores["layers.0"]["b"])
    assert found[0].ledger == found[1].ledger
    with pytest.raises(CaptureError, match="compiled already"):
        monitor(torch.compile(model), {"_orig_mod.layers.0": watched["layers.0"]}, resident=True)
