"""Exporting: an activation store as HDF5 files for other tools, one a shard, each published whole."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, StoreError, said
from .formats import KEY
from .manifest import Index, Manifest, Rows
from .publishing import publish
from .replaying import activations
from .shards import FORMAT

# Of hdf5plugin, with settings: higher levels make rows hardly smaller, and Blosc2's own codec does not at all.
FILTERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "zstd": ("Zstd", {"clevel": 1}),
    "blosc2": ("Blosc2", {"cname": "zstd", "clevel": 1, "filters": 1}),  # bytes of a value apart
}
DTYPE = "emocore_dtype"  # the attribute that says what a dataset's numbers are
CHUNK = 1 << 20  # bytes that are compressed together


@dataclass(frozen=True)
class About:
    """What a file says of itself: its hook point, `place` of how many, its ledger, the index it holds."""

    format: int
    hook_point: str
    place: int
    hook_points: int
    tokens: Mapping[str, Any] | None
    ledger: Mapping[str, Any]
    index: str
    labels: Sequence[str]
    model: str | None
    generation: int


def to_hdf5(
    path: str | os.PathLike[str], out: str | os.PathLike[str], compression: str | None = None
) -> tuple[Path, ...]:
    """Write every shard of the store in `path` to a file in the folder `out`, and return the files.

    A file holds `rows` [n, D], the columns of their index [n], and `emocore`, a JSON text: hook point, labels, token
    rule, ledger, model; a hook point that has no rows gets a file `empty-...` of n = 0. HDF5 has no bfloat16: its bits
    are uint16 under the attribute `emocore_dtype`. `compression` is "zstd" or "blosc2", by the package hdf5plugin.
    Raises ArgumentError, and StoreError where the store is damaged, the package is missing, or a file cannot be
    written.
    """
    squeeze = _squeezed(compression)
    found, out = activations(path), Path(out)
    layouts = found.manifest.layouts()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{out}: could not be made", got=said(error)) from error
    files = []
    for shard in found.manifest.rows:
        tensors = {
            **found.tensors(shard.file, layouts[shard.file]),
            **found.tensors(shard.index, layouts[shard.index]),
        }
        files.append(out / f"{Path(shard.file.replace('/', '-')).stem}.h5")
        publish(files[-1], _packed(tensors, _text(found.manifest, shard), squeeze))
    return (*files, *_without_rows(found.manifest, out))


def _without_rows(manifest: Manifest, out: Path) -> Iterator[Path]:
    """Write the files of hook points without rows, and remove such that an earlier export left of others."""
    filled = {shard.point for shard in manifest.rows}
    for place, point in enumerate(manifest.points):
        file = out / f"empty-{place:03}.h5"
        if place in filled:
            with contextlib.suppress(OSError):
                file.unlink()
            continue
        shard, index = Rows("", place, 0, 0, ""), Index("", 0, 0, 0, 0)
        layout = {**shard.layout(point).tensors, **index.layout.tensors}
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in layout.items()}
        publish(file, _packed(tensors, _text(manifest, shard), {}))
        yield file


def _squeezed(compression: str | None) -> Mapping[str, Any]:
    """What h5py is to be told of a dataset."""
    if compression is None:
        return {}
    if compression not in FILTERS:
        raise ArgumentError("compression", expected=f"None or {' or '.join(FILTERS)}", got=repr(compression))
    try:
        plugin = importlib.import_module("hdf5plugin")
    except ImportError as error:
        raise StoreError(
            f"compression {compression!r}: hdf5plugin is not installed",
            got=str(error),
            way_out="Install emocore-engine[hdf5], or give compression=None.",
        ) from error
    name, settings = FILTERS[compression]
    found: Mapping[str, Any] = getattr(plugin, name)(**settings)
    return found


def _text(manifest: Manifest, shard: Rows) -> str:
    point = manifest.points[shard.point]
    about = About(
        format=FORMAT,
        hook_point=point.hook_point,
        place=shard.point,
        hook_points=len(manifest.points),
        tokens=point.tokens,
        ledger=point.ledger,
        index=shard.index,
        labels=manifest.labels,
        model=manifest.model,
        generation=manifest.generation,
    )
    return json.dumps(asdict(about))


def _packed(tensors: Mapping[str, Tensor], text: str, squeeze: Mapping[str, Any]) -> bytes:
    # built in memory, because h5py on a live disk loses data when the disk fills
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file[KEY] = np.frombuffer(text.encode(), dtype=np.uint8)
        for name, t in tensors.items():
            bits = t.view(torch.uint16) if t.dtype == torch.bfloat16 else t
            many = squeeze if name == "rows" and t.numel() else {}
            chunks = {"chunks": (min(len(t), max(CHUNK // t[0].nbytes, 1)), t.shape[1])} if many else {}
            dataset = file.create_dataset(name, data=bits.numpy(), **chunks, **many)
            dataset.attrs[DTYPE] = str(t.dtype).removeprefix("torch.")
    return buffer.getvalue()
