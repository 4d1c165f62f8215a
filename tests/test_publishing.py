"""Publishing: whatever fails and whenever the process dies, the old file or the new one is there, whole; so is the one
kept from before."""

import errno
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emocore import publishing
from emocore.errors import StoreError
from emocore.publishing import OTHER, SUFFIX, previous_of, publish

OLDEST, OLD, NEW = b"oldest" * 50_000, b"old" * 100_000, b"new" * 150_000


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    publish(tmp_path / "x.bin", OLD)
    return tmp_path / "x.bin"


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    """Saved twice, as `save` does it."""
    path = tmp_path / "x.bin"
    for data in (OLDEST, OLD):
        publish(path, data, previous_of(path))
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


KEPT = ["x.bin", "x.previous.bin"]


# --- every operation failing


def failing(call: Any, number: int, skip: int = 0) -> Any:
    """`call`, but after `skip` times it raises OSError(number)."""
    calls = iter(range(1 << 30))

    def instead(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= skip:
            raise OSError(number, os.strerror(number))
        return call(*args, **kwargs)

    return instead


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EINTR])
@pytest.mark.parametrize("operation", ["open", "fsync", "replace", "scandir"])
def test_a_failed_operation_is_a_typed_error_and_the_old_file_stays(
    operation: str, number: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, failing(getattr(os, operation), number))
        with pytest.raises(StoreError, match=rf"{saved}: could not be written; got .*\(errno {number}\)") as caught:
            publish(saved, NEW)
    assert isinstance(caught.value.__cause__, OSError)
    assert saved.read_bytes() == OLD
    assert names(saved.parent) == ["x.bin"]
    publish(saved, NEW)  # and goes on when the fault is gone
    assert saved.read_bytes() == NEW


# the new file, what is kept of the old one, and at last the folder
STEPS = [(name, skip) for name in ("open", "fsync") for skip in range(3)] + [("replace", 0), ("replace", 1)]


