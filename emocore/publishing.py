"""One durable publish for every file: a crash at any point leaves the old file or the new one, whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import StoreError, said

SUFFIX = ".emocore.tmp"
OTHER = ".emocore.old"  # instead of SUFFIX: what was there before, on its way to the name that it is kept under


class UnsyncedError(StoreError):
    """The file stands, but its folder could not be synced."""


def publish(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Write `data` beside `path`, fsync it, rename it over `path`, fsync the folder; the mode follows the umask.

    A regular file that was there is then `previous`, where that is given: it keeps its name until `data` takes it. A
    link is followed. What earlier writers left in the folder when they were killed is removed. Raises StoreError naming
    path and errno; unless only the last fsync failed, the file that was there before is then untouched, and no
    temporary stays.
    """
    target = Path(os.path.realpath(path))
    try:
        sweep(target.parent)
        with _temporary(target.parent) as (handle, name), open(handle, "wb", closefd=False) as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
            if previous is not None and target.is_file():
                _keep(target, previous, _other(name))
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


def previous_of(path: Path) -> Path:
    """Where `save` keeps what `path` held before, beside the file itself where `path` is a link.

    >>> previous_of(Path("/acts/v.safetensors"))
    PosixPath('/acts/v.previous.safetensors')
    """
    target = Path(os.path.realpath(path))
    return target.with_name(f"{target.name.removesuffix(path.suffix)}.previous{path.suffix}")


def _keep(target: Path, previous: Path, name: str) -> None:
    """Give the file at `target` the name `previous` too, by way of `name`."""
    try:
        try:
            os.link(target, name)
        except OSError:  # a volume without hard links, or another user's file
            _copy(target, name)
        os.replace(name, previous)
    finally:
        with contextlib.suppress(OSError):  # still there where `previous` was the same file already
            os.unlink(name)


def _copy(source: Path, name: str) -> None:
    """A durable copy, of a mode no wider than the source's."""
    with open(source, "rb") as old:
        mode = os.fstat(old.fileno()).st_mode & 0o666
        with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as new:
            shutil.copyfileobj(old, new, 1 << 20)
            new.flush()
            os.fsync(new.fileno())


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
    names = [entry.path for entry in os.scandir(folder) if entry.name.startswith(".")]
    for name in names:
        if name.endswith(SUFFIX):
            with contextlib.suppress(OSError):
                handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name)
                finally:
                    shut(handle)
    for name in names:
        # its writer needs it no longer once the temporary beside it is gone; a lock would be on the saved file itself
        if name.endswith(OTHER) and not os.path.lexists(name.removesuffix(OTHER) + SUFFIX):
            with contextlib.suppress(OSError):
                os.unlink(name)


def _other(name: str) -> str:
    return name.removesuffix(SUFFIX) + OTHER


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
