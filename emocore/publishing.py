"""One durable publish for every file: a crash at any point leaves the old file or the new one, whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .errors import StoreError


def publish(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, fsync it, give it the umask's mode, rename it over `path`, fsync the folder.

    Raises StoreError naming path and errno; the file that was there before is then untouched and no temporary stays.
    """
    folder = path.parent
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(folder)
    except OSError as error:
        raise StoreError(
            f"{path}: could not be written",
            got=f"{error.strerror} (errno {error.errno})",
            way_out="What was saved there before is untouched; free space or choose another folder, and save again.",
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    # the umask can only be read by setting it
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
