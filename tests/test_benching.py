"""`emocore bench`: which benchmarks, in which environment, and what it says where something is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emocore import benching, cli
from emocore.errors import ArgumentError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be run: (command, environment), nothing is."""
    seen: list[Any] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> Any:
        seen.append((command, env))
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_only_the_named_benchmarks_run_with_their_options(started: list[Any]) -> None:
    options = ["--quick", "--only", "gram, moments", "--threads", "2", "--json", "x.json"]
    assert cli.main(["bench", *options]) == 5
    ((command, _),) = started
    assert command[:4] == [sys.executable, "-P", "-m", "pytest"]
    assert [part for part in command if part.endswith(".py") and not part.startswith("python_files")] == [
        str(ROOT / "benchmarks" / f"bench_{name}.py") for name in ("gram", "moments")
    ]
    assert {"--scale=quick", "--threads=2", "--json=x.json"} <= set(command)


def test_all_run_where_none_is_named(started: list[Any]) -> None:
    cli.main(["bench"])
    named = {Path(part).name for part in started[0][0] if "/bench_" in part}
    assert named == {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}


def test_what_hampers_a_library_is_taken_away_and_told(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("EMOCORE_ISA", "avx2")
    cli.main(["bench", "--only", "gram"])
    ((command, environment),) = started
    assert not set(benching.HAMPERING) & set(environment)
    assert environment["EMOCORE_ISA"] == "avx2"
    assert "--dropped=OPENBLAS_CORETYPE=Haswell" in command


def test_an_unknown_name_lists_the_known(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--only", "gramm"]) == 1
    assert not started
    said = capsys.readouterr().err
    assert "gramm" in said
    assert "label_sums" in said


def test_threads_are_numbers(started: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "two", "1,,2", "-1"):
        with pytest.raises(SystemExit):
            cli.main(["bench", f"--threads={wrong}"])
        assert repr(wrong) in capsys.readouterr().err
    assert not started


def test_a_missing_package_is_named(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "NEEDED", ("pytest", "no_such_package_here"))
    with pytest.raises(ArgumentError, match=r"no_such_package_here.*emocore-engine\[bench\]"):
        benching.run([], [])
    assert not started
