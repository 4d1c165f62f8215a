"""Alarms: thresholds that hold their rate, and an alarm for every rise of a watched direction."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emocore.alarms import Alarm, Threshold
from emocore.calibration import Calibration, StreamReference
from emocore.directions import Directions
from emocore.errors import ArgumentError, CalibrationError, LabelError
from emocore.monitoring import Monitor, monitor

K = 2
DEFAULTS = (1 / 8, 16)  # alpha, window


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Toy(nn.Module):
    """Its hidden state is its input: z scores can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def stream_of(largest: Tensor, alpha: float = 1 / 8, window: int = 16) -> StreamReference:
    """A reference whose statistics all reached `largest` [S, K] over its sequences."""
    mean, std = torch.tensor([[0.0], [0.5], [1.0]]).repeat(1, K), torch.tensor([[1.0], [2.0], [3.0]]).repeat(1, K)
    return StreamReference(alpha, window, 1000, mean.double(), std.double(), largest.expand(3, -1, -1))


def vectors(stream: StreamReference | None = None) -> Directions:
    """Directions "a", "b" along the axes with z = x."""
    eye, zero, one = torch.eye(K).double(), torch.zeros(K).double(), torch.ones(K).double()
    scale = Calibration(zero, one, 1000, None, stream)
    return Directions(("a", "b"), eye, eye.float(), zero, 1.0, one, "block", calibration=scale)


def watched(z: list[float], threshold: Threshold, stream: StreamReference | None = None, **options: Any) -> Monitor:
    """Monitor of "a" over scores z, one forward a token."""
    model = Toy()
    with monitor(model, vectors(stream), alarms={"a": threshold}, **options) as watch:
        for value in z:
            with watch.batch(requests=["r"]):
                model(torch.tensor([[[value, 99.0]]]).double())
    watch.ledger["block"].check()
    assert watch.ledger["block"].rows.accumulated == len(z)
    return watch


# --- levels


def test_z_levels_are_in_standard_deviations_of_their_own_statistic() -> None:
    calibrated = vectors(stream_of(randn(9, K)))
    for on, level, release in (("token", 4.0, 2.0), ("ema", 8.5, 4.5), ("window", 13.0, 7.0)):
        assert Threshold(z=4.0, on=on, release=2.0).levels(calibrated, "a", *DEFAULTS) == (level, release)
        assert Threshold(z=4.0, on=on).levels(calibrated, "a", *DEFAULTS) == (level, level)


def test_z_on_tokens_needs_no_stream() -> None:
    assert Threshold(z=4.0, on="token").levels(vectors(), "b", *DEFAULTS) == (4.0, 4.0)


def test_fpr_level_by_hand() -> None:
    # 300 sequences reach 1 .. 300; floor(.01 x 301) = 3: the fresh one is among the 3 highest of 301 in 3 of 301
    calibrated = vectors(stream_of(torch.arange(1.0, 301.0)[:, None].repeat(1, K)))
    assert Threshold(fpr=0.01).levels(calibrated, "a", *DEFAULTS) == (298.0, 298.0)
    assert Threshold(fpr=0.01, release=0.1).levels(calibrated, "a", *DEFAULTS) == (298.0, 271.0)


@pytest.mark.parametrize("fpr", [0.5, 0.3, 0.1, 0.05, 0.01])
@pytest.mark.parametrize("extra", [0, 1, 7, 100])
def test_the_reference_itself_fires_at_most_at_its_rate(fpr: float, extra: int) -> None:
    largest = randn(round(3 / fpr) + extra, K)
    level, _ = Threshold(fpr=fpr, on="token").levels(vectors(stream_of(largest)), "b", *DEFAULTS)
    fired = int((largest[:, 1] > level).sum())
    assert fired <= fpr * len(largest)
    assert fired >= fpr * len(largest) - 2  # and not far below


def test_ties_in_the_reference_never_raise_the_rate() -> None:
    level, _ = Threshold(fpr=0.1).levels(vectors(stream_of(torch.ones(40, K))), "a", *DEFAULTS)
    assert level == 1.0  # above it: none of 40


