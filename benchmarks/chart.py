"""The chart of a result: how long everybody else takes where ours takes one, each error beside its speed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROW, MARGIN, WIDTH = 0.27, 0.62, 10.4  # inches
NAMES_AT, SAYS_AT = -0.02, 1.03  # of the axes' width
FONTS = {"font.family": "sans-serif", "font.size": 8.5, "svg.fonttype": "none", "svg.hashsalt": "emocore"}


@dataclass(frozen=True)
class Theme:
    """Colours: of the page, of text, of what is less important, of lines, of ours and of the others."""

    page: str
    text: str
    faint: str
    line: str
    ours: str
    other: str


LIGHT = Theme("#ffffff", "#1f2328", "#6e7781", "#e4e8ec", "#0969da", "#8c959f")
DARK = Theme("#0d1117", "#e6edf3", "#8b949e", "#262c34", "#58a6ff", "#7d8590")

Case = Mapping[str, Any]


def timed(case: Case) -> list[Mapping[str, Any]]:
    """The contenders that have a time, ours first; none where ours has none."""
    found = [one for one in case["contenders"] if one["seconds"]]
    return found if found and found[0]["impl"] == case["impl"] else []


def raced(document: Mapping[str, Any]) -> list[Case]:
    """The cases with at least two times, on the fewest threads that there are."""
    cases = [case for case in document["cases"] if len(timed(case)) > 1]
    fewest = min((case["threads"] for case in cases), default=1)
    return [case for case in cases if case["threads"] == fewest]


def is_slowdown(case: Case) -> bool:
    """Whether the case asks how much is added to something that has to be done anyway."""
    return any(one["slower_than_baseline"] is not None for one in case["contenders"])


def draw(document: Mapping[str, Any], stem: Path) -> list[Path]:
    """Write <stem>.svg, <stem>-dark.svg and <stem>.png; gives what was written."""
    cases = raced(document)
    ratios = [case for case in cases if not is_slowdown(case)]
    slowdowns = [case for case in cases if is_slowdown(case)]
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for theme, name in ((LIGHT, f"{stem}.svg"), (DARK, f"{stem}-dark.svg"), (LIGHT, f"{stem}.png")):
        with matplotlib.rc_context(FONTS):
            figure = _figure(document, ratios, slowdowns, theme)
            metadata = {"Date": None} if name.endswith("svg") else {}
            figure.savefig(name, facecolor=theme.page, dpi=200, metadata=metadata)
        written.append(Path(name))
    return written


def _figure(document: Mapping[str, Any], ratios: Sequence[Case], slowdowns: Sequence[Case], theme: Theme) -> Figure:
    panels = [(cases, kind) for cases, kind in ((ratios, _ratios), (slowdowns, _slowdowns)) if cases]
    heights = [len(cases) * ROW for cases, _ in panels]
    total = sum(heights) + (1.8 * len(panels) + 0.4) * MARGIN
    figure = Figure(figsize=(WIDTH, total))
    top = total - 0.8 * MARGIN
    for (cases, kind), height in zip(panels, heights, strict=True):
        axes = figure.add_axes((0.29, (top - height) / total, 0.34, height / total))
        _rows(axes, [case["case"] for case in cases], theme)
        kind(axes, cases, theme)
        top -= height + 1.8 * MARGIN
    figure.text(0.015, 0.12 / total, _caption(document), color=theme.faint, fontsize=7.5)
    return figure


def _caption(document: Mapping[str, Any]) -> str:
    here, threads = document["environment"], raced(document)[0]["threads"]
    where = here["device"]
    if not here.get("cuda"):
        where += f", {threads} thread{'s'[: threads - 1]}, load of others {here['load']:.0f}"
    when = f"{document['date'][:10]}, torch {here['versions']['torch']}"
    return f"{where}. Error: largest difference from float64, relative to the largest value. {when}"


def _rows(axes: Axes, names: Sequence[str], theme: Theme) -> None:
    """A line a case, its name on the left; the first on top."""
    axes.set_facecolor("none")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(colors=theme.faint, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for y, name in enumerate(names):
        axes.axhline(y, color=theme.line, linewidth=0.8, zorder=0)
        axes.text(NAMES_AT, y, name, transform=axes.get_yaxis_transform(), ha="right", va="center", color=theme.text)


def _heads(axes: Axes, title: str, says: str, theme: Theme) -> None:
    above = {"transform": axes.transAxes, "va": "bottom"}
    rise = 1 + 0.1 / (axes.bbox.height / axes.figure.dpi)
    axes.text(NAMES_AT, rise, title, ha="right", color=theme.text, fontweight="bold", **above)
    axes.text(SAYS_AT, rise, says, color=theme.faint, **above)


def _dot(axes: Axes, x: float, y: float, colour: str, filled: bool, theme: Theme) -> None:
    face = colour if filled else theme.page
    axes.plot([x], [y], "o", markersize=6, color=colour, markerfacecolor=face, zorder=3, clip_on=False)


def _ratios(axes: Axes, cases: Sequence[Case], theme: Theme) -> None:
    """Every other contender by its time in units of ours."""
    axes.set_xscale("log")
    reach = [one["seconds"] / timed(case)[0]["seconds"] for case in cases for one in timed(case)[1:]]
    axes.set_xlim(min(0.5, min(reach) / 1.3), max(4.0, max(reach) * 1.3))
    ticks = [
        x for x in (0.1, 0.25, 0.5, 1, 2, 4, 10, 30, 100, 300, 1000) if axes.get_xlim()[0] <= x <= axes.get_xlim()[1]
    ]
    axes.set_xticks(ticks, [f"{x:g}x" for x in ticks])
    axes.minorticks_off()
    axes.axvline(1, color=theme.ours, linewidth=1.6, zorder=1)
    axes.set_xlabel(
        "time, where emocore takes 1    ● as exact as emocore    ○ less exact", color=theme.faint, fontsize=8
    )
    _heads(axes, "operations", "fastest other, its error, emocore's", theme)
    for y, case in enumerate(cases):
        ours, *others = timed(case)
        for one in others:
            _dot(axes, one["seconds"] / ours["seconds"], y, theme.other, _as_exact(one, ours), theme)
        best = min(others, key=lambda one: one["seconds"])
        ratio = best["seconds"] / ours["seconds"]
        says = f"{ratio:.2f}x  {best['impl']}  {_short(best)} / {_short(ours)}"
        colour = theme.ours if ratio >= 1 else theme.text
        axes.text(SAYS_AT, y, says, transform=axes.get_yaxis_transform(), va="center", color=colour)


def _slowdowns(axes: Axes, cases: Sequence[Case], theme: Theme) -> None:
    """Every contender by what it adds to the plain one."""
    added = [one["slower_than_baseline"] * 100 for case in cases for one in timed(case)]
    axes.set_xlim(min(0.0, *added) - 1, max(added) * 1.05 + 1)
    axes.axvline(0, color=theme.faint, linewidth=1, zorder=1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:+.0f} %" if x else "0")
    axes.set_xlabel("added to the plain forward", color=theme.faint, fontsize=8)
    _heads(axes, "whole models", "emocore and the least of the others, errors", theme)
    for y, case in enumerate(cases):
        ours, *others = timed(case)
        others = [
            one for one in others if one["error_vs_float64"] is not None and not one["impl"].startswith("emocore")
        ]
        for one in others:
            _dot(axes, one["slower_than_baseline"] * 100, y, theme.other, _as_exact(one, ours), theme)
        _dot(axes, ours["slower_than_baseline"] * 100, y, theme.ours, True, theme)
        says = f"{ours['slower_than_baseline']:+.1%} emocore {_short(ours)}"
        if others:
            best = min(others, key=lambda one: one["slower_than_baseline"])
            says += f"; {best['slower_than_baseline']:+.1%} {best['impl'].split(',')[0]} {_short(best)}"
        axes.text(SAYS_AT, y, says, transform=axes.get_yaxis_transform(), va="center", color=theme.text)


def _as_exact(one: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether its error is no larger than twice ours: the last digit of an error means nothing."""
    errors = one["error_vs_float64"], ours["error_vs_float64"]
    return None in errors or errors[0] <= 2 * errors[1]


def _short(one: Mapping[str, Any]) -> str:
    error = one["error_vs_float64"]
    return "-" if error is None else "0" if error == 0 else f"{error:.0e}".replace("e-0", "e-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path, help="a result")
    parser.add_argument("stem", type=Path, help="file name without its ending")
    given = parser.parse_args()
    print(*draw(json.loads(given.json.read_text()), given.stem), sep="\n")
