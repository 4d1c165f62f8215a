"""Bars: what the engine must reach, each judged on the result of a case; one without a figure is said to have none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .results import OK, Result

GPU = {
    "G1": "gram on staged rows, float64 fold",
    "G1b": "whole update, stage to float64",
    "G2": "gram, hook points grouped",
    "G3": "whole update against LeaceFitter",
    "G4": "accuracy of G1-G3",
    "G5": "label sums, 171 labels",
    "G6": "project",
    "G7": "steer",
    "G8": "project and steer in one kernel",
    "G9": "small calls",
    "G10": "whole model: mean and covariance at every layer",
    "G11": "whole model: 171 scores and alarms while decoding",
    "G12": "capture to host",
}
CPU = {
    "G13": "rows to disk, and back",
    "G14": "gram on the CPU",
    "G15": "label sums, project, steer on the CPU",
    "G17": "whole update on the CPU",
    "G18": "whole model on the CPU",
}


@dataclass(frozen=True)
class Bar:
    """A requirement: the value that `of` reads from a result, at least `required` (or at most)."""

    id: str
    what: str
    required: float
    of: Callable[[Result], float | None]
    at_most: bool = False

    def judge(self, result: Result) -> dict[str, Any]:
        """Required, got and met (None where there is no figure) for a result."""
        got = self.of(result)
        met = None if got is None else (got <= self.required if self.at_most else got >= self.required)
        return {
            "bar": self.id,
            "what": self.what,
            "case": result.case.name,
            "threads": result.threads,
            "required": f"{'<=' if self.at_most else '>='} {self.required:g}",
            "got": got,
            "met": met,
            "why": None if result.ours.status == OK else result.ours.status,
        }


def faster(bar: str, required: float, *against: str) -> Bar:
    """At least `required` times as fast as the fastest contender whose name starts so."""
    return Bar(bar, f"x {' / '.join(against) or 'best other'}", required, lambda result: result.ratio(*against))


def faster_than_as_exact(bar: str, required: float) -> Bar:
    """At least `required` times as fast as the fastest contender that errs no more."""
    return Bar(bar, "x best as exact", required, lambda result: result.ratio(as_exact=True))


def reaches(bar: str, required: float) -> Bar:
    """At least this fraction of the machine's measured ceiling."""
    return Bar(bar, "of the ceiling", required, lambda result: result.ours.fraction)


def slows(bar: str, required: float, plain: str) -> Bar:
    """At most this much slower than the contender `plain`, as a fraction of it."""

    def slowdown(result: Result) -> float | None:
        return next((result.ours.slower_than(line) for line in result.others(plain)), None)

    return Bar(bar, f"slower than {plain}", required, slowdown, at_most=True)


def holds(bar: str, required: float, figure: str) -> Bar:
    """A figure of our line's own, at most this."""
    return Bar(bar, figure, required, lambda result: result.ours.more.get(figure), at_most=True)


def judge(results: Sequence[Result], wanted: Sequence[str]) -> list[dict[str, Any]]:
    """Every bar of every result, and a line without a figure for those of `wanted` that no case belongs to."""
    found = [bar.judge(result) for result in results for bar in result.case.bars]
    seen = {one["bar"] for one in found}
    names = GPU | CPU
    empty = {"threads": 0, "required": "", "got": None, "met": None, "why": "no case ran"}
    found += [{"bar": bar, "what": names[bar], "case": "-", **empty} for bar in wanted if bar not in seen]
    order = list(names)
    return sorted(found, key=lambda one: order.index(one["bar"]))
