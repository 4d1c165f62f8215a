"""Calibration: what scores do on neutral rows, and what a monitor's statistics do on neutral sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .errors import CalibrationError
from .tokens import Tokens

STATISTICS = ("token", "ema", "window")


@dataclass(frozen=True, eq=False)
class StreamReference:
    """What a monitor's statistics did over S neutral sequences of `count` tokens in all, read in order.

    mean, std [3, K] over the tokens, largest [3, S, K] over each sequence: of the token scores, their EMAs with
    `alpha` and their means over `window`, in the order of STATISTICS.
    """

    alpha: float
    window: int
    count: int
    mean: Tensor
    std: Tensor
    largest: Tensor

    @property
    def sequences(self) -> int:
        """How many neutral sequences were read."""
        return self.largest.shape[1]

    def check(self, k: int) -> None:
        """Raise CalibrationError unless this describes `k` directions."""
        for name, t, shape in (
            ("mean", self.mean, (3, k)),
            ("std", self.std, (3, k)),
            ("largest", self.largest, (3, self.sequences, k)),
        ):
            if tuple(t.shape) != shape:
                raise CalibrationError(f"stream: {name}", expected=list(shape), got=list(t.shape))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Mean and std [K] of centered scores over `count` reference rows of token rule `tokens`; its stream, if read."""

    mean: Tensor
    std: Tensor
    count: int
    tokens: Tokens | None
    stream: StreamReference | None = None

    def check(self, k: int) -> None:
        """Raise CalibrationError unless this scales `k` directions."""
        for name, t in (("mean", self.mean), ("std", self.std)):
            if tuple(t.shape) != (k,) or not bool(t.isfinite().all()):
                raise CalibrationError(f"calibration: {name}", expected=f"{k} finite values", got=list(t.shape))
        if not bool((self.std > 0).all()):
            raise CalibrationError(
                "reference: its scores do not vary", got=f"{self.count} rows", way_out="Give more rows."
            )
        if self.stream is not None:
            self.stream.check(k)
