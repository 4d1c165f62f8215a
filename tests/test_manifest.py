"""Manifests and shards that are damaged, foreign or hostile: a StoreError naming the file, never anything else."""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emocore import ActivationStore, Ledger, activations, store
from emocore.errors import ArgumentError, StoreError
from emocore.manifest import Index, Manifest, Point, Rows
from emocore.shards import Layout

Change = Callable[[dict[str, Any]], Any]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with ActivationStore(tmp_path, labels=["calm", "sad"], model="m") as kept:
        kept.at("a").update(randn(20, 8), labels=[0] * 20, requests=["r"] * 20)
        kept.at("b").update(randn(10, 8), labels=[1] * 10)
    return tmp_path


def manifest_of(folder: Path) -> Path:
    (path,) = folder.glob("manifest-*")
    return path


def forged(folder: Path, change: Change) -> None:
    """The manifest changed, under a right checksum."""
    path = manifest_of(folder)
    body = json.loads(path.read_text())
    del body["crc32"]
    body = change(body) or body
    if isinstance(body, dict):
        body = {"crc32": zlib.crc32(json.dumps(body, sort_keys=True).encode()), **body}
    path.write_text(json.dumps(body))


def refused(folder: Path, said: str = "manifest|shard") -> None:
    for opened in (activations, ActivationStore):
        with pytest.raises(StoreError, match=said):
            opened(folder)


def test_manifests_survive_their_own_reader(folder: Path) -> None:
    forged(folder, lambda body: None)
    assert len(activations(folder)["a"]) == 20


# --- the literal form, which other versions will have to read


def test_the_literal_form() -> None:
    """A manifest that no code of this version wrote."""
    ledger = Ledger().as_dict()
    ledger["rows"] |= {"formed": 3, "accumulated": 3}
    body = {
        "format": 1,
        "kind": "activations",
        "generation": 7,
        "labels": ["calm"],
        "points": [{"hook_point": "a", "dtype": "float16", "dim": 2, "tokens": None, "ledger": ledger}],
        "rows": [
            {
                "file": "rows-00000000-000.safetensors",
                "point": 0,
                "rows": 3,
                "crc32c": 5,
                "index": "index-00000000-000.safetensors",
            }
        ],
        "indexes": [
            {"file": "index-00000000-000.safetensors", "rows": 3, "requests": 1, "text": 4, "crc32c": 4294967295}
        ],
        "sequences": 3,
        "rank": 0,
        "world": 1,
        "ranks": None,
        "model": None,
        "versions": {"emocore": "0.1.0"},
    }
    data = json.dumps({"crc32": zlib.crc32(json.dumps(body, sort_keys=True).encode()), **body}).encode()
    found = Manifest.from_bytes(data)
    assert found.points == (Point("a", "float16", 2, None, ledger),)
    rows, index = "rows-00000000-000.safetensors", "index-00000000-000.safetensors"
    assert found.rows == (Rows(rows, 0, 3, 5, index),)
    assert found.indexes == (Index(index, 3, 1, 4, 4294967295),)
    assert json.loads(found.to_bytes()) == json.loads(data)
    header = (
        '{"__metadata__": {"emocore": "1", "kind": "rows", "hook_point": "a"}, '
        '"rows": {"dtype": "F16", "shape": [3, 2], "data_offsets": [0, 12]}}'
    )
    assert found.layouts()[rows].header() == (4088).to_bytes(8, "little") + header.encode().ljust(4088)
    assert found.layouts()[index].size == 3 * 8 + 8 + 4 * 3 * 4 + 4


# --- manifests


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_truncated_manifests(cut: int, folder: Path) -> None:
    path = manifest_of(folder)
    path.write_bytes(path.read_bytes()[:cut])
    refused(folder, "no manifest is whole.*manifest-00000001.json")


def test_a_flipped_bit_in_a_manifest(folder: Path) -> None:
    path = manifest_of(folder)
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(StoreError):
            activations(folder)


