"""Monitoring: a running, calibrated score per sequence and direction, with alarms on a watch list."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .alarms import Alarm as Alarm
from .alarms import Threshold as Threshold
from .batches import Batch
from .calibration import STATISTICS, StreamReference
from .capturing import Tap, capture
from .directions import Directions, placed
from .errors import ArgumentError, CalibrationError
from .ledger import Ledger
from .onlooking import Onlooker
from .sinks import Observed
from .tokens import Spans, Tokens
from .tracking import Tracks
from .watching import Watch

MOST_SEQUENCES, MOST_RESIDENT = 65_536, 1_023  # followed at once, on the host and on a device


class Rule(NamedTuple):
    """An alarm rule at one hook point: statistic and direction by place, and the levels of the one for the other."""

    name: str
    statistic: int
    direction: int
    level: float
    release: float


class Watcher:
    """Scores the rows of one hook point and follows every sequence; the sink that a monitor captures with."""

    def __init__(self, monitor: Monitor, hook_point: str, vectors: Directions) -> None:
        self.monitor, self.hook_point, self.vectors = monitor, hook_point, vectors
        self.onlooker: Onlooker | None = None  # where the monitor's state is on the device
        self.ledger = Ledger()
        self.rules = [
            Rule(
                name,
                STATISTICS.index(threshold.on),
                vectors.index(name)[0],
                *threshold.levels(vectors, name, monitor.alpha, monitor.window),
            )
            for name, threshold in monitor.thresholds.items()
        ]
        self._rows: dict[int, tuple[str, int]] = {}  # of the batch: the sequence there, and its last rank
        self._started = 0
        self._count, self._sum, self._square = 0, torch.zeros(()), torch.zeros(())
        self.tracks: Tracks | None = None

    def observe(self, observed: Observed) -> None:
        """Score the rows of one forward and advance their sequences."""
        if not len(observed.rows):
            return
        if self.tracks is None:  # not in __init__, which may run in inference mode
            m = self.monitor
            k, alarms = len(self.vectors), len(self.rules)
            self.tracks = Tracks(k, alarms, m.alpha, m.window, m.history, m.max_sequences)
        z = self.vectors.score(observed.rows, kind="z").double().cpu()
        present, which, n = observed.whose.sequence.unique(return_inverse=True, return_counts=True)
        order = which.argsort(stable=True)
        place = torch.arange(len(order)) - (n.cumsum(0) - n)[which[order]]
        padded = z.new_zeros(len(n), int(n.max()), z.shape[1])
        padded[which[order], place] = z[order]
        rank = observed.whose.rank[order]
        first, last = rank[n.cumsum(0) - n].tolist(), rank[n.cumsum(0) - 1].tolist()
        names = [self._name(*one, observed.whose.requests) for one in zip(present.tolist(), first, last, strict=True)]
        self._advance(names, padded, n)

    def _name(self, row: int, first: int, last: int, requests: Sequence[str] | None) -> str:
        """Whose rows these are: the request's, else row `row` of the batch, anew where its ranks do not go on."""
        if requests is not None:
            return str(requests[row])
        name, before = self._rows.get(row, ("", last))
        if first <= before:
            name = f"#{self._started}"
            self._started += 1
        self._rows[row] = (name, last)
        return name

    def _advance(self, names: Sequence[str], z: Tensor, n: Tensor) -> None:
        tracks = self.tracks
        assert tracks is not None
        limit = self.monitor.max_sequences
        for i in range(0, len(names), limit):  # a batch wider than the table goes through it by parts
            some = names[i : i + limit]
            at = torch.tensor([tracks.slot(name) for name in some])
            before = tracks.tokens[at]
            longest = int(n[i : i + limit].max())
            values = tracks.step(at, z[i : i + limit, :longest], n[i : i + limit])
            self._count += int(n[i : i + limit].sum())
            self._sum = self._sum + values.nansum((1, 2))
            self._square = self._square + values.square().nansum((1, 2))
            self._ring(some, at, before, values)

    def _ring(self, names: Sequence[str], at: Tensor, before: Tensor, values: Tensor) -> None:
        """Raise and release alarms over values [3, S, n, K] of the named sequences."""
        assert self.tracks is not None
        active = self.tracks.active
        for r, rule in enumerate(self.rules):
            line = values[rule.statistic, :, :, rule.direction]
            for i in ((line > rule.level).any(1) | active[at, r]).nonzero().flatten().tolist():
                ringing = bool(active[at[i], r])
                for t, value in enumerate(line[i].tolist()):
                    if not ringing and value > rule.level:
                        position = int(before[i]) + t
                        alarm = Alarm(rule.name, names[i], position, value, rule.level, self.hook_point)
                        self.monitor._alarms.append(alarm)
                    ringing = value > rule.level or (ringing and not value < rule.release)
                active[at[i], r] = ringing

    @property
    def levels(self) -> dict[str, float]:
        """The value of its statistic above which each alarm rises."""
        return {rule.name: rule.level for rule in self.rules}

    def reference(self) -> StreamReference:
        """What the statistics did over every sequence watched, for calibrating thresholds."""
        if self.onlooker is not None:
            return self._resident_reference(self.onlooker.watch)
        if self.tracks is None:
            raise CalibrationError("reference: no token was watched", way_out="Run neutral text inside the monitor.")
        if self.tracks.evicted:
            raise CalibrationError(
                f"reference: {self.tracks.evicted} sequences were forgotten",
                way_out="Give monitor(max_sequences=...) room for all of them.",
            )
        largest = self.tracks.largest[:, list(self.tracks.slots.values())]
        return self._stream(self._count, self._sum, self._square, largest)

    def _resident_reference(self, watch: Watch) -> StreamReference:
        totals = watch.totals(self.hook_point)
        if not totals.tokens:
            raise CalibrationError("reference: no token was watched", way_out="Run neutral text inside the monitor.")
        if watch.evicted:
            raise CalibrationError(
                f"reference: {watch.evicted} sequences were forgotten",
                way_out="Give monitor(max_sequences=...) room for all of them.",
            )
        return self._stream(totals.tokens, totals.sums, totals.squares, totals.largest)

    def _stream(self, count: int, sums: Tensor, squares: Tensor, largest: Tensor) -> StreamReference:
        mean = sums / count
        std = (squares / count - mean**2).clamp_min(0).sqrt()
        return StreamReference(self.monitor.alpha, self.monitor.window, count, mean, std, largest)


