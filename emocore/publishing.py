"""One durable publish for every file: a crash at any point leaves the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .errors import StoreError, said

SUFFIX = ".emocore.tmp"


class UnsyncedError(StoreError):
    """The file stands, but its folder could not be synced."""


def publish(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, fsync it, rename it over `path`, fsync the folder; the mode follows the umask.

    A link is followed. What earlier writers left in the folder when they were killed is removed. Raises StoreError
    naming path and errno; unless only the last fsync failed, the file that was there before is then untouched, and no
    temporary stays.
    """
    target = Path(os.path.realpath(path))
    try:
        sweep(target.parent)
        with _temporary(target.parent) as (handle, name), open(handle, "wb", closefd=False) as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
            os.replace(name, target)
    except OSError as error:
        raise StoreError(
            f"{path}: could not be written",
            got=said(error),
            way_out="What was saved there before is untouched; free space or choose another folder, and save again.",
        ) from error
    try:
        _sync(target.parent)
    except OSError as error:
        raise UnsyncedError(
            f"{path}: written, but a power cut may still undo it: its folder could not be synced",
            got=said(error),
            way_out="Save again, here or in another folder.",
        ) from error


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[tuple[int, str]]:
    """A new locked file in `folder`: its handle and name; removed at the end where it still has that name."""
    while True:
        name = os.path.join(folder, f".{secrets.token_hex(8)}{SUFFIX}")
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _lock(handle)
            if not os.fstat(handle).st_nlink:
                continue  # another writer's sweep came between
            try:
                yield handle, name
            finally:
                with contextlib.suppress(OSError):  # what stays, the next sweep finds
                    os.unlink(name)
            return
        finally:
            shut(handle)


def sweep(folder: Path) -> None:
    """Remove temporaries whose writer is gone: a living one holds a lock on its own."""
    for entry in os.scandir(folder):
        if entry.name.startswith(".") and entry.name.endswith(SUFFIX):
            with contextlib.suppress(OSError):
                handle = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    shut(handle)


def _lock(handle: int) -> None:
    # where the filesystem has no locks, no sweep can take one either
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        shut(handle)


def shut(handle: int) -> None:
    """Close a handle of what is synced, given up, or was only read: that it fails says nothing of the file."""
    with contextlib.suppress(OSError):
        os.close(handle)
