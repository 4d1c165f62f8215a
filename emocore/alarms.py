"""Alarms: when a running score is too high to be neutral, and the record that it was."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .calibration import STATISTICS, StreamReference
from .directions import Directions
from .errors import ArgumentError, CalibrationError


@dataclass(frozen=True)
class Threshold:
    """When an alarm fires: above `z` standard deviations, or so that a fraction `fpr` of neutral sequences would fire.

    `on` names the statistic: the "token" score, its "ema", or the mean of a "window". `release` is where an alarm ends,
    in the unit of the threshold: a lower z, or a higher fpr; by default the threshold itself. Raises ArgumentError.

    >>> Threshold(z=4, on="token", release=2)
    Threshold(z=4, fpr=None, on='token', release=2)
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
        if self.z is not None and not math.isfinite(self.z):
            raise ArgumentError("z", expected="a finite number of standard deviations", got=self.z)
        if self.fpr is not None and not 0 < self.fpr < 1:
            raise ArgumentError("fpr", expected="a fraction of sequences in (0, 1)", got=self.fpr)
        if self.release is None:
            return
        if self.z is not None and not self.release <= self.z:
            raise ArgumentError("release", expected=f"at most z = {self.z}", got=self.release)
        if self.fpr is not None and not self.fpr <= self.release < 1:
            raise ArgumentError("release", expected=f"an fpr from {self.fpr} to below 1", got=self.release)

    def levels(self, vectors: Directions, name: str, alpha: float, window: int) -> tuple[float, float]:
        """Values of the statistic above which the alarm rises and below which it ends.

        An fpr level is the reference's quantile that a fresh sequence of its kind passes with a probability of at most
        fpr. Raises CalibrationError where the reference is of another statistic, or too small.
        """
        start = self.z if self.fpr is None else self.fpr
        assert start is not None
        release = start if self.release is None else self.release
        if self.z is not None and self.on == "token":
            return start, release
        stream = self._stream(vectors, name, alpha, window)
        (k,) = vectors.index(name)
        at = STATISTICS.index(self.on)
        if self.z is not None:
            mean, std = float(stream.mean[at, k]), float(stream.std[at, k])
            return mean + start * std, mean + release * std
        self._check_size(stream.sequences, name)
        largest = stream.largest[at, :, k].sort(descending=True).values
        # of n + 1 exchangeable sequences, the fresh one is among the j highest with probability j / (n + 1)
        rise, end = (max(math.floor(rate * (len(largest) + 1)) - 1, 0) for rate in (start, release))
        return float(largest[rise]), float(largest[end])

    def _stream(self, vectors: Directions, name: str, alpha: float, window: int) -> StreamReference:
        stream = vectors.scale().stream
        if stream is None:
            raise CalibrationError(
                f"alarm {name!r}: {self.on} has no reference of its own",
                way_out="Read neutral text with a monitor, then vectors.calibrate(watch.reference()).",
            )
        theirs, ours = {"ema": (stream.alpha, alpha), "window": (stream.window, window)}.get(self.on, (0, 0))
        if theirs != ours:
            parameter = "alpha" if self.on == "ema" else "window"
            raise CalibrationError(f"{parameter}: not that of the reference", expected=theirs, got=ours)
        return stream

    def _check_size(self, sequences: int, name: str) -> None:
        assert self.fpr is not None
        need = math.ceil(3 / self.fpr - 1e-9)  # the rule of three: fewer would not see such a rate
        if sequences < need:
            raise CalibrationError(
                f"alarm {name!r}: the reference is too small for fpr={self.fpr}",
                expected=f"at least {need} neutral sequences",
                got=sequences,
                way_out=f"Read more neutral text, or ask for fpr >= 3/{max(sequences, 4)}.",
            )


@dataclass(frozen=True)
class Alarm:
    """Direction `name` rose above `level` with `value` at token `position`, from 0, of what was read of `sequence`."""

    name: str
    sequence: str
    position: int
    value: float
    level: float
    hook_point: str
