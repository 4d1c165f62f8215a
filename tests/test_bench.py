"""The benchmarks as tests: every case at tiny sizes with timing off, and the harness that judges them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent


def _load(name: str) -> ModuleType:
    """A module of benchmarks/, which is not installed and stays off the path."""
    if "benchmarks" not in sys.modules:
        folder = ROOT / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["benchmarks"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return importlib.import_module(f"benchmarks.{name}")


bars, harness, machine, peers, report, results, shapes = (
    _load(name) for name in ("bars", "harness", "machine", "peers", "report", "results", "shapes")
)
Contender, Absent, Case, Line, Result, Work = (
    harness.Contender,
    harness.Absent,
    results.Case,
    results.Line,
    results.Result,
    results.Work,
)


@dataclasses.dataclass(frozen=True)
class Scripted(machine.Machine):
    """A machine whose clock says what it is told: seconds by contender, one list entry a call."""

    script: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    ran: list[str] = dataclasses.field(default_factory=list)

    def seconds(self, calls: Sequence[Any]) -> list[float]:
        taken = []
        for timed in calls:
            with timed.around():
                name = timed.call()
            self.ran.append(name)
            left = self.script[name]
            taken.append(left.pop(0) if len(left) > 1 else left[0])
        return taken


def scripted(**script: list[float]) -> Scripted:
    scale = dataclasses.replace(shapes.SCALES["full"], rounds=(3, 3))
    return Scripted(torch.device("cpu"), False, scale, script)


def case(bound: float = 1e-6, **more: Any) -> Any:
    return Case(op="op", name="a case", dtype="float32", rows=4, dim=3, bound=bound, **more)


X = torch.tensor([[1.0, -2.0, 4.0]])


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def named(name: str, check: Callable[[Tensor], Any] = doubled) -> Any:
    """A contender whose timed call says who it is."""
    return Contender(name, lambda x: name, check)


def run(here: Any, contenders: Sequence[Any], judged: Any = None, **more: Any) -> Any:
    exact = more.pop("exact", lambda x: 2 * x.double())
    return harness.run(
        here, judged or case(), contenders, more.pop("inputs", [X]), exact, more.pop("ceilings", {}), **more
    )


# --- what is measured


def test_medians_ratios_and_fractions_are_those_of_the_clock() -> None:
    """Two warm-up calls, then three rounds; medians 2 and 3 s; a floor of 1 s of reading."""
    here = scripted(ours=[9.0, 9.0, 2.0, 1.0, 5.0], slow=[9.0, 9.0, 3.0, 1.0, 8.0], slower=[4.0])
    contenders = [named("ours"), named("slow"), named("slower")]
    judged = case(work=Work(read=10.0), bars=(bars.faster("G1", 1.4, "slow"), bars.reaches("G1", 0.6)))
    found = run(here, contenders, judged, ceilings={"read": 10.0, "copy": 5.0})
    assert [line.seconds for line in found.lines] == [2.0, 3.0, 4.0]
    assert [line.fraction for line in found.lines] == [1 / 2, 1 / 3, 1 / 4]
    assert found.ratio() == found.ratio("slow") == 1.5
    assert found.ratio("slower") == 2.0
    assert found.ratio("nobody") is None
    assert [(one["got"], one["met"]) for one in bars.judge([found], [])] == [(1.5, True), (0.5, False)]


def test_contenders_are_interleaved() -> None:
    here = scripted(a=[1.0], b=[1.0])
    run(here, [named("a"), named("b")])
    assert here.ran == ["a", "a", "b", "b", *["a", "b"] * 3]


def test_inputs_rotate_from_call_to_call() -> None:
    shown: list[int] = []
    inputs = [X + i for i in range(3)]
    here = scripted(ours=[1.0])

    def call(x: Tensor) -> str:
        shown.append(int(x[0, 0]) - 1)
        return "ours"

    run(here, [Contender("ours", call, doubled)], inputs=inputs)
    assert shown == [0, 1, 2, 0, 1]


def test_a_gpus_inputs_are_more_than_its_cache() -> None:
    @dataclasses.dataclass(frozen=True)
    class Gpu(machine.Machine):
        @property
        def cuda(self) -> bool:
            return True

    here = Gpu(torch.device("cpu"), False, shapes.SCALES["full"])
    for nbytes in (1e9, 130e6, 50e6):
        assert len(harness.cold(here, lambda g: None, nbytes, 0)) * nbytes > shapes.COLD_BYTES
    made = harness.cold(here, lambda g: torch.rand(1, generator=g).item(), 130e6, 7)
    assert len(set(made)) == len(made)


def test_on_a_gpu_a_call_lies_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch is hidden by a sleep before the first event; what is open around the call is not between them."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Any) -> float:
            return 2500.0

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        log.append("open")
        yield
        log.append("close")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    here = machine.Machine(torch.device("cuda"), False, shapes.SCALES["full"])
    timed = machine.Timed(lambda: log.append("call"), around, True)
    assert here.seconds([timed, machine.Timed(lambda: log.append("other"))]) == [2.5, 2.5]
    assert log == ["open", "sleep", "event", "call", "event", "close", "event", "other", "event", "wait"]


def test_the_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = {"read": 100.0, "copy": 50.0, "matmul float16": 10.0}
    assert Work(read=200.0).floor(ceilings) == 2.0
    assert Work(read=100.0, written=100.0).floor(ceilings) == 4.0
    assert Work(read=200.0, flops=50.0).floor(ceilings) == 5.0
    assert Work(read=200.0, flops=5.0).floor(ceilings) == 2.0
    assert Work(read=200.0, flops=5.0, arithmetic="float64").floor(ceilings) is None
    assert Work().floor(ceilings) is None


def test_slowdowns_are_medians_over_rounds_in_which_both_ran() -> None:
    """The machine doubles its pace after the first round: medians would say 1.5 times, every round says 1.25."""
    here = scripted(ours=[0.0, 0.0, 5.0, 10.0, 10.0], plain=[0.0, 0.0, 4.0, 8.0, 8.0])
    found = run(here, [named("ours"), named("plain")], case(baseline="plain"))
    assert found.ours.slower_than(found.lines[1]) == 0.25
    assert found.baseline is found.lines[1]
    record = found.record({"device": "", "versions": {}, "driver": None, "commit": None})
    assert [one["slower_than_baseline"] for one in record["contenders"]] == [0.25, 0.0]
    assert [one["rounds"] for one in record["contenders"]] == [3, 3]
    assert record["contenders"][0]["spread"] == 0.25
    assert record["contenders"][0]["rows_per_second"] == 0.4


def test_on_several_threads_a_call_waits_until_the_others_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause and a call that is not timed before each; a long call needs no second one; one thread needs neither."""
    log: list[str] = []
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: log.append(f"pause {seconds}"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    here = machine.Machine(torch.device("cpu"), False, shapes.SCALES["full"])
    timed = machine.Timed(lambda: log.append("call"))
    threads = 2
    here.seconds([timed])
    assert log == [f"pause {machine.IDLE}", "call", "call"]
    monkeypatch.setattr(machine, "LONG", 0.0)
    here.seconds([timed])
    assert log[3:] == [f"pause {machine.IDLE}", "call"]
    threads = 1
    here.seconds([timed])
    assert log[5:] == ["call"]


def test_what_computes_on_one_thread_is_timed_in_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what waits, and not on several threads."""
    monkeypatch.setattr(machine.time, "process_time", iter([1.0, 4.0]).__next__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    here = machine.Machine(torch.device("cpu"), False, shapes.SCALES["full"])
    assert here.seconds([machine.Timed(lambda: None, computes=True)]) == [3.0]
    assert here.seconds([machine.Timed(lambda: None)])[0] < 1.0
    assert "store" not in results.COMPUTES
    assert "ring" not in results.COMPUTES


# --- what is wrong, absent or broken


def test_ours_that_is_wrong_fails_and_nothing_is_timed() -> None:
    here = scripted(ours=[1.0], other=[1.0])
    found = run(here, [named("ours", lambda x: 2 * x + 1e-3), named("other")])
    assert isinstance(found.failure, AssertionError)
    assert found.ours.status.startswith("wrong")
    assert here.ran == []
    assert all(line.seconds is None for line in found.lines)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_wrong_whatever_the_bound(value: float) -> None:
    found = run(scripted(ours=[1.0]), [named("ours", lambda x: x * value)], case(bound=float("1e30")))
    assert isinstance(found.failure, AssertionError)


def test_an_entry_that_is_never_written_is_seen() -> None:
    def forgets(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[:, :2] = 2 * x[:, :2]
        return out

    assert isinstance(run(scripted(ours=[1.0]), [named("ours", forgets)]).failure, AssertionError)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_error_column_is_true_and_others_may_be_wrong() -> None:
    contenders = [named("ours"), named("off", lambda x: 2 * x + torch.tensor([0.0, 0.5, 0.0]))]
    found = run(scripted(ours=[1.0], off=[1.0]), contenders)
    assert [line.error for line in found.lines] == [0.0, 0.5 / 8.0]
    assert found.failure is None


def test_what_raises_is_a_line_and_ours_a_failure() -> None:
    def breaks(x: Tensor) -> Tensor:
        raise RuntimeError("out of luck\nand more")

    found = run(scripted(ours=[1.0]), [named("ours"), named("other", breaks)])
    assert found.lines[1].status == "failed: RuntimeError: out of luck"
    assert found.ours.seconds == 1.0
    assert isinstance(run(scripted(), [named("ours", breaks)]).failure, RuntimeError)


def test_a_contender_that_breaks_while_it_is_timed_leaves_the_others() -> None:
    here = scripted(ours=[1.0])  # the script has no time for the other
    found = run(here, [named("ours"), named("other")])
    assert [line.status for line in found.lines] == ["ok", "failed: KeyError: 'other'"]
    assert found.ours.seconds == 1.0


def test_a_peer_that_is_not_installed_and_a_piece_that_is_missing_are_lines() -> None:
    gone = peers.peer("no_such_package_here", "their fitter", lambda: 1 / 0)
    found = run(scripted(ours=[1.0]), [named("ours"), gone])
    assert found.lines[1] == Line("their fitter", "skipped: not installed")
    absent = run(
        scripted(), [Absent("ours", "missing: no step x"), named("other")], case(bars=(bars.reaches("G1", 0.5),))
    )
    assert [line.status for line in absent.lines] == ["missing: no step x", "not run: ours is not there"]
    (judged,) = bars.judge([absent], [])
    assert (judged["met"], judged["why"]) == (None, "missing: no step x")


def test_missing_is_told_from_reference() -> None:
    ours, emocore = _load("ours"), importlib.import_module("emocore")
    here = machine.Machine(torch.device("cpu"), False, shapes.SCALES["tiny"])
    assert ours.lacks_op(here, "gram") is None
    assert ours.lacks_op(here, "gram", "nonsense").status == "missing: no op nonsense"
    assert ours.lacks_step(here, "nonsense").status == "missing: no step nonsense"
    with emocore.ops.use("reference"):
        assert "the reference serves it" in ours.lacks_op(here, "gram").status
        assert "the reference serves it" in ours.lacks_step(here, "begin").status


# --- bars


def lines(*seconds: float | None, **more: float) -> Any:
    made = [Line(name, seconds=s) for name, s in zip(("ours", "plain", "other"), seconds, strict=False)]
    return Result(case(), 1, [dataclasses.replace(made[0], more=more), *made[1:]])


def test_bars_are_judged() -> None:
    faster = bars.faster("G1", 1.5, "other").judge(lines(2.0, 9.0, 3.0))
    assert (faster["got"], faster["met"], faster["required"]) == (1.5, True, ">= 1.5")
    slower = bars.slows("G10", 0.06, "plain").judge(lines(1.0625, 1.0))
    assert (slower["got"], slower["met"], slower["required"]) == (0.0625, False, "<= 0.06")
    assert bars.slows("G10", 0.0625, "plain").judge(lines(1.0625, 1.0))["met"] is True
    assert bars.holds("G9", 7, "host us").judge(lines(1.0, **{"host us": 7.5}))["met"] is False
    assert bars.holds("G9", 7, "host us").judge(lines(1.0))["met"] is None
    assert bars.faster("G1", 1.5).judge(lines(None, 1.0))["got"] is None


def test_a_bar_that_no_case_belongs_to_is_listed_without_a_figure() -> None:
    judged = bars.judge([], list(bars.GPU))
    assert [one["bar"] for one in judged] == [*bars.GPU]
    assert {(one["got"], one["met"], one["why"]) for one in judged} == {(None, None, "no case ran")}


def test_the_docs_name_every_bar() -> None:
    text = (ROOT / "docs" / "performance.md").read_text()
    for bar in bars.GPU | bars.CPU:
        assert f"| {bar} | " in text, bar


# --- the report


@pytest.fixture
def written(tmp_path: Path) -> Any:
    made = report.Report(scripted(ours=[2.0], other=[3.0]), 5, tmp_path / "found.json")
    made.ceilings[1] = {"copy": 1e9, "read": 1e9}
    judged = case(work=Work(read=1e9), bars=(bars.faster("G14", 1.5),))
    made.add(run(made.machine, [named("ours"), named("other")], judged, ceilings=made.ceilings[1]))
    return made


def test_the_json_is_complete(written: Any) -> None:
    document = json.loads(written.path.read_text())
    assert report.problems(document) == []
    (found,) = document["cases"]
    assert found["impl"] == "ours"
    assert found["error_vs_float64"] == 0.0
    assert found["fraction_of_ceiling"] == 0.5
    assert [one["seconds"] for one in found["contenders"]] == [2.0, 3.0]
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [bar["got"] for bar in document["bars"]] == [None, 1.5, None, None, None]
    for key in ("op", "commit", "bytes", "contenders"):
        broken = json.loads(json.dumps(document))
        del broken["cases"][0][key]
        assert report.problems(broken) == [f"case a case: {key} is missing"]
    document["cases"][0]["contenders"][1]["seconds"] = "fast"
    assert report.problems(document) == ["contender other of a case: seconds is a str"]


def test_the_tables_say_it_all(written: Any) -> None:
    text = "\n".join(written.lines())
    row = next(line for line in text.splitlines() if line.startswith("a case"))
    assert row.split() == ["a", "case", "1", "ours", "2000.000", "0e+00", "0.5", "GB/s", "50%"]
    assert "1.50x" in text
    judged = [line.split()[-2:] for line in text.splitlines() if line.startswith("G1")]
    assert judged == [["ran", "-"], ["1.5", "yes"], *[["ran", "-"]] * 3]
    assert report.DRY not in text


def test_a_dry_run_says_so_in_every_table() -> None:
    here = dataclasses.replace(scripted(ours=[1.0]), scale=shapes.SCALES["tiny"], dry=True)
    made = report.Report(here, 0, None)
    made.ceilings[1] = {"copy": 1.0}
    made.add(run(here, [named("ours")], case(bars=(bars.reaches("G1", 0.5),))))
    text = [line for line in made.lines() if line.startswith(("ceilings", "bars"))]
    assert len(text) == 2
    assert all(report.DRY in line for line in text)
    assert made.document()["dry"] is True


def test_the_chart_says_what_the_result_says(written: Any, tmp_path: Path) -> None:
    """Three files; ratio, contender and errors as text, in both themes."""
    chart = _load("chart")
    files = chart.draw(json.loads(written.path.read_text()), tmp_path / "drawn" / "chart")
    assert [path.name for path in files] == ["chart.svg", "chart-dark.svg", "chart.png"]
    light, dark = (path.read_text() for path in files[:2])
    for text in (light, dark):
        assert "1.50x  other  0 / 0" in text
        assert "a case" in text
    assert chart.LIGHT.page in light
    assert chart.DARK.page in dark
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_a_file_is_named_after_device_and_date() -> None:
    date = importlib.import_module("datetime").datetime(2026, 11, 27, 4, 5)
    assert report.file_name("NVIDIA H100 80GB HBM3", date) == "nvidia-h100-80gb-hbm3-2026-11-27-0405.json"


# --- the cases themselves, and the script


def call(*command: str, timeout: float = 180, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def benchmarks(*options: str) -> subprocess.CompletedProcess[str]:
    pytest_ = str(Path(sys.executable).parent / "pytest")
    return call(pytest_, "benchmarks", "--benchmark-disable", "-q", "-p", "no:cacheprovider", "--seed", "1", *options)


def test_every_case_of_the_cpu_is_right_at_tiny_sizes() -> None:
    done = benchmarks("--scale", "tiny")
    assert done.returncode == 0, done.stdout[-3000:]
    for op in ("gram", "label sums", "update", "project cosine", "steer", "to a file"):
        assert any(line.startswith(op) and " emocore " in line for line in done.stdout.splitlines()), done.stdout


def test_cases_of_a_gpu_are_right_under_the_interpreter() -> None:
    """One case of every file; the rest of them run in `make gpu DRY=1`."""
    chosen = (
        "test_fold_gram and 4096 and bfloat16",
        "grouped",
        "fold_labels",
        "project_on_device and 384",
        "update_on_device",
        "mode_on_device and 4096",
        "project_and_steer and 256",
        "test_op and 256",
        "captured_layer",
        "decode_eager",
        "accuracy",
        "to_host and not prefill",
        "prefill_to_host",
    )
    done = benchmarks("--dry", "-k", " or ".join(f"({one})" for one in chosen))
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_run_that_is_out_of_time_says_so_of_every_case() -> None:
    done = benchmarks("--scale", "tiny", "--seconds", "0")
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("test_")]
    collected = benchmarks("--scale", "tiny", "--collect-only").stdout
    assert len(rows) == collected.count("::test_")
    assert len(rows) > 20
    assert all(line.endswith("not run: out of time") for line in rows)


def test_a_quick_run_leaves_out_what_takes_long() -> None:
    """And runs all but grams on the fewest threads; a full run does neither."""
    quick, full = (
        benchmarks("--scale", scale, "--threads", "1,2", "--collect-only").stdout.splitlines()
        for scale in ("quick", "full")
    )
    left = [line for line in full if "::" in line and line not in quick]
    long = {line.split("::")[1].split("[")[0] for line in left if "2 threads" not in line}
    assert long == {"test_gram", "test_gram_of_bfloat16", "test_update", "test_scores", "test_mode_in_place"}
    assert all("bench_gram" in line for line in quick if "2 threads" in line)
    assert any("test_llama[1 thread-" in line for line in quick)
    assert all(line in full for line in quick if "::" in line)


def test_the_script_lists_its_steps_and_refuses_nonsense() -> None:
    listed = call(sys.executable, ".ci/gpu", "--dry", "--list")
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines()[1:]]
    assert names == ["report", "build", "tests", "sanitise", "benchmarks", "billion"]
    some = call(sys.executable, ".ci/gpu", "--list", "--only", "tests", "billion", "--budget", "60")
    assert len(some.stdout.splitlines()) == 3
    assert call(sys.executable, ".ci/gpu", "--only", "nonsense").returncode == 2


@pytest.fixture
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("ci_gpu", str(ROOT / ".ci" / "gpu"))
    spec = importlib.util.spec_from_loader("ci_gpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ci_gpu"] = module
    loader.exec_module(module)
    yield module
    del sys.modules["ci_gpu"]


def test_the_script_goes_on_after_a_failure_and_says_so(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "LEAST", 1)
    done: list[str] = []

    def step(name: str, command: list[str], seconds: float = 20.0) -> Any:
        def go(run: Any, left: float) -> str:
            done.append(name)
            return run.run(command, left)

        return script.Step(name, "what it is", go, seconds, seconds)

    python = sys.executable
    steps = [
        step("good", [python, "-c", "print('said')"]),
        step("bad", [python, "-c", "raise SystemExit(3)"]),
        step("endless", [python, "-c", "import time; time.sleep(60)"], 1.0),
        step("last", [python, "-c", "pass"]),
    ]
    with (tmp_path / "log").open("w") as log:
        status = script.go(script.Run(python, True, 60.0, tmp_path, log), steps)
    text = (tmp_path / "log").read_text()
    assert status == 1
    assert done == ["good", "bad", "endless", "last"]
    rows = {line.split()[0]: line for line in text.split("=== all")[1].splitlines() if line}
    assert rows["good"].endswith("ok")
    assert rows["bad"].endswith("failed with status 3")
    assert rows["endless"].endswith("out of time after 1 s")
    assert rows["last"].endswith("ok")
    assert "said" in text


def test_the_script_sums_the_bars_up(script: ModuleType, written: Any) -> None:
    (row,) = [line for line in script.bars(written.path.parent, 0.0) if line.startswith("G14")]
    assert row.split() == ["G14", "x", "best", "other", ">=", "1.5", "1", "of", "1", "1.5", "a", "case"]
