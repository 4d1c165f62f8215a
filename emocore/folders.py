"""Folders: a folder of shards and manifests in the hands of its one writer."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from . import publishing
from .errors import EmocoreError, StoreError, said
from .manifest import SHARD
from .shards import OPEN

LOCK = "lock"


class Folder:
    """The folder `path`, made where it is missing and locked until `close`; raises StoreError naming another writer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self.said():
            path.mkdir(parents=True, exist_ok=True)
            _sync(path.parent)
            self.handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._guard = _locked(path)
            except BaseException:
                publishing.shut(self.handle)
                raise

    @contextlib.contextmanager
    def said(self) -> Iterator[None]:
        """An OSError inside is raised as StoreError naming the folder and the errno."""
        try:
            yield
        except EmocoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{self.path}: could not be written",
                got=said(error),
                way_out="What was committed is untouched; free space or repair the volume, and go on.",
            ) from error

    def sweep(self, listed: Collection[str], sealed: bool) -> tuple[int, int]:
        """Remove shards of dead writers, of sealed ones only where asked: how many, and the next free shard number."""
        swept, last = 0, -1
        with self.said():
            publishing.sweep(self.path)
            for name in os.listdir(self.handle):
                match = SHARD.fullmatch(name.removesuffix(OPEN))
                if match is None:
                    continue
                if name not in listed and (name.endswith(OPEN) or sealed):
                    os.unlink(name, dir_fd=self.handle)
                    swept += 1
                else:
                    last = max(last, int(match["number"]))
        return swept, last + 1

    def sync(self) -> None:
        """Make the names of files durable."""
        os.fsync(self.handle)

    def close(self) -> None:
        """Let another writer in."""
        publishing.shut(self._guard)
        publishing.shut(self.handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        publishing.shut(handle)


def _locked(path: Path) -> int:
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError:
        other = os.pread(handle, 32, 0).decode(errors="replace").strip()
        publishing.shut(handle)
        raise StoreError(
            f"{path}: somebody else is writing to it",
            got=f"process {other}",
            way_out="Close that store first, or give every writer its own rank=.",
        ) from None
    except BaseException:
        publishing.shut(handle)
        raise
    return handle
