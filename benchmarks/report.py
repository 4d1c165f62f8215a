"""The report of a run: one table of every contender, one of the bars, and both as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from . import bars
from .machine import Machine, environment
from .results import OK, Line, Result

VERSION = 2
DRY = "dry run, no figure is a measurement"
HEAD = ("case", "threads", "impl", "ms", "ours is", "error", "rate", "of ceiling", "")
BARS_HEAD = ("bar", "what", "case", "required", "got", "met")

# What a document holds; a list means that every entry holds these.
DOCUMENT = {"version": int, "dry": bool, "date": str, "seed": int, "environment": dict, "ceilings": dict, "cases": list}
CASE = {
    "op": str,
    "case": str,
    "impl": str,
    "device": str,
    "dtype": str,
    "rows": int,
    "dim": int,
    "k": int,
    "bytes": (int, float),
    "flops": (int, float),
    "error_vs_float64": (float, type(None)),
    "fraction_of_ceiling": (float, type(None)),
    "threads": int,
    "versions": dict,
    "commit": (str, type(None)),
    "contenders": list,
}
CONTENDER = {
    "impl": str,
    "status": str,
    "seconds": (float, type(None)),
    "best_seconds": (float, type(None)),
    "spread": (float, type(None)),
    "rounds": int,
    "error_vs_float64": (float, type(None)),
    "fraction_of_ceiling": (float, type(None)),
}


class Report:
    """What a run has found so far; written to `path` after every case, so that a run that is cut short leaves it."""

    def __init__(self, machine: Machine, seed: int, path: Path | None) -> None:
        self.machine, self.seed, self.path = machine, seed, path
        self.date = datetime.now()
        self.environment = environment(machine)
        self.ceilings: dict[int, dict[str, float]] = {}  # by threads
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        """Keep a result."""
        self.results.append(result)
        self.write()

    @property
    def judged(self) -> list[dict[str, Any]]:
        """Every bar of this kind of machine, judged or without a figure."""
        return bars.judge(self.results, list(bars.GPU if self.machine.gpu else bars.CPU))

    def document(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "version": VERSION,
            "dry": self.machine.scale.tiny,
            "date": self.date.isoformat(timespec="seconds"),
            "seed": self.seed,
            "environment": self.environment,
            "ceilings": {str(threads): found for threads, found in self.ceilings.items()},
            "cases": [result.record(self.environment) for result in self.results],
            "bars": self.judged,
        }

    def write(self) -> None:
        """Write the document to its path, whole or not at all."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.document(), indent=1) + "\n")
        os.replace(part, self.path)

    def lines(self) -> Iterator[str]:
        """Both tables, the bars last."""
        mark = f" ({DRY})" if self.machine.scale.tiny else ""
        for threads, found in sorted(self.ceilings.items()):
            rates = ", ".join(f"{name} {_rate(value, name)}" for name, value in found.items())
            yield f"ceilings{mark}, {threads} thread(s): {rates}"
        yield from table(HEAD, [row for result in self.results for row in _rows(result)])
        if not self.ceilings:  # nothing was timed
            return
        yield ""
        yield f"bars{mark}"
        yield from table(BARS_HEAD, [_bar_row(one, self.machine.scale.tiny) for one in self.judged])
        if self.path is not None:
            yield f"written to {self.path}"


def file_name(device: str, date: datetime) -> str:
    """<device>-<date>.json, in letters, digits and dashes."""
    return f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{date:%Y-%m-%d-%H%M}.json"


def problems(document: Mapping[str, Any]) -> list[str]:
    """Where a document is not what this module writes."""
    found = list(_wrong(document, DOCUMENT, "document"))
    for case in document.get("cases", []):
        found += _wrong(case, CASE, f"case {case.get('case')}")
        for one in case.get("contenders", []):
            found += _wrong(one, CONTENDER, f"contender {one.get('impl')} of {case.get('case')}")
    return found


def _wrong(given: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> Iterator[str]:
    for key, kind in wanted.items():
        if key not in given:
            yield f"{where}: {key} is missing"
        elif not isinstance(given[key], kind):
            yield f"{where}: {key} is a {type(given[key]).__name__}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest entry."""
    wide = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, wide, strict=True)).rstrip()


def _rows(result: Result) -> Iterator[list[str]]:
    for i, line in enumerate(result.lines if result.ours.seconds else result.lines[:1]):
        case = result.case.name if i == 0 else ""
        ratio = "" if not (i and line.seconds and result.ours.seconds) else f"{line.seconds / result.ours.seconds:.2f}x"
        yield [
            case,
            str(result.threads) if i == 0 else "",
            line.impl,
            "" if line.seconds is None else f"{line.seconds * 1e3:.3f}",
            ratio,
            "" if line.error is None else f"{line.error:.0e}",
            _speed(result, line),
            "" if line.fraction is None else f"{line.fraction:.0%}",
            ", ".join(_notes(result, line)),
        ]


def _notes(result: Result, line: Line) -> Iterator[str]:
    if line.status != OK:
        yield line.status
    plain = result.baseline
    slower = line.slower_than(plain) if plain else None
    if plain and slower:
        yield f"{slower:+.1%} over {plain.impl}"
    yield from (f"{name} {value:.3g}" for name, value in line.more.items())


def _speed(result: Result, line: Line) -> str:
    work = result.case.work
    if not line.seconds:
        return ""
    if result.case.baseline:
        return f"{result.case.rows / line.seconds:,.0f} tokens/s"
    if work.flops > 8 * work.bytes:
        return f"{work.flops / line.seconds / 1e9:,.1f} GFLOP/s"
    return f"{work.bytes / line.seconds / 1e9:,.1f} GB/s" if work.bytes else ""


def _rate(value: float, name: str) -> str:
    return f"{value / 1e9:,.0f} {'GFLOP/s' if name.startswith('matmul') else 'GB/s'}"


def _bar_row(one: Mapping[str, Any], dry: bool) -> list[str]:
    got = one["why"] or "not measured" if one["got"] is None else f"{one['got']:.3g}"
    met = "dry" if dry else {None: "-", True: "yes", False: "NO"}[one["met"]]
    threads = f", {one['threads']} thread(s)" if one["bar"] in bars.CPU and one["threads"] else ""
    return [one["bar"], one["what"], one["case"] + threads, one["required"], got, met]