@pytest.mark.parametrize(("operation", "skip"), STEPS)
def test_a_failed_operation_leaves_the_file_and_one_from_before(
    operation: str, skip: int, twice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a volume without hard links, where there is one more of each."""
    before = previous_of(twice)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", failing(os.link, errno.EPERM))
        patch.setattr(os, operation, failing(getattr(os, operation), errno.EIO, skip))
        with pytest.raises(StoreError, match=r"\(errno 5\)"):
            publish(twice, NEW, before)
    left = {0: (OLD, OLDEST), 1: (OLD, OLD if operation == "replace" else OLDEST), 2: (NEW, OLD)}
    assert (twice.read_bytes(), before.read_bytes()) == left[skip]
    assert names(twice.parent) == KEPT
    publish(twice, NEW * 2, before)
    assert twice.read_bytes() == NEW * 2


def test_a_failed_write_is_a_typed_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(publishing, "open", Full, raising=False)
    with pytest.raises(StoreError, match=r"No space left on device \(errno 28\)\. .*untouched"):
        publish(saved, NEW)
    assert saved.read_bytes() == OLD
    assert names(saved.parent) == ["x.bin"]


def test_a_folder_that_cannot_be_synced_is_said_not_hidden(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(os.fsync, errno.EIO, skip=1))
    with pytest.raises(StoreError, match="written, but a power cut may still undo it"):
        publish(saved, NEW)
    assert saved.read_bytes() == NEW


def test_the_file_is_synced_before_it_is_renamed_and_the_folder_after(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    def noted(name: str, call: Any) -> Any:
        def instead(*args: Any) -> Any:
            kind = "folder" if name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}") else "file"
            log.append(f"{name} {kind}")
            return call(*args)

        return instead

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    publish(saved, NEW)
    assert log == ["fsync file", "replace file", "fsync folder"]


def test_what_was_there_is_kept_before_it_is_replaced(twice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sync of the new file and one of the folder, as where nothing is kept."""
    log: list[str] = []

    def noted(name: str, call: Any) -> Any:
        def instead(*args: Any) -> Any:
            assert twice.read_bytes() == (NEW if "replace x.bin" in log else OLD)
            log.append(f"replace {os.path.basename(args[1])}" if name == "replace" else name)
            return call(*args)

        return instead

    for name in ("fsync", "link", "replace"):
        monkeypatch.setattr(os, name, noted(name, getattr(os, name)))
    publish(twice, NEW, previous_of(twice))
    assert log == ["fsync", "link", "replace x.previous.bin", "replace x.bin", "fsync"]
    assert (twice.read_bytes(), previous_of(twice).read_bytes()) == (NEW, OLD)


def test_an_interrupt_leaves_nothing_behind(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        publish(saved, NEW)
    assert saved.read_bytes() == OLD
    assert names(saved.parent) == ["x.bin"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"{tmp_path}/no/x\.bin: could not be written; got No such file"):
        publish(tmp_path / "no" / "x.bin", NEW)


def test_a_folder_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(StoreError, match="directory"):
        publish(tmp_path / "x.bin", NEW)
    assert names(tmp_path) == ["x.bin"]


# --- what was there before


def test_two_generations_are_kept(twice: Path) -> None:
    assert (twice.read_bytes(), previous_of(twice).read_bytes()) == (OLD, OLDEST)
    publish(twice, NEW, previous_of(twice))
    assert (twice.read_bytes(), previous_of(twice).read_bytes()) == (NEW, OLD)
    assert names(twice.parent) == KEPT


def test_nothing_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    publish(path, OLD, previous_of(path))
    assert names(tmp_path) == ["x.bin"]


def test_the_one_before_is_kept_where_it_was_kept_already(twice: Path) -> None:
    """As a writer leaves it that is killed between the two: both names are of one file."""
    previous_of(twice).unlink()
    os.link(twice, previous_of(twice))
    publish(twice, NEW, previous_of(twice))
    assert (twice.read_bytes(), previous_of(twice).read_bytes()) == (NEW, OLD)
    assert names(twice.parent) == KEPT


def test_without_hard_links_it_is_copied(twice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mode no wider than its own."""
    twice.chmod(0o600)
    monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM))
    publish(twice, NEW, previous_of(twice))
    assert (twice.read_bytes(), previous_of(twice).read_bytes()) == (NEW, OLD)
    assert stat.S_IMODE(previous_of(twice).stat().st_mode) == 0o600
    assert names(twice.parent) == KEPT


def test_what_cannot_be_kept_is_not_replaced(twice: Path) -> None:
    previous_of(twice).unlink()
    previous_of(twice).mkdir()
    with pytest.raises(StoreError, match=r"x\.bin: could not be written; got Is a directory"):
        publish(twice, NEW, previous_of(twice))
    assert twice.read_bytes() == OLD
    assert names(twice.parent) == KEPT


def test_links_to_and_in_the_place_of_what_is_kept(twice: Path, tmp_path: Path) -> None:
    """One to the file is followed; one where the file before goes is replaced, and what it leads to is not touched."""
    (tmp_path / "secret").write_bytes(b"kept")
    previous_of(twice).unlink()
    previous_of(twice).symlink_to(tmp_path / "secret")
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "link.bin").symlink_to(twice)
    publish(tmp_path / "away" / "link.bin", NEW, previous_of(tmp_path / "away" / "link.bin"))
    assert (twice.read_bytes(), previous_of(twice).read_bytes()) == (NEW, OLD)
    assert (tmp_path / "secret").read_bytes() == b"kept"
    assert not previous_of(twice).is_symlink()
    assert names(tmp_path / "away") == ["link.bin"]


def test_its_name() -> None:
    assert previous_of(Path("/a.b/x.y.h5")) == Path("/a.b/x.y.previous.h5")


def test_its_name_where_a_link_has_another_suffix(tmp_path: Path) -> None:
    (tmp_path / "x.h5").symlink_to(tmp_path / "blob")
    assert previous_of(tmp_path / "x.h5") == tmp_path / "blob.previous.h5"


# --- a disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_file_and_the_process(small_disk: Path) -> None:
    path = small_disk / "x.bin"
    publish(path, OLD)
    for _ in range(3):
        with pytest.raises(StoreError, match=r"No space left on device \(errno 28\)"):
            publish(path, NEW * 2)
        assert path.read_bytes() == OLD
        assert names(small_disk) == ["x.bin"]
    publish(path, NEW)  # which fits beside the old one
    assert path.read_bytes() == NEW


# --- killed

CHILD = """
    import os, signal, sys
    from pathlib import Path
    from emocore import publishing

    path, data = Path(sys.argv[1]), [b"old" * 100_000, b"new" * 150_000]
    die_at = int(sys.argv[2])
    moment = 0

    def tick():
        global moment
        moment += 1
        if moment == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly(call):
        def instead(*args, **kwargs):
            tick()
            result = call(*args, **kwargs)
            tick()
            return result
        return instead

    if die_at:
        for name in ("open", "fsync", "link", "replace", "unlink", "close", "fstat", "scandir"):
            setattr(os, name, deadly(getattr(os, name)))
        publishing.fcntl.flock = deadly(publishing.fcntl.flock)
        publishing.publish(path, data[1], publishing.previous_of(path))
    else:
        print("ready", flush=True)
        while True:
            for one in data:
                publishing.publish(path, one, publishing.previous_of(path))
"""


def child(path: Path, die_at: int = 0) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path), str(die_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def check_after_a_kill(path: Path) -> None:
    before = previous_of(path)
    assert path.read_bytes() in (OLD, NEW)
    assert before.read_bytes() in (OLDEST, OLD, NEW)
    assert all(name in KEPT or name.endswith((SUFFIX, OTHER)) for name in names(path.parent))
    publish(path, OLDEST, before)  # sweeps up
    publish(path, OLD, before)
    assert names(path.parent) == KEPT
    assert (path.read_bytes(), before.read_bytes()) == (OLD, OLDEST)


def test_killed_before_or_after_any_call_the_file_is_the_old_or_the_new_one(twice: Path) -> None:
    died = 0
    for die_at in range(1, 80):
        with child(twice, die_at) as process:
            code = process.wait()
        pair = twice.read_bytes(), previous_of(twice).read_bytes()
        assert pair in ((OLD, OLDEST), (OLD, OLD), (NEW, OLD))
        check_after_a_kill(twice)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        died += 1
    else:
        pytest.fail("the child never came to its end")
    # scan, open, lock, stat, sync; link, rename, unlink; rename, unlink, close; then open, sync, close the folder (the
    # unlinks fail: no after)
    assert died == 2 * 14 - 2


def test_killed_at_any_time_the_file_is_the_old_or_the_new_one(twice: Path) -> None:
    for i in range(24):
        with child(twice) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(0.0007 * i)
            process.kill()
        check_after_a_kill(twice)


# --- several writers


def test_a_living_writer_s_temporary_is_not_swept(saved: Path) -> None:
    with publishing._temporary(saved.parent) as (_, name):
        publish(saved, NEW)
        assert os.path.exists(name)
    assert names(saved.parent) == ["x.bin"]


def test_a_dead_writer_s_temporary_is_swept_and_others_files_are_not(saved: Path) -> None:
    dead = saved.parent / f".0123{SUFFIX}"
    dead.write_bytes(b"half")
    others = [saved.parent / name for name in (f"kept{SUFFIX}", ".kept.tmp", f".folder{SUFFIX}")]
    for path in others[:2]:
        path.write_bytes(b"mine")
    others[2].mkdir()
    publish(saved, NEW)
    assert not dead.exists()
    assert all(path.exists() for path in others)


def test_a_file_on_its_way_to_be_kept_is_swept_when_its_writer_is_gone(twice: Path) -> None:
    with publishing._temporary(twice.parent) as (_, name):
        theirs = Path(publishing._other(name))
        os.link(twice, theirs)
        dead = twice.parent / f".0123{OTHER}"
        os.link(twice, dead)
        publish(twice, NEW, previous_of(twice))
        assert theirs.read_bytes() == OLD
        assert not dead.exists()
    publish(twice, NEW, previous_of(twice))
    assert names(twice.parent) == KEPT


def test_a_link_named_like_a_temporary_is_not_followed(saved: Path) -> None:
    secret = saved.parent / "secret"
    secret.write_bytes(b"kept")
    link = saved.parent / f".0123{SUFFIX}"
    link.symlink_to(secret)
    publish(saved, NEW)
    assert secret.read_bytes() == b"kept"
    assert link.is_symlink()


def test_writers_at_once_leave_one_whole_file_and_one_from_before(twice: Path) -> None:
    whole = [bytes([i]) * 100_000 for i in range(6)]
    errors: list[BaseException] = []

    def write(data: bytes) -> None:
        try:
            for _ in range(15):
                publish(twice, data, previous_of(twice))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(data,)) for data in whole]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert twice.read_bytes() in (OLD, *whole)
        assert previous_of(twice).read_bytes() in (OLDEST, OLD, *whole)
    for thread in threads:
        thread.join()
    assert not errors
    assert twice.read_bytes() in whole
    assert previous_of(twice).read_bytes() in whole
    assert names(twice.parent) == KEPT
