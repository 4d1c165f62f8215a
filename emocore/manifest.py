"""Manifest: what a folder of activations holds: sealed shards with checksums, hook points with ledgers.

What is read is checked in full before any of it is believed.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .errors import StoreError
from .formats import MAX_TEXT, parse
from .ledger import Ledger
from .shards import FORMAT, Layout, check_file
from .tokens import Tokens

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MOST_DIM = 1 << 24
MOST_ROWS = 1 << 48

SHARD = re.compile(r"(?P<rank>rank-\d{5}/)?(?P<kind>rows|index)-(?P<number>\d{8})-\d{3,6}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Point:
    """One hook point: rows [n, dim] of a dtype, taken under a token rule, and their ledger."""

    hook_point: str
    dtype: str
    dim: int
    tokens: Mapping[str, Any] | None
    ledger: Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """A shard of rows [rows, dim] of point number `point`; `index` is the file that says whose they are."""

    file: str
    point: int
    rows: int
    crc32c: int
    index: str

    def layout(self, point: Point) -> Layout:
        """Its rows [rows, dim], under their hook point's name."""
        tensors = {"rows": (DTYPES[point.dtype], (self.rows, point.dim))}
        return Layout(tensors, {"kind": "rows", "hook_point": point.hook_point})


@dataclass(frozen=True)
class Index:
    """A shard that says whose `rows` rows are, with the names of `requests` requests in `text` bytes."""

    file: str
    rows: int
    requests: int
    text: int
    crc32c: int

    @property
    def layout(self) -> Layout:
        """Its columns [rows], and the names of its requests, end to end."""
        column = (self.rows,)
        return Layout(
            {
                "sequence": (torch.int64, column),
                "request_ends": (torch.int64, (self.requests,)),
                **dict.fromkeys(("request", "position", "token", "label"), (torch.int32, column)),
                "request_names": (torch.uint8, (self.text,)),
            },
            {"kind": "index"},
        )


@dataclass(frozen=True)
class Manifest:
    """One generation. `sequences` counts those seen by this rank; `model` and `versions` say what wrote it."""

    generation: int = 0
    labels: Sequence[str] = ()
    points: Sequence[Point] = ()
    rows: Sequence[Rows] = ()
    indexes: Sequence[Index] = ()
    sequences: int = 0
    rank: int = 0
    world: int = 1
    ranks: Sequence[int] | None = None  # those joined
    model: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def layouts(self) -> dict[str, Layout]:
        """What every shard holds, by file."""
        rows = {shard.file: shard.layout(self.points[shard.point]) for shard in self.rows}
        return rows | {index.file: index.layout for index in self.indexes}

    def to_bytes(self) -> bytes:
        """JSON under a checksum; raises StoreError when it has grown too long to be read again."""
        body = {"format": FORMAT, "kind": "activations", **asdict(self)}
        data = json.dumps({"crc32": _checksum(body), **body}, indent=1).encode()
        if len(data) > MAX_TEXT:
            raise StoreError(
                "manifest: too many shards",
                expected=f"at most {MAX_TEXT} bytes",
                got=len(data),
                way_out="Begin another folder, or write larger shards.",
            )
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Inverse of `to_bytes`; raises ValueError, or StoreError for one that a newer emocore wrote."""
        body = parse(data)
        if type(body) is not dict:
            raise ValueError("no JSON object")
        version = _number(body.get("format"), 1 << 31)
        if version > FORMAT:
            raise StoreError(
                "manifest: written by a newer emocore", expected=f"format {FORMAT}", got=version, way_out="Upgrade."
            )
        if body.pop("crc32", None) != _checksum(body):
            raise ValueError("the checksum does not fit")
        if (body.pop("format"), body.pop("kind", None)) != (FORMAT, "activations"):
            raise ValueError("not a manifest of activations")
        found: Manifest = _read(cls, body)
        _check(found)
        return found


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _read(cls: Any, given: Any) -> Any:
    """A dataclass of this file from a JSON object that has exactly its fields."""
    if type(given) is not dict or given.keys() != cls.__dataclass_fields__.keys():
        raise ValueError(f"not the fields of {cls.__name__}")
    parts = {"points": Point, "rows": Rows, "indexes": Index} if cls is Manifest else {}
    read = {name: tuple(_read(part, one) for one in _list(given[name])) for name, part in parts.items()}
    return cls(**given | read)


def _check(m: Manifest) -> None:
    """Raise ValueError unless every field is what it should be and all of them fit together."""
    for value in (m.generation, m.sequences):
        _number(value, MOST_ROWS)
    _number(m.rank, _number(m.world, 100_000))
    for rank in _list(m.ranks) if m.ranks is not None else ():
        _number(rank, m.world)
    _distinct([_word(label) for label in _list(m.labels)])
    if m.model is not None:
        _word(m.model)
    for name, version in _dict(m.versions).items():
        _word(name), _word(version)
    for point in m.points:
        _check_point(point)
    _distinct([point.hook_point for point in m.points])
    _check_shards(m)


def _check_point(point: Point) -> None:
    _word(point.hook_point)
    if point.dtype not in DTYPES:
        raise ValueError(f"rows of {point.dtype!r}")
    if not _number(point.dim, MOST_DIM):
        raise ValueError("rows without columns")
    if point.tokens is not None:
        Tokens(**_dict(point.tokens))
    ledger = Ledger.from_dict(_dict(point.ledger))
    for counts in (ledger.tokens, ledger.rows, ledger.fires):
        for value in counts.as_dict().values():
            _number(value, MOST_ROWS)
    _number(ledger.forwards, MOST_ROWS), _number(ledger.unmasked, MOST_ROWS)
    if ledger.rows.missing:
        raise ValueError(f"the rows of {point.hook_point!r} do not add up")


def _check_shards(m: Manifest) -> None:
    indexes = {index.file: index for index in m.indexes}
    _distinct([*(shard.file for shard in m.rows), *(index.file for index in m.indexes)])
    for index in m.indexes:
        _check_shard(index, "index")
        _number(index.requests, MOST_ROWS), _number(index.text, MOST_ROWS)
    total = [0] * len(m.points)
    for shard in m.rows:
        _check_shard(shard, "rows")
        total[_number(shard.point, len(m.points))] += shard.rows
        if _word(shard.index) not in indexes or indexes[shard.index].rows != shard.rows:
            raise ValueError(f"{shard.file} has no index of its rows")
    for point, rows in zip(m.points, total, strict=True):
        if point.ledger["rows"]["accumulated"] != rows:
            raise ValueError(f"{point.hook_point!r} has {rows} rows, which is not what its ledger says")


def _check_shard(shard: Rows | Index, kind: str) -> None:
    match = SHARD.fullmatch(_word(shard.file))
    if match is None or match["kind"] != kind:
        raise ValueError(f"a shard named {shard.file!r}")
    _number(shard.rows, MOST_ROWS), _number(shard.crc32c, 1 << 32)


def _number(value: Any, end: int) -> int:
    if type(value) is not int or not 0 <= value < end:
        raise ValueError(f"{value!r} is not a whole number below {end}")
    return value


def _word(value: Any) -> str:
    if type(value) is not str or not value or "\0" in value:
        raise ValueError(f"{value!r} is not a name")
    return value


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is not a list")
    return value


def _dict(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise ValueError(f"{value!r} is not an object")
    return value


def _distinct(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError("a name stands twice")


def check_files(folder: int, manifest: Manifest) -> None:
    """Raise StoreError unless every shard that is listed is there, of its size."""
    for file, layout in manifest.layouts().items():
        check_file(folder, file, layout)
