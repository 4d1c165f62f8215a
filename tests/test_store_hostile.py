"""Store against files made to do harm: nothing is allocated, followed or run; a StoreError names the file."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from emocore import load, save
from emocore.directions import Directions
from emocore.errors import StoreError
from emocore.formats import MAX_TEXT


def directions() -> Directions:
    patterns, one = torch.eye(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    return Directions(("calm", "sad"), patterns, patterns.float(), torch.zeros(3).double(), 2.0, one, "layers.0")


def refused(path: Path, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


# --- hostile safetensors


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        with_header(b"[" * 100_000),
        with_header(b'{"a":' * 100_000),
        with_header(b'{"__metadata__":{"emocore":"{}"},"__metadata__":{"emocore":"{}"}}'),
        with_header(b'{"__metadata__":{"emocore":"{}"},"a":{"dtype":"F64","shape":[0],"data_offsets":[0,0]},'
                    b'"a":{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}'),
        with_header(b'{"__metadata__":{"emocore":"{}"},'
                    b'"a":{"dtype":"F64","shape":[99999999999999],"data_offsets":[0,8]}}', b"\0" * 8),
        with_header(b'{"__metadata__":{"emocore":"{}"},'
                    b'"a":{"dtype":"F64","shape":[1],"data_offsets":[8,0]}}', b"\0" * 8),
        with_header(b'{"__metadata__":{"emocore":"{}","n":' + b"9" * 5000 + b"}}"),
    ],
    ids=["length", "cut", "deep list", "deep object", "twice", "tensor twice", "absurd", "back", "digits"],
)  # fmt: skip
def test_hostile_safetensors(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "v.safetensors").write_bytes(data)
    refused(tmp_path / "v.safetensors", "not a file that emocore saved")


def test_a_huge_header_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    (tmp_path / "v.safetensors").write_bytes(with_header(b'"' + b"x" * (MAX_TEXT - 1) + b'"'))
    refused(tmp_path / "v.safetensors", f"a header of {MAX_TEXT + 1} bytes")


# --- hostile HDF5


@pytest.fixture
def hostile(tmp_path: Path) -> Callable[[Callable[[h5py.File], Any], str], None]:
    """Change a sound HDF5 file, and see it refused."""

    def attack(change: Callable[[h5py.File], Any], said: str) -> None:
        path = tmp_path / "v.h5"
        save(directions(), path)
        with h5py.File(path, "a") as file:
            change(file)
        refused(path, said)

    return attack


def test_links_are_refused(hostile: Any, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["patterns"] = np.ones((2, 3))

    def relink(link: Any) -> Callable[[h5py.File], None]:
        def change(file: h5py.File) -> None:
            del file["tensors/patterns"]
            file["tensors/patterns"] = link

        return change

    hostile(relink(h5py.ExternalLink(str(tmp_path / "secret.h5"), "patterns")), "is a link")
    hostile(relink(h5py.SoftLink("/tensors/readers")), "is a link")
    hostile(lambda file: file.__setitem__("tensors/again", file["tensors/patterns"]), "several names")
    hostile(lambda file: file["tensors"].__setitem__("loop", file["tensors"]), "several names")


def test_data_outside_the_file_is_never_read(hostile: Any, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(np.ones(6).tobytes())

    def external(file: h5py.File) -> None:
        del file["tensors/patterns"]
        file.create_dataset("tensors/patterns", (2, 3), "f8", external=[(str(tmp_path / "secret.bin"), 0, 48)])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((2, 3), "f8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "patterns", (2, 3))
        del file["tensors/patterns"]
        file.create_virtual_dataset("tensors/patterns", layout)

    hostile(external, "does not hold its own data")
    hostile(virtual, "does not hold its own data")


def test_claims_beyond_the_file_are_refused_before_they_are_read(hostile: Any) -> None:
    def claim(**options: Any) -> Callable[[h5py.File], None]:
        return lambda file: file.create_dataset("tensors/extra", dtype="f8", **options)

    hostile(claim(shape=(1 << 40,)), "claim more than the file holds")
    hostile(claim(shape=(1 << 40,), chunks=(1 << 20,), compression="gzip"), "does not hold its own data")
    hostile(claim(shape=(3,), maxshape=(None,), chunks=(1 << 26,)), "does not hold its own data")


def test_other_kinds_of_data_are_refused(hostile: Any) -> None:
    words = h5py.string_dtype()
    hostile(lambda file: file.create_dataset("tensors/extra", data=["a", "b"], dtype=words), "holds object")
    hostile(lambda file: file.create_dataset("tensors/extra", data=np.ones(2, "f2")), "holds float16")
    hostile(lambda file: file.create_dataset("tensors/extra", data=np.zeros(2, [("a", "f8")])), "holds")
    hostile(lambda file: file.__setitem__("tensors/type", np.dtype("f8")), "neither group nor dataset")
    hostile(lambda file: file.create_dataset("extra", data=np.ones(2)), "'extra' is unknown")
    hostile(lambda file: file.create_dataset("tensors/a/b/c/d", data=np.ones(2)), "too deep")


def test_a_missing_or_odd_text(hostile: Any) -> None:
    def retext(data: Any) -> Callable[[h5py.File], None]:
        def change(file: h5py.File) -> None:
            del file["emocore"]
            if data is not None:
                file["emocore"] = data

        return change

    for data in (None, np.ones(3), np.zeros(3, "u1"), np.frombuffer(b"\xff\xfe", "u1"), np.uint8(7)):
        hostile(retext(data), "not a file that emocore saved")


# --- what is not a file


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.h5")
    for name in ("zero.safetensors", "pipe.h5"):
        refused(tmp_path / name, "not a regular file")


def test_a_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with open(path, "wb") as file:
        file.truncate((1 << 36) + 1)  # sparse
    refused(path, "too large; expected at most 68719476736 bytes")