@pytest.mark.parametrize("data", [b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 1}', b"1e999"])
def test_foreign_manifests(data: bytes, folder: Path) -> None:
    manifest_of(folder).write_bytes(data)
    refused(folder, "not a manifest, or damaged")


def test_a_huge_manifest_is_not_read(folder: Path) -> None:
    os.truncate(manifest_of(folder), 1 << 40)
    refused(folder, "not a manifest, or damaged")


def test_a_newer_manifest(folder: Path) -> None:
    forged(folder, lambda body: body.update(format=2))
    refused(folder, r"newer emocore; expected format 1; got 2")


def test_another_generation_s_manifest(folder: Path) -> None:
    path = manifest_of(folder)
    path.rename(folder / "manifest-00000005.json")
    refused(folder, "another generation")


def test_manifests_that_are_no_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, elsewhere = manifest_of(folder), tmp_path_factory.mktemp("elsewhere") / "manifest"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused(folder)
    path.unlink()
    os.mkfifo(path)
    refused(folder)
    path.unlink()
    path.mkdir()
    refused(folder)


def in_part(part: str, **values: Any) -> Change:
    return lambda body: body[part][0].update(values)


def in_ledger(**values: Any) -> Change:
    return lambda body: body["points"][0]["ledger"]["rows"].update(values)


ROWS = "rows-00000000-000.safetensors"


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("labels"),
        lambda body: body.update(more=1),
        lambda body: body.update(kind="moments"),
        lambda body: body.update(format="1"),
        lambda body: body.update(format=True),
        lambda body: body.update(generation=-1),
        lambda body: body.update(generation=1.0),
        lambda body: body.update(labels="calm"),
        lambda body: body.update(labels=["calm", "calm"]),
        lambda body: body.update(labels=[1, 2]),
        lambda body: body.update(labels=["a\0b", "c"]),
        lambda body: body.update(model=3),
        lambda body: body.update(versions=[]),
        lambda body: body.update(versions={"emocore": 1}),
        lambda body: body.update(world=0),
        lambda body: body.update(rank=1),
        lambda body: body.update(ranks=[7]),
        lambda body: body.update(ranks=3),
        lambda body: body.update(sequences=1 << 60),
        lambda body: body.update(rows=None),
        lambda body: body.update(rows=[3]),
        lambda body: body.update(rows=body["rows"] * 2),
        lambda body: body["rows"].pop(),
        lambda body: body["indexes"].pop(),
        lambda body: body.update(points=body["points"][:1]),
        lambda body: body["points"][1].update(hook_point="a"),
        in_part("points", hook_point=3),
        in_part("points", hook_point=""),
        in_part("points", dtype="float64"),
        in_part("points", dtype="object"),
        in_part("points", dim=0),
        in_part("points", dim=-8),
        in_part("points", dim=1 << 40),
        in_part("points", dim=8.0),
        in_part("points", tokens={"skip": -1}),
        in_part("points", tokens={"jump": 1}),
        in_part("points", tokens=[]),
        in_part("points", ledger={}),
        in_ledger(accumulated=19),
        in_ledger(accumulated=19, dropped=1),
        in_ledger(formed=1.5),
        in_ledger(dropped=-1, nonfinite=1),
        in_ledger(lost=0),
        in_part("rows", file="../rows-00000000-000.safetensors"),
        in_part("rows", file="/etc/passwd"),
        in_part("rows", file="rank-00000/../rows-00000000-000.safetensors"),
        in_part("rows", file="rows-00000000-000.safetensors\n"),
        in_part("rows", file="rows-0000000\u0660-000.safetensors"),
        in_part("rows", file="index-00000000-000.safetensors"),
        in_part("rows", file="a\0b"),
        in_part("rows", file=7),
        in_part("rows", rows=-20),
        in_part("rows", rows=99_999_999_999_999),
        in_part("rows", rows=True),
        in_part("rows", point=2),
        in_part("rows", point=-1),
        in_part("rows", crc32c=1 << 32),
        in_part("rows", index="index-00000000-001.safetensors"),
        in_part("rows", index=[]),
        in_part("indexes", rows=19),
        in_part("indexes", file=ROWS),
        in_part("indexes", requests=-1),
        in_part("indexes", text="4"),
    ],
)
def test_manifests_that_lie(change: Change, folder: Path) -> None:
    def keep(body: dict[str, Any]) -> None:
        change(body)

    forged(folder, keep)
    refused(folder, "not a manifest, or damaged")


# --- shards: what the manifest does not imply is refused before it is looked at


def header(entries: str, length: int | None = None) -> bytes:
    return (4088 if length is None else length).to_bytes(8, "little") + entries.encode().ljust(4088)


METADATA = '"__metadata__": {"emocore": "1", "kind": "rows", "hook_point": "a"}'
WHOLE = '"rows": {"dtype": "F32", "shape": [20, 8], "data_offsets": [0, 640]}'


