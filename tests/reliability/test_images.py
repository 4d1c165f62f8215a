"""Power cuts: whatever of the unsynced calls has reached the disk, the last commit or the next one is there, whole."""

import itertools
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from .faults import Plan
from .images import Call, Disk, images, recorded
from .subjects import SUBJECTS

every_format = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)

Record = tuple[Disk, Sequence[Call]]


@pytest.fixture(params=["first", "later", "after a kill"])
def start(request: pytest.FixtureRequest, subject: Any, driver: Any, memory: Path) -> int:
    """How many commits there were before in memory / "disk" / "kept"."""
    path = memory / "disk" / "kept"
    path.parent.mkdir()
    if subject.name != "activations":  # which makes its folder itself
        path.mkdir()
    if request.param == "first":
        return 0
    order = {"subject": subject.name, "path": path}
    (*_, end), _ = driver.run("write", **order, first=1, commits=2)
    if request.param == "after a kill":
        (*_, end), _ = driver.run("write", **order, first=3, commits=1)
        driver.run("write", **order, first=4, commits=1, plan=Plan.KILL, at=end["calls"] // 2)
        assert subject.strays(path)
    return max(subject.found(path))


def record(subject: Any, driver: Any, start: int, memory: Path) -> Record:
    """The calls of two commits by one writer."""
    root = memory / "disk"
    disk = Disk.of(root, start)
    order = {"subject": subject.name, "path": root / "kept", "below": root, "first": start + 1, "commits": 2}
    _, status = driver.run("write", **order, plan=Plan.RECORD, record=memory / "record")
    assert status == 0
    return disk, tuple(recorded(memory / "record"))


def restored(image: dict[Path, bytes], root: Path) -> Path:
    """The folder as it is after the cut."""
    shutil.rmtree(root)
    root.mkdir()
    for path, data in image.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return root / "kept"


def check(subject: Any, acknowledged: int, path: Path) -> None:
    found = subject.found(path) if path.exists() else ()
    now = max(found, default=0)
    assert acknowledged <= now <= acknowledged + 1
    assert found == subject.expected(range(1, now + 1))
    assert next(subject.commits(path, now + 1)) == now + 1
    assert subject.found(path) == subject.expected(range(1, now + 2))
    assert subject.before(path) == subject.expected(range(1, now + 1))
    assert not subject.strays(path)


@every_format
def test_every_image_opens(subject: Any, driver: Any, scale: Any, ran: Any, start: int, memory: Path) -> None:
    disk, calls = record(subject, driver, start, memory)
    some = images(disk, calls, random.Random(start))
    count = 0
    for acknowledged, image in itertools.islice(some, scale(100, 1000)):
        check(subject, acknowledged, restored(image, disk.root))
        count += 1
    ran(f"{count:,} images")
    assert count > 50


@every_format
@pytest.mark.parametrize("start", ["later"], indirect=True)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_sync_left_out_is_found(subject: Any, kind: str, driver: Any, start: int, memory: Path) -> None:
    """So that the images are known to find what they are for."""
    disk, calls = record(subject, driver, start, memory)
    folders = {disk.root, disk.root / "kept"}
    careless = [call for call in calls if call.name != "sync" or (call.path in folders) != (kind == "folder")]
    assert len(careless) < len(calls)
    failed = 0
    for acknowledged, image in itertools.islice(images(disk, careless, random.Random(0)), 200):
        try:
            check(subject, acknowledged, restored(image, disk.root))
        except (AssertionError, OSError):
            failed += 1
    assert failed
