"""Rows to durable files and back: against the rate of the volume, what others write with, and a model alone: G13."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from emocore import ActivationStore, activations, capture
from emocore.ring import Ring

from .bars import faster, slows
from .bench_model import llama
from .collectors import PLAIN, Subject
from .harness import Contender, unchecked
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
    """A quarter of a gigabyte of bfloat16 rows, less in a quick run, durable when the call returns."""
    quick = machine.scale.name == "quick"
    rows, dim = machine.scale.rows(16_384 if quick else 65_536, tiny=128), machine.scale.dim(2048)
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
        race(case, contenders, [x], lambda given: given, error=changed)


def changed(found: Tensor, right: Tensor) -> float:
    """1 where anything is not as it was: in float64, rows of this size would take gigabytes."""
    return float(not torch.equal(found, right))


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


def cached(path: Path) -> None:
    """Read a file into the page cache, and none of it from there: what was written through it lies on larger pages."""
    sync(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read()


def test_read(race, machine: Machine, seed: int, tmp_path: Path) -> None:
    """32 sequences of 128 rows, anywhere in a file that the page cache holds, to a batch whose memory is used again."""
    rows, dim = machine.scale.rows(8192 if machine.scale.name == "quick" else 32_768, tiny=512), machine.scale.dim(2048)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=g).bfloat16()
    with ActivationStore(tmp_path / "store") as store:
        store.at("layers.0").update(x)
    x.view(torch.int16).numpy().tofile(tmp_path / "plain")
    for path in (*(tmp_path / "store").glob("rows-*"), tmp_path / "plain"):
        cached(path)
    view = activations(tmp_path / "store")["layers.0"]
    plain = np.memmap(tmp_path / "plain", np.int16, "r").reshape(rows, dim)
    for mapped in (view.rows.view(torch.int16), torch.from_numpy(np.array(plain))):
        mapped.sum()
    inputs = [torch.randint(rows - 128, (32,), generator=g).tolist() for _ in range(7)]  # odd: both read all

    batches = [torch.empty(32, 128, dim, dtype=torch.bfloat16) for _ in range(2)]
    array = batches[1].view(torch.int16).numpy()

    def ours(starts: list[int]) -> Tensor:
        return torch.stack([view[start : start + 128] for start in starts], out=batches[0])

    def numpy(starts: list[int]) -> Tensor:
        np.stack([plain[start : start + 128] for start in starts], out=array)
        return batches[1]

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


class Recording(Kept):
    """Every layer of a model recorded: forwards, and a commit that makes their rows durable."""

    def __init__(self, root: Path, ring: Ring, subject: Subject, forwards: int) -> None:
        super().__init__(root, len(subject.names), ring)
        self._subject, self._forwards = subject, forwards

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A new store, and hooks on."""
        with super().fresh(), capture(self._subject.model, dict.fromkeys(self._subject.names, self.store)):
            yield

    def call(self, _: Any = None) -> None:
        """The forwards and the commit."""
        self.plain()
        self.store.commit()

    def plain(self, _: Any = None) -> None:
        """The forwards."""
        for _ in range(self._forwards):
            self._subject.forward()

    def outputs(self) -> Tensor:
        """What the layers say in all forwards, [layers, rows, D], by plain hooks."""
        found: dict[str, list[Tensor]] = {name: [] for name in self._subject.names}
        handles = [
            self._subject.model.get_submodule(name).register_forward_hook(
                lambda module, args, output, kept=kept: kept.append(output.flatten(0, 1).clone())
            )
            for name, kept in found.items()
        ]
        self.plain()
        for handle in handles:
            handle.remove()
        return torch.cat([torch.cat(kept) for kept in found.values()])


def test_capture(race, machine: Machine, seed: int, tmp_path: Path) -> None:
    """All layers of a small model to disk, commit included, beside the model alone."""
    subject, forwards = llama(machine, False, seed), {"tiny": 1, "quick": 2}.get(machine.scale.name, 4)
    sequences, tokens = subject.inputs["input_ids"].shape
    rows = forwards * sequences * tokens
    case = Case(
        op="store",
        name=f"record {len(subject.names)} layers of {forwards} forwards {sequences} x {tokens}",
        dtype="bfloat16",
        rows=rows,
        dim=subject.dim,
        bound=0.0,
        bars=(slows("G13", 0.10, PLAIN),),
        baseline=PLAIN,
        hides_launch=False,
    )
    with Ring(slots=2 * len(subject.names), slot_bytes=1 << 20) as ring:
        kept = Recording(tmp_path, ring, subject, forwards)
        contenders = [Contender(OURS, kept.call, kept.check, kept.fresh), Contender(PLAIN, kept.plain, unchecked)]
        race(case, contenders, [None], lambda _: kept.outputs(), error=changed)
