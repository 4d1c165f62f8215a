"""A process whose writers are killed, starved and written down; how long the tests here go on."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PATIENCE = 300  # seconds for one answer: what takes longer hangs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="an hour instead of a minute: `make reliability`")
    parser.addoption("--share", type=float, default=1.0, help="of the counts and seconds of --long: how long is it?")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What a long run has run, a line a test."""
    if not config.getoption("long", False):
        return
    terminalreporter.section("what was run")
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.getreports(outcome):
            if getattr(report, "when", None) == "call" or outcome != "passed":
                name = report.nodeid.rpartition("::")[2]
                said = "; ".join(str(value) for key, value in getattr(report, "user_properties", ()) if key == "ran")
                took = getattr(report, "duration", 0.0)
                terminalreporter.write_line(f"{outcome:7} {took:6.0f} s  {name}{said and ': '}{said}")


@pytest.fixture
def ran(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """ran(what): said in the summary of a long run."""
    return lambda what: record_property("ran", what)


@pytest.fixture(scope="session")
def scale(pytestconfig: pytest.Config) -> Callable[[Any, Any], Any]:
    """scale(suite, long): the one that this run asks for."""

    def one(suite: Any, long: Any) -> Any:
        if not pytestconfig.getoption("long", False):
            return suite
        share = pytestconfig.getoption("share")
        if share == 1 or not isinstance(long, (int, float)) or long <= suite:
            return long
        return max(suite, type(long)(long * share))

    return one


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a volume: for what does not depend on the disk, and syncs a lot."""
    volume = Path("/dev/shm")
    if not volume.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=volume) as folder:
        yield Path(folder)


class Driver:
    """driver.py at work."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def start(self, do: str, **order: Any) -> int:
        """Give an order; the writer's process id."""
        print(json.dumps({"do": do, **order}, default=os.fspath), file=self.process.stdin, flush=True)
        return self.line()

    def line(self) -> Any:
        """The next thing that is said."""
        late = threading.Timer(PATIENCE, self.process.kill)
        late.start()
        try:
            line = self.process.stdout.readline()
        finally:
            late.cancel()
        assert line, "the driver hung or died"
        return json.loads(line)

    def finish(self) -> tuple[list[Any], int]:
        """All that the writer says, and how it ended."""
        said = [self.line()]
        while not (isinstance(said[-1], dict) and "status" in said[-1]):
            said.append(self.line())
        return said[:-1], said[-1]["status"]

    def run(self, do: str, **order: Any) -> tuple[list[Any], int]:
        """Give an order and see it through."""
        self.start(do, **order)
        return self.finish()


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, HERE / "faults.c", HERE / "looks.c", "-o", library, "-ldl", "-pthread"], check=True)
    command = [sys.executable, "-W", "ignore", str(HERE / "driver.py")]
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        yield Driver(process)
        process.stdin.close()
