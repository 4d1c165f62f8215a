"""Formats: named tensors and one JSON text to the bytes of a safetensors or HDF5 file, and back from untrusted bytes.

A checksum covers both. What is read is stricter than either format: nothing is allocated that the file does not hold,
and nothing outside the file is touched. Readers raise ValueError, or what their library raises, for anything but what
the writers wrote.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import h5py
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

KEY = "emocore"  # of the JSON text: the metadata in safetensors, a dataset in HDF5
CHECKSUM = "crc32"  # a tensor beside the others
FOLDER = "tensors/"  # of the tensors in HDF5
MAX_TEXT = 16 << 20  # bytes of JSON, which parsed take some twenty times the memory
DTYPES = ("float64", "float32", "int64")


class Format(NamedTuple):
    """`pack(tensors, text)` to bytes, and `unpack(data)` back to (text, tensors)."""

    pack: Callable[[dict[str, Tensor], str], bytes]
    unpack: Callable[[bytes], tuple[str, dict[str, Tensor]]]


def parse(text: str | bytes) -> Any:
    """JSON in which no object holds a key twice."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"a header of {len(text)} bytes")
    return json.loads(text, object_pairs_hook=_no_doubles)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("the header holds a key twice")
    return dict(pairs)


def checksum(text: str, tensors: dict[str, Tensor]) -> int:
    """CRC-32 of the text, and of every tensor's name, dtype, shape and bytes, by name."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        crc = zlib.crc32(f"{name} {t.dtype} {list(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.contiguous().reshape(-1).numpy().view(np.uint8).data, crc)
    return crc


def _sealed(text: str, tensors: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors as arrays, which unlike tensors may share memory when saved, with the checksum among them."""
    return {CHECKSUM: np.array([checksum(text, tensors)]), **{name: t.numpy() for name, t in tensors.items()}}


def _opened(text: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    crc = tensors.pop(CHECKSUM)
    if crc.tolist() != [checksum(text, tensors)]:
        raise ValueError("the checksum does not fit")
    return text, tensors


# --- safetensors


def _to_safetensors(tensors: dict[str, Tensor], text: str) -> bytes:
    return safetensors.numpy.save(_sealed(text, tensors), metadata={KEY: text})


def _from_safetensors(data: bytes) -> tuple[str, dict[str, Tensor]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise ValueError("the header is cut off")
    text = parse(data[8 : 8 + length])["__metadata__"][KEY]
    return _opened(text, safetensors.torch.load(data))


# --- HDF5


def _to_hdf5(tensors: dict[str, Tensor], text: str) -> bytes:
    # built in memory, because h5py on a live disk loses data when the disk fills
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file[KEY] = np.frombuffer(text.encode(), dtype=np.uint8)
        for name, array in _sealed(text, tensors).items():
            file[f"{FOLDER}{name}"] = array
    return buffer.getvalue()


def _from_hdf5(data: bytes) -> tuple[str, dict[str, Tensor]]:
    with h5py.File(io.BytesIO(data), "r") as file:
        found = dict(datasets(file))
        if sum(dataset.nbytes for dataset in found.values()) > len(data):
            raise ValueError("datasets claim more than the file holds")
        text = _array(found.pop(KEY), ["uint8"]).tobytes().decode()
        tensors = {}
        for name, dataset in found.items():
            if not name.startswith(FOLDER):
                raise ValueError(f"dataset {name!r} is unknown")
            tensors[name.removeprefix(FOLDER)] = torch.from_numpy(_array(dataset, DTYPES))
    return _opened(text, tensors)


def _array(dataset: h5py.Dataset, dtypes: Sequence[str]) -> np.ndarray[Any, Any]:
    if dataset.dtype.name not in dtypes:
        raise ValueError(f"{dataset.name!r} holds {dataset.dtype}, not {' or '.join(dtypes)}")
    return np.asarray(dataset[()])


def datasets(
    group: h5py.Group, filters: Collection[int] = (), prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset below `group` by name; refuses links, shared objects, and data that is not plainly in the file.

    With `filters`, by number, data may also be in chunks that one of them has compressed.
    """
    if depth > 2:
        raise ValueError(f"{prefix}: too deep")
    for key in group:
        name = prefix + key
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{name!r} is a link")
        item = group[key]
        if h5py.h5o.get_info(item.id).rc != 1:
            raise ValueError(f"{name!r} has several names")
        if isinstance(item, h5py.Group):
            yield from datasets(item, filters, f"{name}/", depth + 1)
            continue
        if not isinstance(item, h5py.Dataset):
            raise ValueError(f"{name!r} is neither group nor dataset")
        _check_own(name, item.id.get_create_plist(), filters)
        yield name, item


def _check_own(name: str, made: h5py.h5p.PropDCID, filters: Collection[int]) -> None:
    """Raise ValueError unless data is in the file itself: no external files, no views of other datasets."""
    if made.get_layout() == h5py.h5d.CHUNKED and filters:
        used = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
        if len(used) != 1 or used[0] not in filters:
            raise ValueError(f"{name!r} is under filters {used}, not one of {sorted(filters)}")
    elif made.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT) or made.get_external_count():
        raise ValueError(f"{name!r} does not hold its own data")


FORMATS = {
    ".safetensors": Format(_to_safetensors, _from_safetensors),
    ".h5": Format(_to_hdf5, _from_hdf5),
    ".hdf5": Format(_to_hdf5, _from_hdf5),
}
