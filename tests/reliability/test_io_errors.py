"""Every call on a file fails, once and for ever: a typed error names file and errno, and nothing committed is lost.

What the system may ask for again, interrupted and short writes, is done again without a word.
"""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from .faults import Plan
from .subjects import SUBJECTS

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ENOMEM)
WRITERS = [("activations", "held"), *((name, "anew") for name in SUBJECTS)]

every_writer = pytest.mark.parametrize(("subject", "writers"), WRITERS)


def check(subject: Any, trial: dict[str, Any], path: Path, error: int) -> None:
    """The third of four commits met a fault."""
    _, before, after, later, last = (tuple(found) for found in trial["found"])
    met = after == subject.expected([1, 2, 3])
    assert before == subject.expected([1, 2])
    assert met or after == before
    assert later == subject.expected([1, 2, 3, 4] if met else [1, 2, 4])
    assert last == subject.expected([*later, 5])
    assert not trial["strays"]
    if trial["error"] is None:
        assert met
        return
    assert f"{os.strerror(error)} (errno {error})" in trial["error"]
    assert f"{path}/" in trial["error"]
    assert not met or "written, but" in trial["error"]


def endured(driver: Any, path: Path, **order: Any) -> list[dict[str, Any]]:
    """What became of each trial, in a process that lives on and keeps no handle."""
    trials, status = driver.run("endure", path=path, **order)
    assert status == 0
    assert trials[-1]["handles"] == trials[0]["handles"]
    return trials


@every_writer
@pytest.mark.parametrize("every", [False, True], ids=["once", "for ever"])
def test_a_call_fails(subject: str, writers: str, every: bool, driver: Any, scale: Any, ran: Any, memory: Path) -> None:
    for error in scale([errno.ENOSPC if every else errno.EIO], ERRORS):
        step = scale(3, 1) if subject == "activations" else 1  # a save has few calls
        order = {"subject": subject, "writers": writers, "step": step, "every": every, "error": error}
        trials = endured(driver, memory, **order, plan=Plan.FAIL)
        ran(f"{errno.errorcode[error]} at {len(trials)} calls")
        for trial in trials:
            check(SUBJECTS[subject], trial, memory, error)
        needed = {"write", "pwrite", "ftruncate", "fsync", "rename"}
        assert {"open", "fstat"} <= {trial["call"] for trial in trials}
        assert all(trial["error"] for trial in trials if trial["call"] in needed)


@every_writer
def test_an_interrupted_call_is_done_again_or_refused(
    subject: str, writers: str, driver: Any, scale: Any, ran: Any, memory: Path
) -> None:
    order = {"subject": subject, "writers": writers, "step": scale(2, 1), "every": False, "error": errno.EINTR}
    trials = endured(driver, memory, **order, plan=Plan.FAIL)
    ran(f"{len(trials)} calls interrupted")
    for trial in trials:
        check(SUBJECTS[subject], trial, memory, errno.EINTR)
    assert not {trial["call"] for trial in trials if trial["error"]} & {"open", "read", "write", "pwrite", "fsync"}


@every_writer
def test_writes_fall_short(subject: str, writers: str, driver: Any, memory: Path) -> None:
    order = {"subject": subject, "writers": writers, "step": 1000, "every": True, "error": 0}
    (trial,) = endured(driver, memory, **order, plan=Plan.SHORT)
    check(SUBJECTS[subject], trial, memory, 0)
    assert trial["error"] is None


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("every", [False, True], ids=["once", "for ever"])
def test_a_call_of_a_reader_fails(subject: str, every: bool, driver: Any, ran: Any, memory: Path) -> None:
    """What it asks of a file, maps or reads: a typed error or exactly what is there, and again so without the fault."""
    for error in (errno.EIO, errno.ENOMEM):
        order = {"subject": subject, "path": memory / str(error), "every": every, "error": error}
        trials, status = driver.run("peruse", **order)
        assert status == 0
        assert trials[-1]["handles"] == trials[0]["handles"]
        ran(f"{errno.errorcode[error]} at {len(trials)} calls")
        for trial in trials:
            whole = list(SUBJECTS[subject].expected([1, 2]))
            assert trial["again"] == whole
            assert (trial["found"] or whole) == whole
            if trial["error"] is not None:
                assert f"{os.strerror(error)} (errno {error})" in trial["error"]
                assert f"{memory}/" in trial["error"]
        if subject == "activations":
            assert {"fstat", "mmap", "open", "pread"} <= {trial["call"] for trial in trials if trial["error"]}