def test_a_fresh_sequence_fires_with_at_most_the_asked_probability() -> None:
    rounds, n, fpr = 4000, 30, 0.1
    uniform = torch.rand(rounds, n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rule = Threshold(fpr=fpr)
    levels = [rule.levels(vectors(stream_of(u.repeat(1, K))), "a", *DEFAULTS)[0] for u in uniform]
    rate = 1 - sum(levels) / rounds  # of a fresh uniform draw above the level
    # the third highest of 30: mean 1 - 3/31, std sqrt(3 x 28 / (31^2 x 32)) = 0.052 a round; 4 sigma
    assert rate == pytest.approx(3 / 31, abs=4 * 0.052 / rounds**0.5)
    assert rate < fpr


@pytest.mark.parametrize(("fpr", "need"), [(0.01, 300), (0.1, 30), (0.001, 3000), (0.3, 10), (3 / 47, 47)])
def test_a_reference_too_small_for_the_rate_is_an_error_with_the_way_out(fpr: float, need: int) -> None:
    enough = vectors(stream_of(randn(need, K)))
    Threshold(fpr=fpr).levels(enough, "a", *DEFAULTS)
    short = vectors(stream_of(randn(need - 1, K)))
    said = rf"too small for fpr={fpr}; expected at least {need} .*; got {need - 1}\. .*ask for fpr >= 3/{need - 1}\."
    with pytest.raises(CalibrationError, match=said):
        Threshold(fpr=fpr).levels(short, "a", *DEFAULTS)


def test_levels_need_a_reference_of_the_same_statistic() -> None:
    for rule in (Threshold(fpr=0.1), Threshold(z=2.0), Threshold(fpr=0.1, on="token")):
        with pytest.raises(CalibrationError, match=r"no reference of its own.*watch\.reference"):
            rule.levels(vectors(), "a", *DEFAULTS)
    other = vectors(stream_of(randn(30, K), alpha=0.5, window=4))
    with pytest.raises(CalibrationError, match=r"alpha: not that of the reference; expected 0\.5; got 0\.125"):
        Threshold(z=2.0, on="ema").levels(other, "a", *DEFAULTS)
    with pytest.raises(CalibrationError, match="window: not that of the reference; expected 4; got 16"):
        Threshold(fpr=0.1, on="window").levels(other, "a", *DEFAULTS)
    Threshold(fpr=0.1, on="token").levels(other, "a", *DEFAULTS)  # a token score knows neither


def test_unknown_alarms_are_refused_at_once() -> None:
    with pytest.raises(LabelError, match="direction 'zz': unknown"):
        monitor(Toy(), vectors(), alarms={"zz": Threshold(z=4.0, on="token")})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one of z and fpr"),
        ({"z": 4.0, "fpr": 0.1}, "exactly one of z and fpr"),
        ({"z": float("nan")}, "z; expected a finite"),
        ({"fpr": 0.0}, "fpr; expected a fraction"),
        ({"fpr": 1.0}, "fpr; expected a fraction"),
        ({"z": 4.0, "on": "mean"}, "'token' or 'ema' or 'window'"),
        ({"z": 4.0, "release": 5.0}, "release; expected at most z = 4.0; got 5.0"),
        ({"fpr": 0.1, "release": 0.01}, r"release; expected an fpr from 0\.1"),
    ],
)
def test_thresholds_without_a_meaning_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Threshold(**options)


# --- alarms


def test_an_alarm_rises_once_and_says_where() -> None:
    watch = watched([0.0, 5.0, 6.0, 1.0, 7.0], Threshold(z=4.0, on="token"))
    assert watch.alarms == [Alarm("a", "r", 1, 5.0, 4.0, "block"), Alarm("a", "r", 4, 7.0, 4.0, "block")]
    assert watch.levels == {"a": 4.0}


def test_hysteresis_joins_what_stays_above_the_release() -> None:
    z = [5.0, 3.0, 5.0, 2.0, 5.0, 1.9, 5.0]
    apart = watched(z, Threshold(z=4.0, on="token"))
    joined = watched(z, Threshold(z=4.0, on="token", release=2.0))
    assert [alarm.position for alarm in apart.alarms] == [0, 2, 4, 6]
    assert [alarm.position for alarm in joined.alarms] == [0, 6]


