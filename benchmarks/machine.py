"""The machine: which device the cases run on, what stands on it, its clock, and memory that is poisoned."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import emocore
from emocore.benching import HAMPERING
from emocore.errors import NativeMissingError
from emocore.native import extension

from .shapes import SCALES, Scale

ROOT = Path(__file__).resolve().parent.parent
HEAD_START = 2_000_000  # cycles, about a millisecond, that the device sleeps while the host queues a call
# A library's threads look for more work before they sleep, OpenBLAS's for 2^26 cycles, and so take the next one's core.
IDLE = 0.2  # seconds before a call, until all of them sleep
LONG = 0.1  # seconds, of which waking one's own threads is no part worth a second call

# The libraries of the extra `peers`.
PEERS = ("concept-erasure", "scikit-learn", "torch-incremental-pca", "torchmetrics", "nnsight", "steering-vectors")


@dataclass(frozen=True)
class Timed:
    """A call, what is open around it without being timed, and whether the host's launch is left out of its time."""

    call: Callable[[], Any]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    hides_launch: bool = False
    computes: bool = False  # waits for nothing: on one thread of a CPU its clock is CPU time


@dataclass(frozen=True)
class Machine:
    """Where cases run. `dry` runs the GPU's cases on the CPU, where its kernels are interpreted."""

    device: torch.device
    dry: bool
    scale: Scale

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def gpu(self) -> bool:
        """Whether the cases are those of a GPU."""
        return self.cuda or self.dry

    @property
    def name(self) -> str:
        """What the device calls itself."""
        return torch.cuda.get_device_name(self.device) if self.cuda else processor()

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers on the device."""
        return torch.Generator(self.device).manual_seed(seed)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, calls: Sequence[Timed]) -> list[float]:
        """How long each call took, run once each in order; on a GPU between two events of its own."""
        if not self.cuda:
            return [_taken(timed, torch.get_num_threads() > 1 and not self.scale.tiny) for timed in calls]
        pairs = [_events(timed) for timed in calls]
        self.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def reset_peak(self) -> None:
        """Give back what the last case held, so that the next finds the memory."""
        if self.cuda:
            torch.cuda.empty_cache()


def _taken(timed: Timed, teams: bool) -> float:
    """Of `teams` of threads, once everybody else's sleep and a call has woken its own."""
    with timed.around():
        if teams:
            time.sleep(IDLE)
            first = _clocked(timed.call, time.perf_counter)
            if first > LONG:
                return first
        alone = timed.computes and torch.get_num_threads() == 1
        return _clocked(timed.call, time.process_time if alone else time.perf_counter)


def _clocked(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _events(timed: Timed) -> tuple[Any, Any]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with timed.around():
        if timed.hides_launch:
            torch.cuda._sleep(HEAD_START)
        start.record()
        timed.call()
        end.record()
    return start, end


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer, so that an entry that is not written shows."""
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # this is what makes torch fill it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)


# --- what stands here


def environment(machine: Machine) -> dict[str, Any]:
    """Device, driver, versions and commit: what a figure needs beside it to mean something."""
    found: dict[str, Any] = {
        "device": machine.name,
        "driver": driver() if machine.cuda else None,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],  # of others, before the run
        "versions": versions(),
        "commit": commit(),
        "float32 matmul": torch.get_float32_matmul_precision(),
        "isa": isa(),
        "settings": {name: os.environ[name] for name in HAMPERING if name in os.environ},
    }
    if machine.cuda:
        properties = torch.cuda.get_device_properties(machine.device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def versions() -> dict[str, str | None]:
    """Of Python and of what computes; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "emocore": emocore.__version__}
    for name in ("torch", "triton", "numpy", "scipy", "transformers", *PEERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def isa() -> str | None:
    """The instruction set that computes on the CPU; None before the extension is built."""
    try:
        return extension().isa()
    except NativeMissingError:
        return None


def driver() -> str | None:
    """The NVIDIA driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    text = _said(query)
    return text.splitlines()[0] if text else None


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside of a repository."""
    if not (ROOT / ".git").exists():  # an installed package, perhaps inside somebody's checkout
        return None
    head = _said(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    changed = _said(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{head}+" if head and changed else head


def processor() -> str:
    """The CPU's model name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    named = re.search(r"model name\s*: (.+)", text)
    return named[1] if named else platform.processor() or platform.machine()


def _said(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    here = Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"), False, SCALES["full"])
    print(json.dumps(environment(here), indent=1))
