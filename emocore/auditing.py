"""Auditing: every checksum, count and ledger of an activation store computed anew."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .errors import LedgerError, StoreError
from .places import NONE, request_names
from .replaying import Activations, activations
from .shards import RESTORE, Layout


@dataclass(frozen=True)
class Audit:
    """What was found to be whole: a generation, its hook points, shards, rows and bytes of data."""

    generation: int
    hook_points: int
    shards: int
    rows: int
    bytes: int


def verify(path: str | os.PathLike[str]) -> Audit:
    """Read everything that an activation store has committed and compare it with its manifest and ledgers.

    Raises StoreError naming the first file that differs, or the newest manifest where it is damaged; LedgerError where
    counts do not add up.
    """
    found = activations(path)
    if found.damaged:
        raise StoreError(f"{path}: a newer manifest is damaged", got=found.damaged[0], way_out=RESTORE)
    sums = {shard.file: shard.crc32c for shard in found.manifest.rows}
    sums |= {index.file: index.crc32c for index in found.manifest.indexes}
    layouts = found.manifest.layouts()
    for file, layout in layouts.items():
        _check_sum(found, file, layout, sums[file])
    for index in found.manifest.indexes:
        _check_index(found, index.file, layouts[index.file])
    for name, ledger in found.ledger.items():
        ledger.check(f"hook point {name!r}")
        if ledger.rows.accumulated != len(found[name]):
            raise LedgerError(f"hook point {name!r}: rows", expected=ledger.rows.accumulated, got=len(found[name]))
    return Audit(
        generation=found.manifest.generation,
        hook_points=len(found),
        shards=len(layouts),
        rows=sum(len(view) for view in found.values()),
        bytes=sum(layout.size for layout in layouts.values()),
    )


def _check_sum(found: Activations, file: str, layout: Layout, expected: int) -> None:
    got = found.checksum(file, layout)
    if got != expected:
        raise StoreError(f"{found.path / file}: CRC32C of its data", expected=expected, got=got, way_out=RESTORE)


def _check_index(found: Activations, file: str, layout: Layout) -> None:
    """Labels and requests are ids that have a name."""
    tensors = found.tensors(file, layout)
    try:
        ends = {"label": len(found.labels), "request": len(request_names(tensors))}
    except ValueError as error:
        raise StoreError(f"{found.path / file}: damaged", got=str(error), way_out=RESTORE) from error
    for name, end in ends.items():
        ids = tensors[name]
        if bool(torch.any((ids < NONE) | (ids >= end))):
            raise StoreError(f"{found.path / file}: {name} ids", expected=f"-1 .. {end - 1}", way_out=RESTORE)
