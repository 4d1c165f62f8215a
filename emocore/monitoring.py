"""Monitoring: a running, calibrated score per sequence and direction, with alarms on a watch list."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capturing import Tap, capture
from .directions import Directions, StreamReference
from .errors import ArgumentError, CalibrationError
from .forwards import Batch, Observed
from .hookpoints import check_model, resolve
from .ledger import Ledger
from .tokens import Tokens

STATISTICS = ("token", "ema", "window")
CHUNK = 512  # tokens whose EMA is one triangular product


@dataclass(frozen=True)
class Threshold:
    """When an alarm fires: at `z` standard deviations, or so that a fraction `fpr` of neutral sequences would fire.

    `on` names the statistic: the "token" score, its "ema", or the mean of a "window". `release` is the value below which an
    alarm ends, in the unit of the threshold; by default the threshold itself. Raises ArgumentError.

    >>> Threshold(z=4, on="token")
    Threshold(z=4, fpr=None, on='token', release=None)
    """

    z: float | None = None
    fpr: float | None = None
    on: str = "ema"
    release: float | None = None

    def __post_init__(self) -> None:
        if (self.z is None) == (self.fpr is None):
            raise ArgumentError("Threshold", expected="exactly one of z and fpr", got=(self.z, self.fpr))
        if self.on not in STATISTICS:
            raise ArgumentError("on", expected=" or ".join(map(repr, STATISTICS)), got=repr(self.on))
        if self.fpr is not None and not 0 < self.fpr < 1:
            raise ArgumentError("fpr", expected="a fraction of sequences in (0, 1)", got=self.fpr)

    def level(self, vectors: Directions, name: str) -> float:
        """The threshold on the statistic itself; raises CalibrationError where the reference cannot support it."""
        (at,) = vectors.index([name])
        stream = vectors.calibration.stream if vectors.calibration else None
        if self.z is not None and self.on == "token":
            return self.z
        if stream is None:
            raise CalibrationError(
                f"alarm {name!r}: {self.on} has no reference of its own",
                way_out="Calibrate with a StreamReference: read neutral text with a monitor, then calibrate(watch.reference()).",
            )
        if self.z is not None:
            if self.on == "window":
                raise CalibrationError("window: only fpr thresholds", way_out="Give Threshold(fpr=..., on='window').")
            return float(stream.ema_mean[at] + self.z * stream.ema_std[at])
        assert self.fpr is not None
        need = math.ceil(3 / self.fpr)  # the rule of three: fewer would not see such a rate
        if stream.sequences < need:
            raise CalibrationError(
                f"alarm {name!r}: the reference is too small for fpr={self.fpr}",
                expected=f"at least {need} neutral sequences",
                got=stream.sequences,
                way_out=f"Read more neutral text, or ask for fpr >= {3 / max(stream.sequences, 1):.3g}.",
            )
        largest = getattr(stream, f"{self.on}_max")[:, at].sort(descending=True).values
        return float(largest[math.floor(self.fpr * stream.sequences)])


@dataclass(frozen=True)
class Alarm:
    """One alarm: direction `name` of `sequence` rose above `level` at token `position` with `value`."""

    name: str
    sequence: str
    position: int
    value: float
    level: float
    hook_point: str


class Track:
    """Running state of one sequence at one hook point: EMA, window, largest values [K], tokens read."""

    def __init__(self, k: int, window: int, history: int) -> None:
        self.tokens = 0
        self.ema = torch.zeros(k, dtype=torch.float64)
        self.recent = torch.zeros(0, k, dtype=torch.float64)  # the last window - 1 scores
        self.max = {name: torch.full((k,), -torch.inf, dtype=torch.float64) for name in STATISTICS}
        self.active: set[str] = set()
        self.window, self._keep = window, history
        self.history: list[Tensor] = []

    def step(self, z: Tensor, alpha: float) -> dict[str, Tensor]:
        """Advance over scores z [n, K] in order; returns every statistic at every token, {name: [n, K]}."""
        self.tokens += len(z)
        ema = torch.cat([self._advance(part, alpha) for part in z.split(CHUNK)])
        run = torch.cat([self.recent, z])
        sums = torch.cat([run.new_zeros(1, run.shape[1]), run.cumsum(0)])
        last = torch.arange(len(self.recent) + 1, len(run) + 1)
        first = (last - self.window).clamp_min(0)
        mean = (sums[last] - sums[first]) / (last - first).unsqueeze(1)
        self.recent = run[max(len(run) - self.window + 1, 0) :]
        if self._keep:
            self.history = [*self.history, z][-self._keep :]
        values = {"token": z, "ema": ema, "window": mean}
        for name, value in values.items():
            self.max[name] = torch.maximum(self.max[name], value.amax(0))
        return values

    def _advance(self, z: Tensor, alpha: float) -> Tensor:
        """y_t = (1 - a) y_(t-1) + a z_t for a run of tokens, as one product with the decay's lower triangle."""
        t = torch.arange(len(z), dtype=torch.float64)
        decay = alpha * ((1 - alpha) ** (t[:, None] - t[None, :]).clamp_min(0)).tril()
        ema = decay @ z + ((1 - alpha) ** (t + 1))[:, None] * self.ema
        self.ema = ema[-1].clone()
        return ema