@pytest.mark.parametrize(
    "head",
    [
        bytes(4096),
        header("{}"),
        header("{" + WHOLE + "}"),
        header("{" + METADATA + ", " + WHOLE + ", " + WHOLE + "}"),
        header("{" + METADATA + ", " + WHOLE + "}", length=1 << 62),
        header("{" + METADATA + ", " + WHOLE + "}", length=8),
        header("{" + METADATA + ', "rows": {"dtype": "F32", "shape": [0, 99999999999999], "data_offsets": [0, 640]}}'),
        header("{" + METADATA + ', "rows": {"dtype": "F32", "shape": [20, 8], "data_offsets": [0, 1280]}}'),
        header("{" + METADATA + ', "rows": {"dtype": "F32", "shape": [-20, -8], "data_offsets": [0, 640]}}'),
        header("{" + METADATA + ', "rows": {"dtype": "BF16", "shape": [40, 8], "data_offsets": [0, 640]}}'),
        header("{" + METADATA + ', "../rows": {"dtype": "F32", "shape": [20, 8], "data_offsets": [0, 640]}}'),
        header('{"__metadata__": {"emocore": "1", "kind": "rows", "hook_point": "b"}, ' + WHOLE + "}"),
    ],
)
def test_headers_of_shards_that_lie(head: bytes, folder: Path) -> None:
    path = folder / ROWS
    assert path.read_bytes()[:4096] == header("{" + METADATA + ", " + WHOLE + "}")
    path.write_bytes(head + path.read_bytes()[4096:])
    found = activations(folder)
    with pytest.raises(StoreError, match=f"{ROWS}: its header is not the one"):
        _ = found["a"][0]
    assert len(found["b"].rows) == 10
    with pytest.raises(StoreError, match=ROWS):
        store.verify(folder)


@pytest.mark.parametrize("file", [ROWS, "index-00000000-000.safetensors"])
@pytest.mark.parametrize("size", [0, 7, 4095, 4096, 4096 + 639, 1 << 40])
def test_shards_of_another_size_are_refused_when_opened(size: int, file: str, folder: Path) -> None:
    os.truncate(folder / file, size)
    refused(folder, rf"{file}: truncated or changed.*got {size}")


def test_a_shard_that_shrinks_after_opening(folder: Path) -> None:
    found = activations(folder)
    os.truncate(folder / ROWS, 4200)
    with pytest.raises(StoreError, match="truncated or changed"):
        _ = found["a"][0]


def test_shards_that_are_no_files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, elsewhere = folder / ROWS, tmp_path_factory.mktemp("elsewhere") / "secret"
    path.rename(elsewhere)
    refused(folder, f"{ROWS}: could not be opened; got No such file")
    path.symlink_to(elsewhere)
    refused(folder, f"{ROWS}: could not be opened")
    path.unlink()
    os.mkfifo(path)
    refused(folder, "not a regular file")
    path.unlink()
    path.mkdir()
    refused(folder, "not a regular file")


def test_no_link_to_a_rank_s_folder_is_followed(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, rank=0, world=2) as kept:
        kept.at("a").update(randn(3, 2))
    store.join(tmp_path, allow_partial=True)
    (tmp_path / "rank-00000").rename(tmp_path / "elsewhere")
    (tmp_path / "rank-00000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="could not be opened"):
        activations(tmp_path)


@pytest.mark.parametrize(
    ("column", "value"), [("label", 2), ("label", -2), ("request", 1), ("request_ends", 9), ("request_ends", -1)]
)
def test_an_index_that_lies(column: str, value: int, folder: Path) -> None:
    """Ids without a name, under a right checksum of the manifest's."""
    from emocore._C import crc32c

    index = activations(folder).manifest.indexes[0]
    layout = index.layout
    at = 4096
    for name, (dtype, shape) in layout.tensors.items():
        if name == column:
            break
        at += dtype.itemsize * torch.Size(shape).numel()
    data = bytearray((folder / index.file).read_bytes())
    size = layout.tensors[column][0].itemsize
    data[at : at + size] = value.to_bytes(size, "little", signed=True)
    (folder / index.file).write_bytes(data)
    forged(folder, in_part("indexes", crc32c=crc32c(bytes(data[4096:]))))
    with pytest.raises(StoreError, match=index.file):
        store.verify(folder)


def test_a_name_that_does_not_fit_a_header() -> None:
    with pytest.raises(ArgumentError, match="too long for a shard"):
        Layout({}, {"hook_point": "a" * 4096}).header()
