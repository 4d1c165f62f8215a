"""Shards: tensors in one sealed safetensors file whose data starts on a page, written through a ring, read in place.

What a shard holds follows from the manifest that lists it, and so does its header, to the byte. A reader compares the
two instead of believing the file: nothing of a damaged or hostile header is ever parsed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import ArgumentError, StoreError, said
from .native import extension
from .publishing import shut
from .ring import Offered, Policy, Ring

FORMAT = 1
PAGE = 4096  # the header's bytes, so that data can be written without the page cache and mapped by pages
OPEN = ".open"  # behind the name of a shard that is not sealed

NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}

RESTORE = "Restore the folder from a copy: something else than emocore has changed it."

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Tensors of a shard in the order of their bytes, {name: (dtype, shape)}, and what it says of itself."""

    tensors: Mapping[str, tuple[torch.dtype, Shape]]
    about: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of data behind the header."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())

    def header(self) -> bytes:
        """The first page of the file: safetensors' header, filled up with spaces. Raises ArgumentError if too long."""
        entries: dict[str, object] = {"__metadata__": {"emocore": str(FORMAT), **self.about}}
        at = 0
        for name, (dtype, shape) in self.tensors.items():
            end = at + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(entries).encode()
        if len(text) > PAGE - 8:
            raise ArgumentError("hook point: its name is too long for a shard", got=f"{len(text)} bytes of header")
        return (PAGE - 8).to_bytes(8, "little") + text.ljust(PAGE - 8)


class Draft:
    """A shard that is being written: data goes through the ring, the name and the header come when it is sealed."""

    def __init__(self, folder: int, file: str, ring: Ring) -> None:
        self.file, self._folder = file, folder
        self._plain = os.open(file + OPEN, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        try:
            direct = _direct(folder, file + OPEN)
            try:
                self._stream = ring.stream(direct or self._plain, PAGE, direct=direct is not None)
            finally:
                if direct is not None:  # the stream has its own
                    shut(direct)
        except BaseException:
            self.abandon()
            raise
        self._stream.name = _path(folder, file)

    def append(self, data: Tensor) -> None:
        """Take the bytes of `data`."""
        self._stream.append(data)

    def offer(self, rows: Tensor, policy: Policy) -> Offered:
        """Take as many of rows [N, D] as the policy has it, the first ones."""
        return policy.offer(self._stream, rows)

    def finish(self, layout: Layout) -> int:
        """Write everything, header included, and return the CRC32C of the data; `sync` makes it durable."""
        self._stream.flush()
        os.ftruncate(self._plain, PAGE + layout.size)
        _write(self._plain, layout.header())
        return self._stream.crc32c

    def sync(self) -> None:
        """Make the finished file durable."""
        os.fsync(self._plain)

    def seal(self) -> None:
        """Give the synced file its name."""
        os.rename(self.file + OPEN, self.file, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._close()

    def abandon(self) -> None:
        """Remove what was written, whatever its name is by now; quiet about what cannot be removed."""
        for name in (self.file, self.file + OPEN):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._folder)
        self._close()

    def _close(self) -> None:
        handle, self._plain = self._plain, -1
        if handle >= 0:
            shut(handle)


def _write(handle: int, data: bytes) -> None:
    """All of it at the start of the file, through short writes."""
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], done)


def _direct(folder: int, file: str) -> int | None:
    """A handle that bypasses the page cache, None where the volume has none."""
    try:
        return os.open(file, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None


def mapped(folder: int, file: str, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a sealed shard in place, in private memory: writing to one changes no file.

    Raises StoreError unless it is a regular file of exactly the bytes that `layout` says, header included.
    """
    data, tensors, at = _data(folder, file, layout), {}, 0
    for name, (dtype, shape) in layout.tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        tensors[name] = data[at:end].view(dtype).reshape(shape)
        at = end
    return tensors


def checksum(folder: int, file: str, layout: Layout) -> int:
    """CRC32C of a sealed shard's data; raises StoreError as `mapped` does."""
    found: int = extension().crc32c(_data(folder, file, layout).numpy())
    return found


def check_file(folder: int, file: str, layout: Layout) -> None:
    """Raise StoreError unless `file` is a regular file of the bytes that `layout` says."""
    with opened(folder, file) as handle:
        _check_size(handle, _path(folder, file), layout)


def _data(folder: int, file: str, layout: Layout) -> Tensor:
    with opened(folder, file) as handle:
        _check_size(handle, _path(folder, file), layout)
        if os.pread(handle, PAGE, 0) != layout.header():
            raise StoreError(
                f"{_path(folder, file)}: its header is not the one that the manifest implies", way_out=RESTORE
            )
        return _mapping(handle, PAGE + layout.size)[PAGE:]


def _mapping(handle: int, size: int) -> Tensor:
    """A file's bytes in place, in private memory: torch's and Python's own ways keep a handle, or lose one."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    protection, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE
    at = system.mmap(None, ctypes.c_size_t(size), protection, kind, handle, ctypes.c_long(0))
    if at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    data = (ctypes.c_uint8 * size).from_address(at)
    end = weakref.finalize(data, system.munmap, ctypes.c_void_p(at), ctypes.c_size_t(size))
    end.atexit = False  # tensors may outlive it
    return torch.frombuffer(data, dtype=torch.uint8)


def _check_size(handle: int, path: str, layout: Layout) -> None:
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"{path}: not a regular file")
    if found.st_size != PAGE + layout.size:
        raise StoreError(
            f"{path}: truncated or changed",
            expected=f"{PAGE + layout.size} bytes",
            got=found.st_size,
            way_out=RESTORE,
        )


def _path(folder: int, file: str) -> str:
    """For an error."""
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), file)


@contextlib.contextmanager
def opened(folder: int, file: str) -> Iterator[int]:
    """A handle of a file in `folder`, or in a folder of it, that no link leads to; an OSError is a StoreError."""
    with contextlib.ExitStack() as stack:
        try:
            inner, (*parents, name) = folder, file.split("/")
            for parent in parents:
                inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=inner)
                stack.callback(shut, inner)
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=inner)
            stack.callback(shut, handle)
        except OSError as error:
            raise StoreError(f"{_path(folder, file)}: could not be opened", got=said(error), way_out=RESTORE) from error
        try:
            yield handle
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(f"{_path(folder, file)}: could not be read", got=said(error)) from error
