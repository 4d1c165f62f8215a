"""Joining: the stores of several ranks made one, by a manifest above their folders; no row is copied."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .errors import ArgumentError, StoreError, said
from .folders import Folder
from .generations import advance, generations, newest
from .ledger import Ledger
from .manifest import Index, Manifest, Point, Rows

_RANK = re.compile(r"rank-(\d{5})", re.ASCII)


def join(path: str | os.PathLike[str], *, allow_partial: bool = False) -> int:
    """Publish a manifest of what the ranks below `path` have committed, in their order; its number.

    Raises StoreError where a rank is missing, unless `allow_partial` (the manifest then says which there are), and
    ArgumentError where ranks hold different labels, or one hook point of different widths, dtypes or token rules.
    """
    path = Path(path)
    parts = _ranks(path)
    first = next(iter(parts.values()))
    missing = sorted(set(range(first.world)) - set(parts))
    if missing and not allow_partial:
        raise StoreError(
            f"{path}: ranks are missing",
            expected=f"{first.world} of them",
            got=f"none of {missing[:8]}",
            way_out="Wait for them, or give allow_partial=True.",
        )
    for rank, part in parts.items():
        if (part.rank, part.world, part.labels, part.model) != (rank, first.world, first.labels, first.model):
            raise ArgumentError(f"{path}: rank {rank} is of another run than the first")
    folder = Folder(path)
    try:
        whole = _joined(parts)
        number = max(generations(path), default=0) + 1
        advance(path, replace(whole, generation=number))
        return number
    finally:
        folder.close()


def _ranks(path: Path) -> dict[int, Manifest]:
    found = {}
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise StoreError(f"{path}: could not be read", got=said(error)) from error
    for name in names:
        match = _RANK.fullmatch(name)
        part = newest(path / name) if match else None
        if match and part:
            found[int(match[1])] = part.manifest
    if not found:
        raise StoreError(f"{path}: no ranks", expected="folders rank-00000, ...", way_out="Write with rank=, world=.")
    return found


def _joined(parts: Mapping[int, Manifest]) -> Manifest:
    points: dict[str, Point] = {}
    rows: list[Rows] = []
    indexes: list[Index] = []
    for rank, part in parts.items():
        for point in part.points:
            points[point.hook_point] = _merged(points.get(point.hook_point), point)
        place = [list(points).index(point.hook_point) for point in part.points]
        at = f"rank-{rank:05}/"
        rows += [replace(s, file=at + s.file, index=at + s.index, point=place[s.point]) for s in part.rows]
        indexes += [replace(index, file=at + index.file) for index in part.indexes]
    return replace(
        next(iter(parts.values())),
        points=tuple(points.values()),
        rows=tuple(rows),
        indexes=tuple(indexes),
        sequences=sum(part.sequences for part in parts.values()),
        rank=0,
        ranks=tuple(parts),
    )


def _merged(one: Point | None, other: Point) -> Point:
    if one is None:
        return other
    ledger = Ledger.from_dict(one.ledger)
    ledger.merge(Ledger.from_dict(other.ledger))
    merged = replace(one, ledger=ledger.as_dict())
    if replace(other, ledger=merged.ledger) != merged:
        raise ArgumentError(
            f"hook point {one.hook_point!r}: its ranks differ",
            expected=(one.dtype, one.dim, one.tokens),
            got=(other.dtype, other.dim, other.tokens),
        )
    return merged
