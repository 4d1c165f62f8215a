"""Importing: a store made of what `to_hdf5` wrote, by a child process with limits, which may come to harm."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import math
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .auditing import Audit, verify
from .errors import LedgerError, StoreError
from .exporting import FILTERS
from .formats import MAX_TEXT
from .shards import PAGE
from .unpacking import exported, unpack

GROWTH = 16  # times the files' bytes that they may take unpacked, unless the caller says more
MEMORY = 1 << 30  # bytes that the child may take beyond what it begins with
SUFFIX = ".emocore.import"
PROGRAM = "from emocore.importing import main; main()"


def from_hdf5(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, limit: int | None = None, timeout: float = 3600.0
) -> Audit:
    """Make an activation store in the folder `out`, new or empty, of the files that `to_hdf5` wrote to `path`.

    It holds the same hook points, rows, places and ledgers; of joined ranks it is one plain store.
    The files are not trusted. A child process reads them, and is ended after `timeout` seconds; what it has made is
    verified, and only then gets its name. Unpacked it may take `limit` bytes, by default 16 times those of the files.
    Raises StoreError naming `path` and what is wrong; nothing is then left behind.
    """
    path, out = Path(path), Path(out)
    try:
        held = sum((path / name).lstat().st_size for name in _files(path))
        out.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(out) and os.listdir(out):
            raise StoreError(f"{out}: is not empty", way_out="Give a new folder.")
        with _begun(out) as (made, handle):
            _run(path, made, GROWTH * held if limit is None else limit, timeout, handle)
            audit = _verified(path, made)
            os.rename(made, out)
        _sync(out.parent)
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: could not be imported to {out}", got=f"{error.strerror} (errno {error.errno})"
        ) from error
    return audit


def _files(path: Path) -> list[str]:
    names = exported(path)
    if not names:
        raise StoreError(f"{path}: no files of a store", expected="rows-00000000-000.h5, ... as `to_hdf5` writes them")
    return names


@contextlib.contextmanager
def _begun(out: Path) -> Iterator[tuple[Path, int]]:
    """A new folder beside `out` and a lock on it, removed at the end where it still has that name.

    So are those of importers that were killed: the lock is theirs and their child's.
    """
    start = f".{out.name}."
    for entry in os.scandir(out.parent):
        if entry.name.startswith(start) and entry.name.endswith(SUFFIX):
            with contextlib.suppress(OSError), _locked(entry.path, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(entry.path)
    made = out.with_name(f"{start}{secrets.token_hex(8)}{SUFFIX}")
    made.mkdir()
    try:
        with _locked(made, fcntl.LOCK_EX) as handle:
            yield made, handle
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: str | Path, how: int) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, how)
        yield handle
    finally:
        os.close(handle)


def _run(path: Path, made: Path, limit: int, timeout: float, lock: int) -> None:
    """Have a child unpack; raises StoreError saying what became of it."""
    command = [sys.executable, "-P", "-c", PROGRAM, str(path), str(made), str(limit), str(timeout)]
    root = Path(__file__).absolute().parents[1]  # last, as the names of a checkout's folders are other packages' too
    known = os.pathsep.join([*filter(None, sys.path), str(root)])
    environment = {**os.environ, "PYTHONPATH": known, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            pass_fds=[lock],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as late:
        raise StoreError(f"{path}: its import was ended", got=f"no end within {timeout:g} s") from late
    if done.returncode < 0:
        got = signal.Signals(-done.returncode).name
        raise StoreError(f"{path}: its import was killed", got=got, way_out="A damaged or hostile file may do that.")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise StoreError(f"{path}: could not be imported", got=said[-1][:2000])


def _verified(path: Path, made: Path) -> Audit:
    try:
        return verify(made)
    except (StoreError, LedgerError) as error:
        raise StoreError(f"{path}: what it holds is no sound store", got=str(error)) from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- in the child


def main() -> None:
    """Unpack under limits what the arguments say; what goes wrong is the last line of stderr."""
    path, made, limit, seconds = sys.argv[1:]
    filters = _filters()
    _confine(int(limit), float(seconds))
    try:
        unpack(Path(path), Path(made), int(limit), filters)
    except Exception as error:
        sys.exit(" ".join(str(error).split()) or type(error).__name__)


def _filters() -> frozenset[int]:
    """Numbers of those that `to_hdf5` compresses with, where they are installed."""
    try:
        plugin = importlib.import_module("hdf5plugin")
    except ImportError:
        return frozenset()
    return frozenset(getattr(plugin, name).filter_id for name, _ in FILTERS.values())


def _confine(limit: int, seconds: float) -> None:
    """Bound what this process may take: memory, processor time, bytes of a file. No core is dumped."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, most in (
        (resource.RLIMIT_AS, held + MEMORY),
        (resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds)),
        (resource.RLIMIT_FSIZE, limit + MAX_TEXT + 2 * PAGE),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (allowed, allowed))
