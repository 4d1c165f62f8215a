"""The harness: contenders are checked against float64, then timed interleaved in one process on inputs that rotate."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .machine import Machine, Timed, poisoned
from .results import COMPUTES, OK, Case, Line, Result
from .shapes import COLD_BYTES

FEW_BUFFERS, MOST_BUFFERS = 2, 64


@dataclass(frozen=True)
class Contender:
    """One way to do a case: `call(input)` is timed, `check(input)` gives what it computes from a clean state.

    A check that gives None has nothing to compare. `around` is open during a call and not timed; `figures` measures
    more, once it was timed.
    """

    name: str
    call: Callable[[Any], Any]
    check: Callable[[Any], Tensor | None] | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    figures: Callable[[], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Absent:
    """A contender that cannot run here: "missing: ..." of what is to be built, "skipped: ..." of others' packages."""

    name: str
    status: str


def unchecked(given: Any) -> None:
    """The check of a contender that computes nothing that could be compared."""


def error_of(found: Tensor, exact: Tensor) -> float:
    """Largest difference relative to the largest exact value; NaN or Inf where anything is not finite."""
    return float((found.to(exact.device).double() - exact).abs().max() / exact.abs().max())


def cold(machine: Machine, make: Callable[[torch.Generator], Any], nbytes: float, seed: int) -> list[Any]:
    """Inputs to rotate over, each from `make` with its own random numbers: more than a GPU's cache holds."""
    buffers = 1
    if machine.cuda:
        buffers = min(max(math.ceil(COLD_BYTES / nbytes) + 1, FEW_BUFFERS), MOST_BUFFERS)
    return [make(machine.generator(seed + i)) for i in range(buffers)]


def run(
    machine: Machine,
    case: Case,
    contenders: Sequence[Contender | Absent],
    inputs: Sequence[Any],
    exact: Callable[[Any], Tensor] | None,
    ceilings: Mapping[str, float],
    threads: int = 1,
    timed: bool = True,
    error: Callable[[Tensor, Tensor], float] = error_of,
) -> Result:
    """Check every contender on the first input, then time those that ran; nothing is timed where ours is wrong."""
    lines = {c.name: Line(c.name, c.status) for c in contenders if isinstance(c, Absent)}
    ours, absent = contenders[0].name, isinstance(contenders[0], Absent)
    running: list[Contender] = []
    failure: BaseException | None = None
    right = None if exact is None or absent else exact(inputs[0])
    for contender in contenders:
        if isinstance(contender, Absent):
            continue
        if absent:
            lines[contender.name] = Line(contender.name, "not run: ours is not there")
            continue
        try:
            off = _check(contender, inputs[0], right, error, contender.name == ours)
        except Exception as raised:
            lines[contender.name] = Line(contender.name, failed(raised))
            failure = raised if contender.name == ours else failure
            continue
        lines[contender.name] = Line(contender.name, OK, error=off)
        if contender.name == ours and off is not None and not off <= case.bound:
            lines[ours] = replace(lines[ours], status=f"wrong: errs by {off:.1e}, may by {case.bound:.1e}")
            failure = AssertionError(f"{case.name}: {ours} errs by {off:.1e}, may by {case.bound:.1e}")
        else:
            running.append(contender)
    if timed and failure is None and running:
        _time(machine, case, running, inputs, ceilings, lines)
    return Result(case, threads, [lines[c.name] for c in contenders], failure)


def _check(
    contender: Contender, given: Any, right: Tensor | None, error: Callable[[Tensor, Tensor], float], ours: bool
) -> float | None:
    """How far a contender is from float64; ours with every new output poisoned."""
    with poisoned() if ours else _quiet():
        if contender.check is not None:
            found = contender.check(given)
        else:
            with contender.around():
                found = contender.call(given)
    return None if right is None or found is None else error(found, right)


def _time(
    machine: Machine,
    case: Case,
    running: Sequence[Contender],
    inputs: Sequence[Any],
    ceilings: Mapping[str, float],
    lines: dict[str, Line],
) -> None:
    """Fill in the medians of rounds in which every contender runs once, each call on the next input."""
    turn = itertools.count()
    calls: dict[str, Timed] = {}
    once = last = 0.0
    with _quiet():
        for contender in running:
            call = Timed(
                lambda c=contender: c.call(inputs[next(turn) % len(inputs)]),
                contender.around,
                case.hides_launch,
                case.op in COMPUTES,
            )
            try:
                for _ in range(machine.scale.warm):
                    last = machine.seconds([call])[0]
                once += last
            except Exception as raised:
                lines[contender.name] = replace(lines[contender.name], status=failed(raised))
                continue
            calls[contender.name] = call
        fewest, most = machine.scale.rounds
        fewest = fewest if machine.scale.name == "quick" else max(fewest, min(case.rounds, most))
        rounds = min(max(int(machine.scale.seconds / max(once, 1e-9)), fewest), most)
        times = [machine.seconds(list(calls.values())) for _ in range(rounds)]
    floor = case.work.floor(ceilings)
    figures = {c.name: c.figures for c in running}
    for name, taken in zip(calls, zip(*times, strict=True), strict=True):
        seconds = statistics.median(taken)
        lines[name] = replace(
            lines[name],
            seconds=seconds,
            taken=taken,
            fraction=None if floor is None else floor / seconds,
        )
        measure = figures[name]
        if measure is not None:
            with _quiet():
                lines[name] = replace(lines[name], more=measure())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other people's warnings are not ours to raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def failed(raised: BaseException) -> str:
    """The status of what raised."""
    first = (str(raised).strip().splitlines() or [""])[0]
    return f"failed: {type(raised).__name__}: {first}"[:160]
