"""Writers that are killed: what was acknowledged is there, whole, and the next writer sweeps up after the dead one."""

import itertools
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .faults import Plan
from .subjects import SUBJECTS

every_format = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)


def numbers(said: list[Any]) -> list[int]:
    return [one for one in said if type(one) is int]


def go_on(subject: Any, path: Path, before: int) -> int:
    """One more commit, by the next writer, which sweeps up."""
    list(itertools.islice(subject.commits(path, before + 1), 1))
    assert subject.found(path) == subject.expected(range(1, before + 2))
    assert subject.before(path) == subject.expected(range(1, before + 1))
    assert not subject.strays(path)
    return before + 1


def two_commits(subject: Any, driver: Any, path: Path) -> float:
    """Seconds that a writer takes for them, at its best of some; at most 0.05."""
    taken = [0.05]
    for _ in range(8):
        shutil.rmtree(path, ignore_errors=True)
        start = time.monotonic()
        driver.run("write", subject=subject.name, path=path, first=1, commits=2)
        taken.append(time.monotonic() - start)
    return min(taken)


@every_format
def test_killed_at_any_moment(subject: Any, driver: Any, scale: Any, ran: Any, tmp_path: Path) -> None:
    """SIGKILL at random moments of writers that commit as fast as they can, one after the other."""
    rng, kills, at_work, path, before = random.Random(0), scale(200, 10_000), 0, tmp_path / "kept", 0
    longest = two_commits(subject, driver, path)
    for kill in range(kills):
        if kill % 10 == 0:  # what is there is read in full every time: not too much of it
            shutil.rmtree(path, ignore_errors=True)
            before = 0
        order = {"subject": subject.name, "path": path, "first": before + 1}
        said, status = driver.run("write", **order, seconds=rng.random() * longest)
        assert status == -signal.SIGKILL
        acknowledged = max(numbers(said), default=before)
        found = subject.found(path) if path.exists() else ()
        before = max(found, default=0)
        assert acknowledged <= before <= acknowledged + 1
        assert found == subject.expected(range(1, before + 1))
        at_work += bool(found and subject.strays(path))
        if kill % 5 == 4:
            before = go_on(subject, path, before)
    ran(f"{kills:,} kills within {longest * 1e3:.0f} ms, {at_work:,} left something to sweep")
    assert at_work > kills // 20


@every_format
def test_readers_beside_a_writer(subject: Any, driver: Any, scale: Any, ran: Any, tmp_path: Path) -> None:
    """They see one commit after the other, each of them whole, also the one that is killed."""
    path, seconds, seen = tmp_path / "kept", scale(0.7, 10.0), [0]
    driver.start("write", subject=subject.name, path=path, first=1, seconds=seconds)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = subject.seen(path) if path.exists() else ()
        seen.append(max(found, default=0))
        assert found == subject.expected(range(1, seen[-1] + 1))
        assert seen[-1] >= seen[-2]
    said, status = driver.finish()
    assert status == -signal.SIGKILL
    assert max(numbers(said)) <= max(subject.found(path)) <= max(numbers(said)) + 1
    ran(f"{len(seen) - 1:,} times read, {len({*seen}) - 1:,} commits seen")
    assert len({*seen}) > 1


def killed_at_each_call(subject: Any, driver: Any, start: Path, path: Path) -> Iterator[set[str]]:
    """Kill the writer of commit 3 at one call after the other, until there is none; what strays each leaves."""
    for at in itertools.count(1):
        shutil.copytree(start, path)
        order = {"subject": subject.name, "path": path, "first": 3, "commits": 1}
        said, status = driver.run("write", **order, plan=Plan.KILL, at=at)
        if status == 0:
            assert at > 1
            assert numbers(said) == [3]
            shutil.rmtree(path)
            return
        assert status == -signal.SIGKILL
        found = subject.found(path)
        assert found in (subject.expected([1, 2]), subject.expected([1, 2, 3]))
        assert max(found) >= max(numbers(said), default=0)
        yield subject.strays(path)
        go_on(subject, path, max(found))
        shutil.rmtree(path)


@every_format
def test_killed_at_every_call_of_a_commit_and_of_a_recovery(subject: Any, driver: Any, ran: Any, memory: Path) -> None:
    start, path, worst = memory / "start", memory / "kept", memory / "worst"
    driver.run("write", subject=subject.name, path=start, first=1, commits=2)
    most = 0
    for strays in killed_at_each_call(subject, driver, start, path):
        if len(strays) > most:
            most = len(strays)
            shutil.rmtree(worst, ignore_errors=True)
            shutil.copytree(path, worst)
    assert most
    kills = sum(1 for _ in killed_at_each_call(subject, driver, worst, path))
    ran(f"{kills} kills in a recovery")
    assert kills > 10
