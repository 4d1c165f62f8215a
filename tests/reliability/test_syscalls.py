"""Killed at every system call of a commit and of a recovery, also those that no call of the C library shows."""

import itertools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from .subjects import SUBJECTS

every_format = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)

ON_FILES = "openat mkdir getdents64 flock read pread64 write pwrite64 ftruncate fsync rename renameat unlink unlinkat"
ON_MORE = "link close mmap munmap madvise futex lseek fstat newfstatat fcntl dup clone3 clone"


def traced(child: int, inject: str) -> "subprocess.Popen[str]":
    """strace at work on a stopped process."""
    command = ["strace", "-f", "-qq", "-o", os.devnull, "-p", str(child), "-e", f"inject={inject}"]
    strace = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(2000):
        if "TracerPid:\t0" not in Path(f"/proc/{child}/status").read_text():
            return strace
        if strace.poll() is not None:
            break
        time.sleep(0.001)
    strace.kill()
    pytest.skip(f"no process can be traced here: {strace.communicate()[0].strip()}")


@pytest.fixture(autouse=True)
def _strace() -> None:
    if not shutil.which("strace"):
        pytest.skip("no strace")


def killed(driver: Any, order: dict[str, Any], inject: str) -> tuple[list[int], int]:
    """The commits that a traced writer acknowledged, and how it ended."""
    child = driver.start("write", **order, stopped=True)
    assert driver.line() == "born"
    while "State:\tT" not in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.001)
    with traced(child, inject):
        os.kill(child, signal.SIGCONT)
        said, status = driver.finish()
    return [one for one in said if type(one) is int], status


@every_format
def test_killed_at_every_system_call(subject: Any, driver: Any, scale: Any, ran: Any, memory: Path) -> None:
    start, path, kills = memory / "start", memory / "kept", 0
    order = {"subject": subject.name, "path": path, "first": 3, "commits": 1}
    driver.run("write", **order | {"path": start, "first": 1, "commits": 2})
    driver.run("write", **order | {"path": start, "commits": None}, seconds=0.004)  # leaves something to recover from
    before = max(subject.found(start))
    for call in scale("fsync link rename renameat pwrite64 unlink", f"{ON_FILES} {ON_MORE}").split():
        for at in itertools.count(1):
            shutil.copytree(start, path)
            said, status = killed(driver, order | {"first": before + 1}, f"?{call}:signal=SIGKILL:when={at}")
            found = subject.found(path)
            now = max(found)
            assert max(said, default=before) <= now <= before + 1
            assert found == subject.expected(range(1, now + 1))
            assert next(subject.commits(path, now + 1)) == now + 1
            assert subject.found(path) == subject.expected(range(1, now + 2))
            assert subject.before(path) == subject.expected(range(1, now + 1))
            assert not subject.strays(path)
            shutil.rmtree(path)
            if status == 0:
                break
            assert status == -signal.SIGKILL
            kills += 1
    ran(f"{kills} kills")
    assert kills > scale(1, 20)