def test_at_the_level_is_not_above_it() -> None:
    assert watched([4.0, 4.0], Threshold(z=4.0, on="token")).alarms == []
    model = Toy()
    with monitor(model, vectors(), alarms={"a": Threshold(z=4.0, on="token")}) as watch:
        model(torch.tensor([[[4.0, 0.0], [5.0, 0.0]]]).double())
    assert [alarm.position for alarm in watch.alarms] == [1]


def test_an_alarm_does_not_depend_on_how_forwards_cut_the_sequence() -> None:
    z, model = randn(120, K) * 3, Toy()
    rules = {"a": Threshold(z=3.0, on="token", release=-1.0), "b": Threshold(z=0.5, on="ema", release=0.1)}
    found = []
    for pieces in ([120], [1] * 120, [7, 100, 13]):
        with monitor(model, vectors(stream_of(randn(9, K))), alarms=rules) as watch:
            for part in z.split(pieces):
                with watch.batch(requests=["r"]):
                    model(part[None])
        watch.ledger["block"].check()
        found.append(sorted((a.name, a.position, round(a.value, 9)) for a in watch.alarms))
    assert found[0] == found[1] == found[2]
    assert {name for name, *_ in found[0]} == {"a", "b"}


@pytest.mark.parametrize(("on", "position"), [("token", 3), ("window", 5), ("ema", 6)])
def test_each_statistic_fires_in_its_own_time(on: str, position: int) -> None:
    # a token of 8 is above 4 at once, the mean of 4 with the third, an EMA of 1/4 above 5 when .75^m < 3/8, m = 4
    stream = stream_of(randn(9, K), alpha=0.25, window=4)
    level = {"token": 4.0, "ema": (5.0 - 0.5) / 2, "window": (4.0 - 1.0) / 3}[on]
    z = [0.0, 0.0, 0.0] + [8.0] * 5
    watch = watched(z, Threshold(z=level, on=on), stream, alpha=0.25, window=4)
    assert [alarm.position for alarm in watch.alarms] == [position]


def test_only_the_watch_list_raises_alarms() -> None:
    watch = watched([0.0, 0.0], Threshold(z=4.0, on="token"))  # "b" scores 99 throughout
    assert watch.alarms == []
    assert watch.scores["r"][1] > 20


def test_sequences_alarm_for_themselves() -> None:
    model = Toy()
    x = torch.zeros(3, 4, K).double()
    x[0, 1, 0] = x[2, 2:, 0] = 9.0
    with monitor(model, vectors(), alarms={"a": Threshold(z=4.0, on="token")}) as watch:
        with watch.batch(requests=["x", "y", "z"]):
            model(x)
        with watch.batch(requests=["z", "y"]):
            model(x[[2, 0]])  # z goes on below, then above; y for the first time
    assert [(a.sequence, a.position) for a in watch.alarms] == [("x", 1), ("z", 2), ("z", 6), ("y", 5)]
    watch.ledger["block"].check()


def test_false_alarms_on_fresh_streams_keep_their_rate() -> None:
    """A whole road on correlated neutral streams: scale, reference, thresholds, fresh streams."""
    model, n, tokens = Toy(), 400, 60

    def streams(seed: int) -> Tensor:
        noise = randn(n, tokens, K, seed=seed)
        return 0.6 * noise + 0.8 * noise.roll(1, 1) + 3.0  # neighbours correlate; std 1 about 3

    from emocore.moments import Moments

    scale = Moments(covariance=True)
    scale.update(streams(1))
    calibrated = vectors().calibrate(scale)
    with monitor(model, calibrated) as watch:
        model(streams(2))
    calibrated = calibrated.calibrate(watch.reference())
    for on in ("token", "ema", "window"):
        with monitor(model, calibrated, alarms={name: Threshold(fpr=0.05, on=on) for name in "ab"}) as watch:
            model(streams(3))
        watch.ledger["block"].check()
        for name in "ab":
            fired = len({a.sequence for a in watch.alarms if a.name == name})
            # 20 of 400 expected; binomial std 4.4 for the fresh ones, as much for the level: 4 sigma of both
            assert abs(fired - 20) < 4 * 4.4 * 2**0.5