class Watcher:
    """Scores the rows of one hook point and follows every sequence; the sink that a monitor captures with."""

    def __init__(self, monitor: Monitor, vectors: Directions) -> None:
        self.monitor, self.vectors = monitor, vectors
        self.ledger = Ledger()
        self.levels = {name: rule.level(vectors, name) for name, rule in monitor.alarm_rules.items()}
        self.tracks: OrderedDict[str, Track] = OrderedDict()
        self._slots: dict[int, str] = {}
        self._started = 0
        k = len(vectors)
        self.ema_sum = torch.zeros(k, dtype=torch.float64)
        self.ema_square = torch.zeros(k, dtype=torch.float64)
        self.ema_count = 0

    def observe(self, observed: Observed) -> None:
        """Score the rows of one forward and advance their sequences."""
        if observed.requests is not None and len(observed.requests) != observed.sequences:
            raise ArgumentError(
                "requests", expected=f"{observed.sequences} ids, one a sequence", got=len(observed.requests)
            )
        z = self.vectors.score(observed.rows, kind="z").double().cpu()
        for slot in observed.sequence.unique().tolist():
            rows = observed.sequence == slot
            rank = observed.rank[rows]
            name = self._sequence(slot, int(rank[0]), observed.requests)
            self._follow(name, self.tracks[name], z[rows], rank)

    def _sequence(self, slot: int, rank: int, requests: Sequence[str] | None) -> str:
        """Whose rows these are: the request's, else row `slot` of the batch, which begins anew at rank 0."""
        if requests is not None:
            name = str(requests[slot])
        elif rank == 0 or slot not in self._slots:
            name = self._slots[slot] = f"#{self._started}"
            self._started += 1
        else:
            name = self._slots[slot]
        if name not in self.tracks:
            self.tracks[name] = Track(len(self.vectors), self.monitor.window, self.monitor.history)
            if len(self.tracks) > self.monitor.max_sequences:
                self.tracks.popitem(last=False)
        self.tracks.move_to_end(name)
        return name

    def _follow(self, sequence: str, track: Track, z: Tensor, rank: Tensor) -> None:
        before = track.tokens
        values = track.step(z, self.monitor.alpha)
        ema = values["ema"]
        # not in place: a monitor may be made inside inference_mode and updated outside
        self.ema_sum = self.ema_sum + ema.sum(0)
        self.ema_square = self.ema_square + (ema * ema).sum(0)
        self.ema_count += len(ema)
        for name, rule in self.monitor.alarm_rules.items():
            (k,) = self.vectors.index([name])
            level = self.levels[name]
            release = level if rule.release is None else min(rule.release, level)
            for i, value in enumerate(values[rule.on][:, k].tolist()):
                if name in track.active:
                    if value < release:
                        track.active.discard(name)
                elif value > level:
                    track.active.add(name)
                    self.monitor.alarms.append(
                        Alarm(name, sequence, before + i, value, level, self.vectors.hook_point or "")
                    )

    def reference(self) -> StreamReference:
        """What the statistics did over every sequence watched, for calibrating thresholds."""
        if not self.ema_count:
            raise CalibrationError("reference: no token was watched", way_out="Run neutral text inside the monitor.")
        mean = self.ema_sum / self.ema_count
        var = (self.ema_square / self.ema_count - mean**2).clamp_min(0)

        def largest(name: str) -> Tensor:
            return torch.stack([track.max[name] for track in self.tracks.values()])

        return StreamReference(
            self.monitor.alpha,
            self.monitor.window,
            mean,
            var.sqrt(),
            largest("token"),
            largest("ema"),
            largest("window"),
        )


