"""The ring's C++ under the sanitisers and valgrind's memcheck, driven by ring_driver.cpp: no report."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = ("ring", "ring_writers", "slots", "writing", "gather", "crc32c", "driver", "parameters")

WITH = {
    "addresses": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
    "valgrind": [],
}
VALGRIND = ("valgrind", "-q", "--error-exitcode=9", "--leak-check=full", "--fair-sched=yes")
STRICT = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "TSAN_OPTIONS": "halt_on_error=1"}


@pytest.mark.parametrize("kind", WITH)
def test_the_ring_is_clean(kind: str, scale: Any, ran: Any, memory: Path) -> None:
    slow = kind == "valgrind"
    if slow and not shutil.which("valgrind"):
        pytest.skip("no valgrind")
    program, rounds = memory / "driver", scale(1, 15 if slow else 100)
    files = [HERE / "ring_driver.cpp", *(CSRC / f"{name}.cpp" for name in SOURCES)]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", "-I", CSRC, *WITH[kind]]
    built = subprocess.run(["g++", *flags, *files, "-o", program, "-ldl"], capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"no library for {kind}")
    assert built.returncode == 0, built.stderr
    command = [*(VALGRIND if slow else ()), program, memory, str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **STRICT}, timeout=1200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    ran(f"{rounds} times the rounds")
