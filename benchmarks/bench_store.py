"""Rows to durable files and back: against the rate of the volume itself, and what others write with: G13."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from emocore import ActivationStore, activations
from emocore.ring import Ring

from .bars import faster
from .harness import Contender
from .machine import Machine
from .ours import OURS
from .results import Case, Work

BLOCK = 4 << 20
FORWARD = 2048  # rows that a hook point hands over at once
NEVER = 1 << 50  # bytes at which a shard is full: the case commits by itself


class Volume:
    """A folder of its own for every call, made and removed outside the time that is taken."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.folder = root

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A new folder."""
        self.folder = Path(tempfile.mkdtemp(dir=self._root))
        try:
            yield
        finally:
            shutil.rmtree(self.folder)

    def contender(self, name: str, write: Callable[[Path, Tensor], None], read: Callable[[Path], Tensor]) -> Contender:
        """One that writes rows [N, D] to one file and syncs it."""

        def call(x: Tensor) -> None:
            write(self.folder / "rows", x)
            sync(self.folder / "rows")

        def check(x: Tensor) -> Tensor:
            with self.fresh():
                call(x)
                return read(self.folder / "rows")

        return Contender(name, call, check, self.fresh)


class Kept(Volume):
    """A store that is open already, on a ring whose memory has been used: a run's second shard, not its first."""

    def __init__(self, root: Path, points: int, ring: Ring) -> None:
        super().__init__(root)
        self._points, self._ring = points, ring

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A new store."""
        with super().fresh(), ActivationStore(self.folder, shard_bytes=NEVER, ring=self._ring) as self.store:
            yield

    def call(self, x: Tensor) -> None:
        """Hand the rows over as forwards do, each hook point its part, and commit."""
        feeds = [self.store.at(f"layers.{i}") for i in range(self._points)]
        for parts in zip(*(part.split(FORWARD) for part in x.chunk(self._points)), strict=True):
            for feed, rows in zip(feeds, parts, strict=True):
                feed.update(rows)
        self.store.commit()

    def check(self, x: Tensor) -> Tensor:
        """What a reader finds."""
        with self.fresh():
            self.call(x)
            return torch.cat([view.rows for view in activations(self.folder).values()])


@pytest.mark.parametrize("points", [1, 16])
def test_write(race, machine: Machine, seed: int, points: int, tmp_path: Path) -> None:
    """A quarter of a gigabyte of bfloat16 rows, durable when the call returns."""
    rows, dim = machine.scale.rows(65_536, tiny=128), machine.scale.dim(2048)
    x = on_pages(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).bfloat16())
    case = Case(
        op="store",
        name=f"write and sync bfloat16 D={dim}, hook points {points}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        bound=0.0,
        work=Work(read=x.nbytes),
        bars=(faster("G13", 0.85, "raw direct"), faster("G13", 2.0, "safetensors", "torch", "h5py")),
        hides_launch=False,
    )
    with Ring(slots=16, slot_bytes=BLOCK) as ring:
        kept, one = Kept(tmp_path, points, ring), Volume(tmp_path).contender
        contenders = [
            Contender(OURS, kept.call, kept.check, kept.fresh),
            one("raw direct writes, no checksum", write_direct, lambda path: read_direct(path, dim)),
            one("safetensors save_file", write_safetensors, lambda p: safetensors.torch.load_file(p)["rows"]),
            one("torch.save", lambda path, x: torch.save(x, path), torch.load),
            one("h5py", write_hdf5, read_hdf5),
        ]
        race(case, contenders, [x], lambda given: given.double())


def on_pages(x: Tensor) -> Tensor:
    """`x` in memory that starts on a page, as direct writes want it."""
    held = torch.frombuffer(mmap.mmap(-1, x.nbytes), dtype=x.dtype).reshape(x.shape)
    return held.copy_(x)


def write_direct(path: Path, x: Tensor) -> None:
    """As the volume takes the bytes best: large blocks, past the page cache."""
    data = memoryview(x.reshape(-1).view(torch.uint8).numpy())
    direct = os.O_DIRECT if len(data) % mmap.PAGESIZE == 0 else 0  # which whole pages alone allow
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | direct)
    for at in range(0, len(data), BLOCK):
        os.pwrite(handle, data[at : at + BLOCK], at)
    os.close(handle)


def read_direct(path: Path, dim: int) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.bfloat16).reshape(-1, dim)


def write_safetensors(path: Path, x: Tensor) -> None:
    safetensors.torch.save_file({"rows": x}, path)


def write_hdf5(path: Path, x: Tensor) -> None:
    with h5py.File(path, "w") as file:
        file["rows"] = x.view(torch.int16).numpy()


def read_hdf5(path: Path) -> Tensor:
    with h5py.File(path, "r") as file:
        return torch.from_numpy(file["rows"][()]).view(torch.bfloat16)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.close(handle)


def test_read(race, machine: Machine, seed: int, tmp_path: Path) -> None:
    """32 sequences of 128 rows, anywhere in a file that the page cache holds, each copied to memory of its own."""
    rows, dim = machine.scale.rows(32_768, tiny=512), machine.scale.dim(2048)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=g).bfloat16()
    with ActivationStore(tmp_path / "store") as store:
        store.at("layers.0").update(x)
    x.view(torch.int16).numpy().tofile(tmp_path / "plain")
    view = activations(tmp_path / "store")["layers.0"]
    plain = np.memmap(tmp_path / "plain", np.int16, "r").reshape(rows, dim)
    for warmed in (view.rows, torch.from_numpy(np.array(plain))):
        warmed.view(torch.int16).sum()  # what was written past the page cache is not in it yet
    inputs = [torch.randint(rows - 128, (32,), generator=g).tolist() for _ in range(8)]

    def ours(starts: list[int]) -> Tensor:
        return torch.stack([view[start : start + 128].clone() for start in starts])

    def numpy(starts: list[int]) -> Tensor:
        found = np.stack([plain[start : start + 128].copy() for start in starts])
        return torch.from_numpy(found).view(torch.bfloat16)

    case = Case(
        op="store",
        name=f"read 32 sequences bfloat16 D={dim}",
        dtype="bfloat16",
        rows=32 * 128,
        dim=dim,
        bound=0.0,
        work=Work(read=32 * 128 * dim * 2, written=32 * 128 * dim * 2),
        bars=(faster("G13", 1.0, "numpy.memmap"),),
        hides_launch=False,
    )
    contenders = [Contender(OURS, ours), Contender("numpy.memmap", numpy)]
    race(case, contenders, inputs, lambda starts: torch.stack([x[s : s + 128] for s in starts]).double())
