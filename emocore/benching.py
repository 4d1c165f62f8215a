"""Benching: the benchmarks in a process of their own, in whose environment nothing holds a library back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ArgumentError

# What tells a library to take the processor for another, or to keep to fewer threads than it is given.
HAMPERING = (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "NPY_DISABLE_CPU_FEATURES",
)
NEEDED = ("pytest", "pytest_benchmark", "threadpoolctl", "scipy")
# -P: whatever stands in the folder that this is run from is not to be imported. No settings but these.
PYTEST = (
    *("-P", "-m", "pytest", "-c", os.devnull, "--import-mode=importlib", "-o", "python_files=bench_*.py"),
    *("-q", "-rfE", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-quiet", "--disable-warnings"),
)
HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """The benchmarks: inside of an installed package, beside it in a checkout."""
    for found in (HERE / "benchmarks", HERE.parent / "benchmarks"):
        if (found / "conftest.py").exists():
            return found
    raise ArgumentError("benchmarks: this installation has none", way_out="Install a wheel, or run from a checkout.")


def files(only: Sequence[str]) -> list[Path]:
    """bench_<name>.py of every name, all of them for no name."""
    known = {path.stem.removeprefix("bench_"): path for path in sorted(folder().glob("bench_*.py"))}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ArgumentError("only: no such benchmark", expected=f"some of {', '.join(known)}", got=", ".join(unknown))
    return [known[name] for name in only or known]


def unhampered(given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(the environment without what hampers, or comes from an outer pytest; what was dropped of the first)."""
    dropped = {name: given[name] for name in HAMPERING if name in given}
    kept = {name: value for name, value in given.items() if name not in dropped and not name.startswith("PYTEST_")}
    return kept, dropped


def run(only: Sequence[str], options: Sequence[str]) -> int:
    """Run some benchmarks with pytest options of theirs; returns the exit status."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(
            "bench: a package is missing",
            got=", ".join(missing),
            way_out="Run `make`, or install the wheel with its extra: emocore-engine[bench].",
        )
    environment, dropped = unhampered(os.environ)
    settings = [f"--dropped={name}={value}" for name, value in dropped.items()]
    command = [sys.executable, *PYTEST, f"--rootdir={folder().parent}", *map(str, files(only)), *options, *settings]
    return subprocess.run(command, env=environment, check=False).returncode
