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
from .llama import Llama
from .machine import Machine
from .ours import OURS, attach
from .report import Report, file_name
from .results import Case, Line, Result
from .shapes import MODELS, SCALES, TINY_MODEL

RESULTS = Path(__file__).parent / "results"
# Files by what they take of the time that a run has; of one that is cut short the first have figures.
ORDER = (
    "gram",
    "moments",
    "label_sums",
    "project",
    "steering",
    "small_calls",
    "accuracy",
    "ring",
    "store",
    "export",
    "model",
    "decoding",
)
REPORT = pytest.StashKey[Report]()
STARTED = pytest.StashKey[float]()
RACED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emocore")
    group.addoption("--scale", choices=[*SCALES], default="full", help="how large the cases are")
    group.addoption("--dry", action="store_true", help="the GPU's cases on the CPU, tiny and interpreted")
    group.addoption("--seconds", type=float, default=float("inf"), help="start no case after so many")
    group.addoption("--threads", default=None, help="of the CPU, separated by commas; one and all without it")
    group.addoption("--results", type=Path, default=None, help="folder for the JSON")
    group.addoption("--json", type=Path, default=None, help="file for the JSON")
    group.addoption("--chart", type=Path, default=None, help="file name without its ending, for a chart")
    group.addoption("--dropped", action="append", default=[], help="a setting, NAME=VALUE, that was taken away before")
    group.addoption("--seed", type=int, default=None, help="of the random inputs; fresh in every run without it")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: a case of a GPU, or of a dry run")
    config.addinivalue_line("markers", "cpu: a case of a CPU")
    config.addinivalue_line("markers", "alike: cases that differ in size alone; a dry run takes the first of them")
    config.addinivalue_line("markers", "long: a case that a quick run leaves out")
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
    config.stash[REPORT].environment["dropped"] = dict(one.split("=", 1) for one in config.getoption("--dropped"))
    config.stash[STARTED] = time.monotonic()


def _path(config: pytest.Config, machine: Machine) -> Path:
    """Where the JSON goes: without a wish, what is no measurement to a temporary folder."""
    if config.getoption("--json"):
        return config.getoption("--json")
    kept = RESULTS if RESULTS.is_dir() else Path.cwd()  # a checkout, a wheel
    kept = kept if machine.scale.name == "full" else Path(tempfile.gettempdir())
    return (config.getoption("--results") or kept) / file_name(machine.name, datetime.now())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases of the other kind of machine, and what a dry run would only repeat."""
    machine = config.stash[REPORT].machine
    left = [item for item in items if item.get_closest_marker("cpu" if machine.gpu else "gpu")]
    if machine.scale.name == "quick":
        left += [item for item in items if item not in left and _is_left_out(item)]
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


def _is_left_out(item: pytest.Item) -> bool:
    """Whether a quick run does without it: what takes long, and all but grams on more than the fewest threads."""
    twice = item.callspec.params["threads"] != _counts(item.config)[0]
    return bool(item.get_closest_marker("long")) or (twice and item.path.stem != "bench_gram")


def _counts(config: pytest.Config) -> list[int]:
    """How many threads the cases run on, one after the other."""
    machine, wanted = config.stash[REPORT].machine, config.getoption("--threads")
    if machine.gpu or machine.scale.tiny:
        return [1]
    return list(map(int, wanted.split(","))) if wanted else sorted({1, len(os.sched_getaffinity(0))})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    counts = _counts(metafunc.config)
    if "threads" in metafunc.fixturenames:
        metafunc.parametrize("threads", counts, ids=[f"{n} thread{'s'[: n - 1]}" for n in counts], indirect=True)


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """On the CPU every case runs on one thread and on all."""
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


@pytest.fixture(scope="session")
def model(request: pytest.FixtureRequest) -> Llama:
    """Llama-3-8B's shape with random weights; a tiny one where nothing is measured."""
    machine = request.config.stash[REPORT].machine
    torch.manual_seed(0)
    return Llama(TINY_MODEL if machine.scale.tiny else MODELS["Llama-3-8B"], machine.device, torch.bfloat16)


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
    if config.getoption("--chart") and report.ceilings:
        terminalreporter.write_line(_drawn(report, config.getoption("--chart")))


def _drawn(report: Report, stem: Path) -> str:
    """Draw the chart where matplotlib is; says where it is, or why it is not."""
    try:
        from . import chart
    except ImportError as error:
        return f"no chart: {error}; it needs emocore-engine[plot]"
    return f"chart: {', '.join(map(str, chart.draw(report.document(), stem)))}"