class Monitor:
    """An open monitor: `alarms` so far, `scores` of every sequence, `ledger`. Made by `monitor`."""

    def __init__(
        self,
        model: nn.Module,
        vectors: Directions | Mapping[str, Directions],
        alarms: Mapping[str, Threshold],
        alpha: float,
        window: int,
        history: int,
        max_sequences: int,
    ) -> None:
        if not 0 < alpha <= 1 or window < 1:
            raise ArgumentError("alpha, window", expected="alpha in (0, 1], window >= 1", got=(alpha, window))
        self.alpha, self.window, self.history, self.max_sequences = alpha, window, history, max_sequences
        self.alarm_rules = dict(alarms)
        self.alarms: list[Alarm] = []
        self.single = isinstance(vectors, Directions)
        several = {vectors.hook_point: vectors} if isinstance(vectors, Directions) else dict(vectors)
        self.watchers: dict[str, Watcher] = {}
        for name, directions in several.items():
            if name is None:
                raise ArgumentError("vectors: they name no hook point", way_out="Give {hook point: vectors}.")
            check_model(model, directions.provenance.get("model"), f"vectors at {name!r}")
            directions._calibrated(Tokens())
            self._check_stream(directions)
            (found,) = resolve(model, name)
            self.watchers[found] = Watcher(self, directions)
        self._tap: Tap = capture(model, dict(self.watchers))

    def _check_stream(self, vectors: Directions) -> None:
        stream = vectors.calibration.stream if vectors.calibration else None
        if stream is not None and (stream.alpha, stream.window) != (self.alpha, self.window):
            raise CalibrationError(
                "alpha, window: not those the reference was read with",
                expected=(stream.alpha, stream.window),
                got=(self.alpha, self.window),
            )

    @contextlib.contextmanager
    def batch(
        self, requests: Sequence[str] | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Iterator[Batch]:
        """The forwards inside belong to the named requests, whose state goes on from batch to batch."""
        with self._tap.batch(requests=requests, mask=mask, cu_seqlens=cu_seqlens) as batch:
            yield batch

    @property
    def scores(self) -> Any:
        """{sequence: {"ema", "max"}} of [K] z scores at the last token, by hook point where several are watched."""
        found = {
            name: {s: {"ema": t.ema.clone(), "max": t.max["ema"].clone()} for s, t in watcher.tracks.items()}
            for name, watcher in self.watchers.items()
        }
        return next(iter(found.values())) if self.single else found

    @property
    def ledger(self) -> dict[str, Any]:
        """Ledger by hook point."""
        return self._tap.ledger

    def reference(self) -> Any:
        """StreamReference of all that was watched, by hook point where several are: what `calibrate` takes."""
        found = {name: watcher.reference() for name, watcher in self.watchers.items()}
        return next(iter(found.values())) if self.single else found

    def trace(self, sequence: str, hook_point: str | None = None) -> Tensor:
        """z scores [n, K] of the last `history` steps of one sequence; needs monitor(history=...)."""
        watcher = self.watchers[hook_point] if hook_point else next(iter(self.watchers.values()))
        if sequence not in watcher.tracks or not watcher.tracks[sequence].history:
            raise ArgumentError(
                "trace: nothing kept of this sequence", got=sequence, way_out="Give monitor(history=...)."
            )
        return torch.cat(watcher.tracks[sequence].history)

    def __enter__(self) -> Monitor:
        self._tap.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tap.__exit__(*exception)


def monitor(
    model: nn.Module,
    vectors: Directions | Mapping[str, Directions],
    alarms: Mapping[str, Threshold] | None = None,
    *,
    alpha: float = 1 / 8,
    window: int = 16,
    history: int = 0,
    max_sequences: int = 65_536,
) -> Monitor:
    """Score every real token while the `with` block runs the model, and raise alarms on a watch list.

    Per sequence and direction it keeps the EMA y = (1 - alpha) y + alpha z, the mean of the last `window` scores, and their
    largest values; `history` keeps the scores of that many forwards too. Without `watch.batch(requests=...)` a row of the
    batch is a sequence, and begins anew where its first token is shown. Beyond `max_sequences` the longest unseen are
    forgotten. The vectors must be calibrated on token rows. Raises CalibrationError, LabelError, ArgumentError.
    """
    return Monitor(model, vectors, alarms or {}, alpha, window, history, max_sequences)
