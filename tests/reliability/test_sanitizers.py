"""The ring's C++ under the sanitisers, driven by ring_driver.cpp: no report."""

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
}


@pytest.mark.parametrize("kind", WITH)
def test_the_ring_is_clean(kind: str, scale: Any, memory: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile with")
    program = memory / "driver"
    files = [HERE / "ring_driver.cpp", *(CSRC / f"{name}.cpp" for name in SOURCES)]
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", "-I", CSRC, *WITH[kind]]
    built = subprocess.run(["g++", *flags, *files, "-o", program, "-ldl"], capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"no library for {kind}")
    assert built.returncode == 0, built.stderr
    strict = {"ASAN_OPTIONS": "detect_stack_use_after_return=1", "TSAN_OPTIONS": "halt_on_error=1"}
    command = [program, memory, str(scale(1, 100))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **strict}, timeout=1200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
