"""Unpacking: the HDF5 files that `to_hdf5` wrote made the shards of a store again, a slice at a time."""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import h5py
import torch
from torch import Tensor

from . import __version__
from .errors import StoreError
from .exporting import CHUNK, DTYPE, About
from .folders import Folder
from .formats import KEY, MAX_TEXT, datasets, parse
from .generations import advance
from .manifest import Index, Manifest, Point, Rows
from .ring import Ring
from .shards import FORMAT, Draft, Layout, Shape, opened

NAME = re.compile(r"((rank-\d{5}-)?rows-\d{8}|empty)-\d{3,6}\.h5", re.ASCII)


def exported(path: Path) -> list[str]:
    """Names of the files in `path` that are called as `to_hdf5` calls them, in the order of their rows."""
    return sorted(name for name in os.listdir(path) if NAME.fullmatch(name))


def unpack(path: Path, out: Path, limit: int, filters: Collection[int]) -> None:
    """Make a store in the folder `out` of the files in `path`, whose tensors may take `limit` bytes.

    Rows may be compressed by one of `filters`, by number. Raises StoreError naming the first file that is anything but
    what `to_hdf5` wrote.
    """
    folder, source = Folder(out), os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with Ring(slots=8) as ring:
            store = Unpacked(folder.handle, ring)
            for name in exported(path):
                with _said(name), _regular(source, name) as (raw, size), h5py.File(raw, "r") as file:
                    found = File(file, size, filters)
                    limit -= found.bytes
                    if limit < 0:
                        raise ValueError("unpacked, the files so far take more than the limit")
                    store.take(found)
        with _said("the files together"):
            manifest = store.manifest()
        advance(out, manifest)
    finally:
        os.close(source)
        folder.close()


@contextlib.contextmanager
def _said(name: str) -> Iterator[None]:
    """Whatever an untrusted file makes its libraries raise is a StoreError that names it."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{name}: not a file that emocore exported, or damaged", got=repr(error)) from error


@contextlib.contextmanager
def _regular(folder: int, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file in `folder`, and its size."""
    with opened(folder, name) as handle, open(handle, "rb", closefd=False) as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{name}: not a regular file")
        yield file, found.st_size


class File:
    """One file of `size` bytes, checked, of whose tensors nothing is read yet. Raises ValueError, or what h5py does."""

    def __init__(self, file: h5py.File, size: int, filters: Collection[int]) -> None:
        self.tensors = dict(datasets(file, filters))
        self.about = _about(self.tensors.pop(KEY))
        rows, about = self.tensors["rows"], self.about
        n, dim = rows.shape
        self.point = Point(about.hook_point, rows.attrs[DTYPE], dim, about.tokens, about.ledger)
        self.rows = Rows("", about.place, n, 0, about.index)
        self.index = Index("", n, self.tensors["request_ends"].size, self.tensors["request_names"].size, 0)
        expected = {**self.rows.layout(self.point).tensors, **self.index.layout.tensors}
        if self.tensors.keys() != expected.keys():
            raise ValueError(f"datasets {sorted(self.tensors.keys() ^ expected.keys())} are missing or unknown")
        for name, (dtype, shape) in expected.items():
            _check(name, self.tensors[name], dtype, shape)
        if not n and self.index.requests + self.index.text:
            raise ValueError("requests of no rows")
        if sum(t.nbytes for t in self.tensors.values() if t.chunks is None) > size:
            raise ValueError("datasets claim more than the file holds")

    @property
    def bytes(self) -> int:
        """What its tensors take, unpacked."""
        return sum(t.nbytes for t in self.tensors.values())


def _about(dataset: h5py.Dataset) -> About:
    if dataset.dtype != "uint8" or dataset.ndim != 1 or dataset.chunks or dataset.nbytes > MAX_TEXT:
        raise ValueError(f"{KEY!r} is not a text of at most {MAX_TEXT} bytes")
    about = About(**parse(dataset[()].tobytes()))
    if about.format != FORMAT:
        raise ValueError(f"format {about.format!r}, not {FORMAT}")
    return about


