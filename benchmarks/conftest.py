"""Fixtures of the benchmarks: `race` checks, times and records a case; the tables are printed when all have run."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import ceilings, harness
from .machine import Machine
from .ours import OURS, attach
from .report import Report, file_name
from .results import Case, Line, Result
from .shapes import SCALES

RESULTS = Path(__file__).parent / "results"
# Files by what they take of the time that a run has; of one that is cut short the first have figures.
ORDER = ("gram", "moments", "label_sums", "project", "steering", "small_calls", "accuracy", "ring", "store", "models")
REPORT = pytest.StashKey[Report]()
STARTED = pytest.StashKey[float]()
RACED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emocore")
    group.addoption("--scale", choices=[*SCALES], default="full", help="how large the cases are")
    group.addoption("--dry", action="store_true", help="the GPU's cases on the CPU, tiny and interpreted")
    group.addoption("--seconds", type=float, default=float("inf"), help="start no case after so many")
    group.addoption("--results", type=Path, default=None, help="folder for the JSON")
    group.addoption("--seed", type=int, default=None, help="of the random inputs; fresh in every run without it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: a case of a GPU, or of a dry run")
    config.addinivalue_line("markers", "cpu: a case of a CPU")
    config.addinivalue_line("markers", "alike: cases that differ in size alone; a dry run takes the first of them")
    dry = config.getoption("--dry")
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
    scale = SCALES["tiny" if dry else config.getoption("--scale")]
    device = torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu")
    machine = Machine(device, dry, scale)
    seed = config.getoption("--seed")
    path = None if config.getoption("benchmark_disable", False) else _path(config, machine)
    seed = int.from_bytes(os.urandom(3)) if seed is None else seed
    config.stash[REPORT] = Report(machine, seed, path)
    config.stash[REPORT].environment |= attach(machine)
    config.stash[STARTED] = time.monotonic()


def _path(config: pytest.Config, machine: Machine) -> Path:
    """Where the JSON goes: what is no measurement is not kept."""
    kept = RESULTS if machine.scale.name == "full" else Path(tempfile.gettempdir())
    return (config.getoption("--results") or kept) / file_name(machine.name, datetime.now())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of the other kind of machine, and what a dry run would only repeat."""
    machine = config.stash[REPORT].machine
    left = [item for item in items if item.get_closest_marker("cpu" if machine.gpu else "gpu")]
    seen: set[str] = set()
    for item in items if machine.dry else ():
        if item.get_closest_marker("alike"):
            name = f"{item.path}::{getattr(item, 'originalname', item.name)}"
            left += [item] if name in seen else []
            seen.add(name)
    place = {f"bench_{name}": i for i, name in enumerate(ORDER)}
    kept = [item for item in items if item not in left]
    items[:] = sorted(kept, key=lambda item: place.get(item.path.stem, len(place)))
    config.hook.pytest_deselected(items=left)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    machine = metafunc.config.stash[REPORT].machine
    counts = [1] if machine.gpu or machine.scale.tiny else [1, 2]
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", counts, ids=[f"{n} thread{'s'[: n - 1]}" for n in counts], indirect=True)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """On the CPU every case runs on one thread and on two."""
    if request.config.stash[REPORT].machine.cuda:
        yield request.param
        return
    before = torch.get_num_threads()
    set_threads(request.param)
    yield request.param
    set_threads(before)


def set_threads(count: int) -> None:
    """Of torch, and of the libraries that numpy and scipy multiply with."""
    torch.set_num_threads(count)
    with contextlib.suppress(ImportError):
        importlib.import_module("scipy.linalg.blas")  # its library obeys once it is loaded
    importlib.import_module("threadpoolctl").threadpool_limits(count, "blas")


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """What the run has found so far."""
    return request.config.stash[REPORT]


@pytest.fixture
def machine(report: Report, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """Where the cases run; a dry run serves every op that has a kernel by it, interpreted."""
    import emocore

    if time.monotonic() - request.config.stash[STARTED] > request.config.getoption("--seconds"):
        report.add(_unmeasured(request.node, "not run: out of time"))
        pytest.skip("out of time")
    with emocore.ops.use("triton" if report.machine.dry else "auto"):
        yield report.machine
    report.machine.reset_peak()


def _unmeasured(item: pytest.Item, status: str) -> Result:
    """The line of a case that never came to be raced."""
    op = item.path.stem.removeprefix("bench_")
    return Result(Case(op, item.name, "", 0, 0, bound=0.0), 1, [Line(OURS, status)])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A case that broke before its race has a line too."""
    found = yield
    if found.failed and not item.stash.get(RACED, False) and call.excinfo is not None:
        item.stash[RACED] = True
        item.config.stash[REPORT].add(_unmeasured(item, harness.failed(call.excinfo.value)))
    return found


@pytest.fixture
def seed(report: Report) -> int:
    """Of the run's random inputs."""
    return report.seed


@pytest.fixture
def race(
    request: pytest.FixtureRequest, machine: Machine, threads: int, benchmark: Any
) -> Iterator[Callable[..., Result]]:
    """race(case, contenders, inputs, exact): check, time interleaved and record; ours that is wrong fails the test."""
    report = request.config.stash[REPORT]

    def run(
        case: Case,
        contenders: Sequence[harness.Contender | harness.Absent],
        inputs: Sequence[Any],
        exact: Callable[[Any], Tensor] | None,
        **options: Any,
    ) -> Result:
        timed = not benchmark.disabled
        if timed and threads not in report.ceilings:
            report.ceilings[threads] = ceilings.measure(machine)
        found = report.ceilings.get(threads, {})
        request.node.stash[RACED] = True
        result = harness.run(machine, case, contenders, inputs, exact, found, threads, timed, **options)
        report.add(result)
        benchmark.extra_info.update(result.record(report.environment))
        if result.failure is not None:
            raise result.failure
        if isinstance(contenders[0], harness.Absent):
            pytest.skip(contenders[0].status)
        ran.append(contenders[0])
        _time_once(benchmark, machine, contenders[0], inputs)
        return result

    ran: list[Any] = []
    yield run
    if not ran:
        benchmark.pedantic(lambda: None, rounds=1)  # that it was not used would be a second error


def _time_once(benchmark: Any, machine: Machine, ours: harness.Contender, inputs: Sequence[Any]) -> None:
    """Ours once more for pytest-benchmark's own record, but where a dry run has timed it already."""

    def whole() -> None:
        with ours.around():
            ours.call(inputs[0])
            machine.synchronize()

    benchmark.pedantic((lambda: None) if machine.dry and not benchmark.disabled else whole, rounds=1)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[REPORT]
    if report.results:
        terminalreporter.write_line("")
        for line in report.lines():
            terminalreporter.write_line(line)
