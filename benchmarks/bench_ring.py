"""The ring: rows to the host while a model runs, against the link: G12; rows to a file, against the disk: G13."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emocore import ActivationStore, activations
from emocore.outflow import Arrival
from emocore.ring import Ring
from emocore.sinks import Whose

from .bars import faster, reaches
from .harness import Absent, Contender
from .machine import Machine
from .ours import OURS
from .outgoing import Outgoing
from .results import Case, Work

SLOT = 4 << 20
BATCH = 512  # rows of a forward


@pytest.mark.gpu
def test_to_host(race, machine: Machine, seed: int, tmp_path: Path) -> None:
    """Rows of 16 hook points off a device, to writers that throw them away; what hooks that copy get of the link."""
    points, dim = 16, machine.scale.dim(4096)
    rows = machine.scale.rows(65_536, tiny=points)
    x = torch.randn(points, rows // points, dim, generator=machine.generator(seed), device=machine.device).bfloat16()
    case = Case(
        op="ring",
        name=f"to host bfloat16 D={dim}, hook points {points}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        bound=0.0,
        work=Work(read=x.nbytes, over="link to host"),
        bars=(reaches("G12", 0.90),),
        hides_launch=False,
    )
    with Outgoing() as nowhere:
        sinks = list(nowhere.sinks([str(i) for i in range(points)]).values())

        def away(given: Tensor) -> None:
            nowhere.receive([Arrival(sink, one, None) for sink, one in zip(sinks, given, strict=True)], [])

        def check(given: Tensor) -> Tensor:
            with ActivationStore(tmp_path) as kept:
                kept.receive([Arrival(kept.at(str(i)), one, None) for i, one in enumerate(given)], [whose(given)])
            return torch.stack([view.rows for view in activations(tmp_path).values()])

        contenders = [Contender(OURS, away, check), Contender(".cpu()", lambda given: given.cpu())]
        race(case, contenders, [x], lambda given: given.double())


def whose(x: Tensor) -> Whose:
    """Nobody's, one sequence."""
    n = torch.zeros(x.shape[1], dtype=torch.int64)
    return Whose(n, n, 1, None)


@pytest.mark.cpu
def test_to_file(race, machine: Machine, seed: int, tmp_path: Path) -> None:
    """Rows in batches through the ring, with their checksum; writes of memory that is ready and aligned."""
    rows, dim = machine.scale.rows(16_384), machine.scale.dim(4096)
    x = aligned(rows * dim * 2).random_(0, 256, generator=machine.generator(seed)).view(torch.bfloat16).view(rows, dim)
    case = Case(
        op="ring",
        name=f"to a file bfloat16 D={dim}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        bound=0.0,
        work=Work(written=x.nbytes),
        bars=(faster("G13", 0.85, DIRECT),),
    )
    with contextlib.ExitStack() as stack:
        contenders = [
            stack.enter_context(open_contender(name, tmp_path / f"rows{i}", x.nbytes))
            for i, name in enumerate((OURS, DIRECT, BUFFERED))
        ]
        race(case, contenders, [x], octets, error=lambda found, right: 0.0 if torch.equal(found, right) else math.inf)


DIRECT, BUFFERED = "pwrite O_DIRECT", "pwrite to the page cache"


@contextlib.contextmanager
def open_contender(name: str, path: Path, nbytes: int) -> Iterator[Contender | Absent]:
    """A way to write rows to a file, which is as long as it will be."""
    path.write_bytes(bytes(nbytes))
    try:
        handle = os.open(path, os.O_RDWR | (0 if name == BUFFERED else os.O_DIRECT))
    except OSError as error:
        yield Absent(name, f"skipped: {error.strerror}, no direct writes in {path.parent}")
        return
    with Ring(slots=16, slot_bytes=SLOT) as ring:

        def through_ring(x: Tensor) -> None:
            stream = ring.stream(handle, direct=True)
            for part in x.split(BATCH):
                stream.append(part)
            stream.flush()

        def at_once(x: Tensor) -> None:
            view = memoryview(octets(x).numpy())
            for at in range(0, nbytes, SLOT):
                os.pwrite(handle, view[at : at + SLOT], at)

        yield checked(name, through_ring if name == OURS else at_once, path)
    os.close(handle)


def checked(name: str, write: Callable[[Tensor], None], path: Path) -> Contender:
    """What the file holds afterwards is compared byte by byte."""

    def check(x: Tensor) -> Tensor:
        write(x)
        return torch.frombuffer(bytearray(path.read_bytes()[: x.nbytes]), dtype=torch.uint8)

    return Contender(name, write, check)


def octets(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def aligned(nbytes: int) -> Tensor:
    """Bytes that begin on a page, as direct writes want them."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