def _check(name: str, dataset: h5py.Dataset, dtype: torch.dtype, shape: Shape) -> None:
    """Raise ValueError unless a dataset is of this dtype and shape, and all of its data is in the file."""
    title = str(dtype).removeprefix("torch.")
    held = "uint16" if dtype == torch.bfloat16 else title
    if (dataset.dtype, dataset.shape, dict(dataset.attrs)) != (held, shape, {DTYPE: title}):
        raise ValueError(f"{name!r} is {dataset.dtype} {dataset.shape}, not {held} {shape} marked as {title}")
    if dataset.chunks is None:
        whole = dataset.id.get_storage_size() == dataset.nbytes
    else:
        row = dataset.nbytes // len(dataset)
        most = (max(CHUNK // row, 1), *shape[1:])
        if name != "rows" or dataset.chunks > most or dataset.chunks[1:] != most[1:]:
            raise ValueError(f"{name!r} is in chunks of {dataset.chunks}, more than {most}")
        whole = dataset.id.get_num_chunks() == math.ceil(len(dataset) / dataset.chunks[0])
    if not whole:
        raise ValueError(f"{name!r} is not all in the file")


class Unpacked:
    """The shards made of files, and what these say of their store."""

    def __init__(self, folder: int, ring: Ring) -> None:
        self._folder, self._ring = folder, ring
        self._of: tuple[Sequence[str], str | None, int, int] | None = None  # labels, model, generation, hook points
        self._points: dict[int, Point] = {}  # by the place that they had
        self._rows: list[Rows] = []
        self._indexes: dict[tuple[str, Index], Index] = {}  # by the name that they had, and what they hold
        self._sequences = 0

    def take(self, found: File) -> None:
        """Write the shards of one file. Raises ValueError where it is of another store than those before."""
        about = found.about
        of = (about.labels, about.model, about.generation, about.hook_points)
        if (self._of or of) != of or self._points.setdefault(about.place, found.point) != found.point:
            raise ValueError("of another store, or of another state of it, than the files before")
        self._of = of
        if not found.rows.rows:
            return
        number = len(self._rows)
        file, crc = self._shard("rows", number, found, found.rows.layout(found.point))
        self._rows.append(replace(found.rows, file=file, crc32c=crc, index=self._index(number, found)))

    def _index(self, number: int, found: File) -> str:
        """The file of the rows' index: an earlier one where that held the same under the same name."""
        file, crc = self._shard("index", number, found, found.index.layout)
        index = replace(found.index, crc32c=crc)
        kept = self._indexes.setdefault((found.about.index, index), replace(index, file=file))
        if kept.file != file:
            os.unlink(file, dir_fd=self._folder)
        for part in _slices(found.tensors["sequence"]):
            self._sequences = max(self._sequences, int(part.max()) + 1)
        return kept.file

    def _shard(self, kind: str, number: int, found: File, layout: Layout) -> tuple[str, int]:
        """A sealed shard of the tensors in `layout`: its name, and the CRC32C of its data."""
        draft = Draft(self._folder, f"{kind}-{number:08}-000.safetensors", self._ring)
        try:
            for name in layout.tensors:
                for part in _slices(found.tensors[name]):
                    draft.append(part)
            crc = draft.finish(layout)
            draft.sync()
            draft.seal()
        except BaseException:
            draft.abandon()
            raise
        return draft.file, crc

    def manifest(self) -> Manifest:
        """Generation 1 of it all. Raises ValueError where a file is missing, or anything does not fit the rest."""
        places, (labels, model, _, count) = sorted(self._points), self._of or ((), None, 0, 0)
        if len(places) != count or places != [*range(len(places))]:
            raise ValueError(f"files of hook points {places}, not of all {count}")
        made = Manifest(
            generation=1,
            labels=labels,
            points=[self._points[place] for place in places],
            rows=self._rows,
            indexes=tuple(self._indexes.values()),
            sequences=self._sequences,
            model=model,
            versions={"emocore": __version__, "torch": str(torch.__version__)},
        )
        return Manifest.from_bytes(made.to_bytes())


def _slices(dataset: h5py.Dataset) -> Iterator[Tensor]:
    """Its data in order, about `CHUNK` bytes at a time."""
    step = dataset.chunks[0] if dataset.chunks else max(CHUNK * len(dataset) // max(dataset.nbytes, 1), 1)
    for start in range(0, len(dataset), step):
        yield torch.from_numpy(dataset[start : start + step])
