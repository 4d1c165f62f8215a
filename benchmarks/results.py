"""Results: what a case is, what each contender of it did, and how that compares."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bars import Bar

OK = "ok"
# Ops that wait for nothing: on one thread their clock is the process's CPU time, which other processes do not stretch.
COMPUTES = {"gram", "update", "label_sums", "project", "steer_add", "steer", "model"}


@dataclass(frozen=True)
class Work:
    """The least that a case must do: bytes read once and written once, and operations of one kind of arithmetic."""

    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    arithmetic: str = "float16"
    over: str = ""  # the ceiling that the bytes are held to where it is not memory's

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read + self.written

    def floor(self, ceilings: Mapping[str, float]) -> float | None:
        """Seconds below which this machine cannot do it: the slower of memory and arithmetic; None if it is not known.

        Memory is held to the reading rate where little is written, to the copying rate elsewhere.
        """
        memory = ceilings.get(self.over or ("read" if self.written < self.read / 8 else "copy"))
        unit = ceilings.get(f"matmul {self.arithmetic}")
        if not memory or (self.flops and not unit):
            return None
        return max(self.bytes / memory, self.flops / unit if unit else 0.0) or None


@dataclass(frozen=True)
class Case:
    """One comparison: how far ours may be from float64, what it must do at least, and the bars that it belongs to."""

    op: str
    name: str
    dtype: str
    rows: int
    dim: int
    bound: float
    k: int = 0
    work: Work = field(default_factory=Work)
    bars: tuple[Bar, ...] = ()
    rounds: int = 0  # at least, where seconds would allow for fewer and a quick run is not wanted
    baseline: str = ""  # the contender that all the others are slower than, by how much is the question
    hides_launch: bool = True  # of a GPU: the time is the device's alone


@dataclass(frozen=True)
class Line:
    """What one contender did: `status` is ok, or says why there is no figure."""

    impl: str
    status: str = OK
    seconds: float | None = None  # the median of the rounds
    taken: Sequence[float] = ()  # every round
    error: float | None = None
    fraction: float | None = None  # of the ceiling
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def spread(self) -> float | None:
        """Between the quartiles of the rounds, as a fraction of the median: how far the figure is to be trusted."""
        if len(self.taken) < 2:
            return None
        low, middle, high = statistics.quantiles(self.taken, method="inclusive")
        return (high - low) / middle

    def slower_than(self, other: Line) -> float | None:
        """By what fraction: the median over rounds, in which both met the same disturbances; None without times."""
        if not self.seconds or not other.seconds:
            return None
        pairs = list(zip(self.taken, other.taken, strict=False)) or [(self.seconds, other.seconds)]
        return statistics.median(one / two for one, two in pairs) - 1


@dataclass(frozen=True)
class Result:
    """A case and its lines, ours first."""

    case: Case
    threads: int
    lines: Sequence[Line]
    failure: BaseException | None = None

    @property
    def ours(self) -> Line:
        """The first line."""
        return self.lines[0]

    @property
    def baseline(self) -> Line | None:
        """The line that the case measures slowdowns from."""
        return next((line for line in self.lines if self.case.baseline == line.impl), None)

    def others(self, *named: str) -> list[Line]:
        """Lines with a time, of the contenders whose names start so."""
        return [line for line in self.lines[1:] if line.seconds and line.impl.startswith(named or ("",))]

    def ratio(self, *named: str, as_exact: bool = False) -> float | None:
        """How many times faster ours is than the fastest of them, or of those that err no more; None without a time."""
        others = self.others(*named)
        if as_exact:
            most = self.ours.error or 0.0
            others = [line for line in others if line.error is not None and line.error <= most]
        if not self.ours.seconds or not others:
            return None
        return min(line.seconds for line in others if line.seconds) / self.ours.seconds

    def record(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """The case as JSON: its shape and work, and a list of what each contender did."""
        case, plain = self.case, self.baseline
        return {
            "op": case.op,
            "case": case.name,
            "impl": self.ours.impl,
            "device": environment["device"],
            "dtype": case.dtype,
            "rows": case.rows,
            "dim": case.dim,
            "k": case.k,
            "bytes": case.work.bytes,
            "flops": case.work.flops,
            "error_vs_float64": self.ours.error,
            "fraction_of_ceiling": self.ours.fraction,
            "threads": self.threads,
            "versions": environment["versions"],
            "driver": environment["driver"],
            "commit": environment["commit"],
            "contenders": [
                {
                    "impl": line.impl,
                    "status": line.status,
                    "seconds": line.seconds,
                    "slower_than_baseline": None if plain is None else line.slower_than(plain),
                    "rows_per_second": case.rows / line.seconds if line.seconds else None,
                    "best_seconds": min(line.taken, default=None),
                    "spread": line.spread,
                    "rounds": len(line.taken),
                    "error_vs_float64": line.error,
                    "fraction_of_ceiling": line.fraction,
                    **({"more": dict(line.more)} if line.more else {}),
                }
                for line in self.lines
            ],
        }