class Monitor:
    """An open monitor; made by `monitor`. The list of its `alarms` is yours to empty."""

    def __init__(
        self,
        model: nn.Module,
        vectors: Directions | Mapping[str, Directions],
        alarms: Mapping[str, Threshold],
        alpha: float,
        window: int,
        history: int,
        max_sequences: int | None,
        resident: bool | None,
    ) -> None:
        if not 0 < alpha <= 1 or window < 1:
            raise ArgumentError("alpha, window", expected="alpha in (0, 1], window >= 1", got=(alpha, window))
        if history < 0 or (max_sequences is not None and max_sequences < 1):
            raise ArgumentError(
                "history, max_sequences", expected="history >= 0, max_sequences >= 1", got=(history, max_sequences)
            )
        self.alpha, self.window, self.history = alpha, window, history
        self.max_sequences = max_sequences or MOST_SEQUENCES
        self.thresholds = dict(alarms)
        self._alarms: list[Alarm] = []
        self._single = isinstance(vectors, Directions)
        places = placed(model, vectors)
        self.watchers = {name: Watcher(self, name, directions) for name, directions in places.items()}
        sinks = {name: (self.watchers[name], _rule(directions)) for name, directions in places.items()}
        device = None if resident is False else self._home(model, places)
        if device is not None and (resident or device.type == "cuda"):
            self._look_on(places, max_sequences or MOST_RESIDENT, device)
        self._tap: Tap = capture(model, sinks, resident=resident)
        if not self._tap.resident:
            for watcher in self.watchers.values():
                watcher.onlooker = None

    def _home(self, model: nn.Module, places: Mapping[str, Directions]) -> torch.device | None:
        """The one device the model is on, where all its hook points can be watched as one; else None."""
        devices = {p.device for p in model.parameters()}
        alike = {(len(one), one.dim, _rule(one)) for one in places.values()}
        return next(iter(devices)) if len(devices) == len(alike) == 1 and not self.history else None

    def _look_on(self, places: Mapping[str, Directions], sequences: int, device: torch.device) -> None:
        rules = {name: watcher.rules for name, watcher in self.watchers.items()}
        onlooker = Onlooker(places, rules, self.alpha, self.window, sequences, device)
        for watcher in self.watchers.values():
            watcher.onlooker = onlooker

    @property
    def _watch(self) -> Watch | None:
        """The state on the device, where it is there."""
        onlooker = next(iter(self.watchers.values())).onlooker
        return None if onlooker is None else onlooker.watch

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms so far, in the order they rose; where the state is on the device, this waits for it."""
        if (watch := self._watch) is not None:
            self._alarms += watch.alarms()
        return self._alarms

    @contextlib.contextmanager
    def batch(
        self,
        requests: Sequence[str] | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        spans: Sequence[Spans] | None = None,
    ) -> Iterator[Batch]:
        """The forwards inside belong to the named requests, whose state goes on from batch to batch."""
        if requests is not None and len(set(requests)) != len(requests):
            raise ArgumentError("requests: one is named twice", got=sorted(requests)[:8])
        with self._tap.batch(requests=requests, mask=mask, cu_seqlens=cu_seqlens, spans=spans) as batch:
            yield batch

    @property
    def scores(self) -> Any:
        """{sequence: EMA of z scores [K]} at its last token, by hook point where several are watched."""
        if (watch := self._watch) is not None:
            return self._by_hook_point(lambda watcher: watch.scores()[watcher.hook_point])
        return self._each(lambda tracks, slot: tracks.ema[slot].clone())

    @property
    def peaks(self) -> Any:
        """{sequence: largest EMA [K]} so far, by hook point where several are watched."""
        if (watch := self._watch) is not None:
            return self._by_hook_point(lambda watcher: watch.peaks()[watcher.hook_point])
        return self._each(lambda tracks, slot: tracks.largest[STATISTICS.index("ema"), slot].clone())

    @property
    def levels(self) -> Any:
        """{alarm: value of its statistic above which it rises}, by hook point where several are watched."""
        return self._by_hook_point(lambda watcher: watcher.levels)

    def _each(self, read: Callable[[Tracks, int], Tensor]) -> Any:
        def every(watcher: Watcher) -> dict[str, Tensor]:
            tracks = watcher.tracks
            return {} if tracks is None else {name: read(tracks, slot) for name, slot in tracks.slots.items()}

        return self._by_hook_point(every)

    def _by_hook_point(self, read: Callable[[Watcher], Any]) -> Any:
        found = {name: read(watcher) for name, watcher in self.watchers.items()}
        return next(iter(found.values())) if self._single else found

    @property
    def ledger(self) -> dict[str, Any]:
        """Ledger by hook point."""
        return self._tap.ledger

    def reference(self) -> Any:
        """StreamReference of all that was watched, by hook point where several are: what `calibrate` takes."""
        return self._by_hook_point(lambda watcher: watcher.reference())

    def trace(self, sequence: str, on: str = "token", hook_point: str | None = None) -> Tensor:
        """A statistic [n, K] at the last `history` tokens of a sequence; needs monitor(history=...)."""
        if on not in STATISTICS:
            raise ArgumentError("on", expected=" or ".join(map(repr, STATISTICS)), got=repr(on))
        tracks = self.watchers[hook_point or next(iter(self.watchers))].tracks
        kept = None if tracks is None else tracks.trace(sequence)
        if kept is None:
            raise ArgumentError(
                "trace: nothing kept of this sequence", got=sequence, way_out="Give monitor(history=...)."
            )
        return kept[STATISTICS.index(on)]

    def __enter__(self) -> Monitor:
        self._tap.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tap.__exit__(*exception)


def _rule(vectors: Directions) -> Tokens:
    """The tokens to watch: those of the calibration, which must be single ones."""
    rule = vectors.scale().tokens or Tokens()
    if rule.pool is not None:
        raise CalibrationError(
            "monitor: the vectors are calibrated on pooled rows, which vary less than tokens",
            got=rule,
            way_out="Calibrate on Moments of single tokens.",
        )
    return rule


def monitor(
    model: nn.Module,
    vectors: Directions | Mapping[str, Directions],
    alarms: Mapping[str, Threshold] | None = None,
    *,
    alpha: float = 1 / 8,
    window: int = 16,
    history: int = 0,
    max_sequences: int | None = None,
    resident: bool | None = None,
) -> Monitor:
    """Score the tokens that the vectors are calibrated on while the `with` block runs the model; alarm on a watch list.

    Per sequence and direction it keeps the EMA y = (1 - alpha) y + alpha z, the mean of the last `window` scores, and
    their largest values; `history` keeps the statistics of that many last tokens too. Without
    `watch.batch(requests=...)` a row of the batch is a sequence, and begins anew where its ranks do not go on. Beyond
    `max_sequences` (65,536; 1,023 on a device) the longest unseen are forgotten. `resident` keeps scores and state on
    the model's device and waits for nothing in the forward: by default on a GPU, where every hook point has as many
    directions and no history is kept.
    Raises CalibrationError, LabelError, ArgumentError or HookPointError.
    """
    return Monitor(model, vectors, alarms or {}, alpha, window, history, max_sequences, resident)
