"""Generations: the manifests of a folder, of which a crash leaves the last one or the next.

`manifest-00000007.json` is generation 7. A commit publishes the next; the two newest are kept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from .errors import StoreError, said
from .formats import MAX_TEXT
from .manifest import Manifest
from .publishing import publish

KEPT = 2

_NAME = re.compile(r"manifest-(\d{8,})\.json", re.ASCII)


def path_of(folder: Path, generation: int) -> Path:
    return folder / f"manifest-{generation:08}.json"


def advance(folder: Path, manifest: Manifest) -> None:
    """Publish a generation and remove those before the last, if they can be; raises StoreError."""
    publish(path_of(folder, manifest.generation), manifest.to_bytes())
    with contextlib.suppress(OSError):
        for generation in generations(folder):
            if generation <= manifest.generation - KEPT:
                path_of(folder, generation).unlink()


def generations(folder: Path) -> list[int]:
    """Numbers of the generations that are there, newest first."""
    try:
        found = [_NAME.fullmatch(name) for name in os.listdir(folder)]
    except OSError as error:
        raise StoreError(f"{folder}: could not be read", got=said(error)) from error
    return sorted((int(match[1]) for match in found if match), reverse=True)


@dataclass(frozen=True)
class Newest:
    """The newest generation that is whole, and why newer ones are not."""

    manifest: Manifest
    damaged: tuple[str, ...]


def newest(folder: Path, generation: int | None = None) -> Newest | None:
    """The newest whole generation, or the one asked for; None where there is none at all.

    Raises StoreError when there are some and none is whole, or one could not be read.
    """
    for _ in range(8):  # a writer may remove what was listed
        listed = generations(folder) if generation is None else [generation]
        damaged: list[str] = []
        for number in listed:
            try:
                return Newest(load(path_of(folder, number), number), tuple(damaged))
            except FileNotFoundError:
                continue
            except StoreError as error:
                damaged.append(str(error))
            except OSError as error:  # it may be whole: an older one must not be taken for the last
                raise StoreError(f"{path_of(folder, number)}: could not be read", got=said(error)) from error
        if damaged:
            raise StoreError(
                f"{folder}: no manifest is whole", got=damaged[0], way_out="Restore the folder from a copy."
            )
        if not listed:
            return None
    raise StoreError(f"{folder}: its manifests went as they were read", got=f"generation {generation}")


def load(path: Path, generation: int) -> Manifest:
    """One generation from its file; raises StoreError naming it, OSError where it is not there or cannot be read."""
    try:
        found = Manifest.from_bytes(_bytes(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise StoreError(f"{path}: not a manifest, or damaged", got=f"{type(error).__name__}: {error}") from error
    if found.generation != generation:
        raise StoreError(f"{path}: another generation's manifest", got=found.generation)
    return found


def _bytes(path: Path) -> bytes:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("a link") from error
        raise
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_TEXT:
            raise ValueError(f"no regular file of at most {MAX_TEXT} bytes")
        return file.read(MAX_TEXT + 1)
