"""Results: what a case is, what each contender of it did, and how that compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bars import Bar

OK = "ok"


@dataclass(frozen=True)
class Work:
    """The least that a case must do: bytes read once and written once, and operations of one kind of arithmetic."""

    read: float = 0.0
    written: float = 0.0
    flops: float = 0.0
    arithmetic: str = "float16"

    @property
    def bytes(self) -> float:
        """Read and written."""
        return self.read + self.written

    def floor(self, ceilings: Mapping[str, float]) -> float | None:
        """Seconds below which this machine cannot do it: the slower of memory and arithmetic; None if it is not known.

        Memory is held to the reading rate where little is written, to the copying rate elsewhere.
        """
        memory = ceilings.get("read" if self.written < self.read / 8 else "copy")
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
    hides_launch: bool = True  # of a GPU: the time is the device's alone


@dataclass(frozen=True)
class Line:
    """What one contender did: `status` is ok, or says why there is no figure."""

    impl: str
    status: str = OK
    seconds: float | None = None  # the median of the rounds
    best: float | None = None  # the fastest of them
    spread: float | None = None  # between their quartiles, as a fraction of the median
    rounds: int = 0
    error: float | None = None
    fraction: float | None = None  # of the ceiling
    more: Mapping[str, float] = field(default_factory=dict)


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
        case = self.case
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
                    "best_seconds": line.best,
                    "spread": line.spread,
                    "rounds": line.rounds,
                    "error_vs_float64": line.error,
                    "fraction_of_ceiling": line.fraction,
                    **({"more": dict(line.more)} if line.more else {}),
                }
                for line in self.lines
            ],
        }
