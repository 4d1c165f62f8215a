"""Files of format 1, kept for ever: they load as what was saved, and what is written now is the same to the byte."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from emocore import ActivationStore, activations, load, store
from emocore.formats import datasets
from emocore.moments import Moments
from emocore.replaying import Activations
from emocore.tokens import Tokens

from . import golden

KEPT = Path(__file__).parent / "data" / "format1"

every_format = pytest.mark.parametrize("suffix", [".safetensors", ".h5"])


# --- what save wrote


@every_format
def test_directions(suffix: str) -> None:
    found = load(KEPT / f"directions{suffix}")
    assert found.names == ("at ease", "grief-stricken")
    assert found.patterns.tolist() == [[3, 4, 0], [0, 0, -2]]
    assert torch.equal(found.readers, torch.tensor([[0.6, 0.8, 0], [0, 0, -1]]))
    assert found.centre.tolist() == [1, 2, 3]
    assert (found.mean_norm, found.residual.tolist(), found.hook_point) == (13.25, [1, 0.5], "model.layers.20")
    assert found.tokens == Tokens(skip=49, pool="mean")
    assert found.provenance == {"method": "difference", "model": "Toy(hidden_size=3)"}
    scale = found.scale()
    assert (scale.mean.tolist(), scale.std.tolist(), scale.count, scale.tokens) == ([0.5, -0.5], [2, 4], 90, Tokens())
    assert scale.stream is not None
    assert (scale.stream.alpha, scale.stream.window, scale.stream.count) == (0.125, 16, 90)
    assert scale.stream.mean.flatten().tolist() == list(range(6))
    assert scale.stream.std.flatten().tolist() == list(range(1, 7))
    assert scale.stream.largest.flatten().tolist() == list(range(12))


@every_format
def test_a_mapping_by_hook_point(suffix: str) -> None:
    found = load(KEPT / f"by_hook_point{suffix}")
    assert list(found) == ["layers.0", "layers.1"]
    for name, label, pattern, reader in (
        ("layers.0", "calm", [0, 5], [0, 1]),
        ("layers.1", "sad 🙂", [6, 0, 8], [0.6, 0, 0.8]),
    ):
        one = found[name]
        assert (one.names, one.hook_point, one.mean_norm) == ((label,), name, 2)
        assert (one.patterns.tolist(), one.readers.tolist()) == ([pattern], [reader])
        assert (one.centre.tolist(), one.residual.tolist()) == ([0] * len(pattern), [1])
        assert (one.tokens, one.calibration, one.provenance) == (None, None, {})


@every_format
def test_moments(suffix: str) -> None:
    found = load(KEPT / f"moments{suffix}")
    assert isinstance(found, Moments)
    assert (found.labels, found.count, found.dim) == (("calm", "on edge"), 4, 3)
    assert found.mean.tolist() == [2.25, 3, 1.5]
    assert (found.label_count.tolist(), found.label_mean.tolist()) == ([2, 1], [[4.5, 6, 0], [0, 0, 2]])
    assert torch.equal(found.covariance() * 3, torch.tensor([[24.75, 33, -13.5], [33, 44, -18], [-13.5, -18, 11]]))
    assert (found.mean_norm, found.tokens) == (5.25, Tokens(skip=1))
    found.ledger.check()
    assert (found.ledger.rows.formed, found.ledger.rows.accumulated, found.ledger.rows.nonfinite) == (5, 4, 1)
    found.update(torch.tensor([[1.25, 2, 3.5]]), torch.tensor([1]))  # and it goes on
    assert (found.count, found.mean.tolist(), found.label_count.tolist()) == (5, [2.05, 2.8, 1.9], [2, 2])


# --- what activation stores wrote


def columns(found: Activations, name: str) -> dict[str, Any]:
    """All of a hook point's places as lists, requests by name."""
    places = found[name].places
    lists = {column: getattr(places, column).tolist() for column in ("sequence", "position", "token", "label")}
    return {**lists, "request": [places.names[i] if i >= 0 else None for i in places.request.tolist()]}


def check_activations(found: Activations) -> None:
    """The newest of two generations."""
    assert (found.labels, found.manifest.model, found.manifest.sequences) == (("calm", "on edge"), "toy", 3)
    assert found.hook_points == ("layers.0", "layers.1", "layers.2")
    one, other = found["layers.0"], found["layers.1"]
    assert (one.dtype, other.dtype) == (torch.bfloat16, torch.float32)
    assert one.rows.tolist() == [[1, -2], [0.5, 256], [3, 4], [5, 6]]
    assert torch.equal(other.rows, torch.tensor([[1.25, 0, 3], [-1, 2.0**100, 0.1], [7, 8, 9]]))
    assert columns(found, "layers.0") == {
        "sequence": [0, 1, 2, 2],
        "position": [1, 2, -1, -1],
        "token": [3, -1, -1, -1],
        "label": [0, -1, 1, 0],
        "request": ["é", "r", "r", "r"],
    }
    assert columns(found, "layers.1") == {
        "sequence": [0, 1, 2],
        "position": [1, 2, -1],
        "token": [3, -1, -1],
        "label": [0, -1, 0],
        "request": ["é", "r", "r"],
    }
    assert (found["layers.2"].dtype, found["layers.2"].rows.shape) == (torch.float16, (0, 4))
    counts = [(rows.formed, rows.accumulated, rows.nonfinite) for rows in (x.rows for x in found.ledger.values())]
    assert counts == [(4, 4, 0), (4, 3, 1), (2, 0, 2)]


def test_activations() -> None:
    audit = store.verify(KEPT / "activations")
    assert (audit.generation, audit.hook_points, audit.shards, audit.rows, audit.bytes) == (2, 3, 7, 7, 209)
    check_activations(activations(KEPT / "activations"))


def test_the_generation_before() -> None:
    found = activations(KEPT / "activations", generation=1)
    assert found["layers.0"].rows.tolist() == [[1, -2], [0.5, 256]]
    assert columns(found, "layers.1")["label"] == [0, -1]
    assert found.ledger["layers.1"].rows.formed == 2


def test_a_writer_goes_on_from_it(tmp_path: Path) -> None:
    shutil.copytree(KEPT / "activations", tmp_path / "acts")
    with ActivationStore(tmp_path / "acts", labels=["calm", "on edge"], model="toy") as kept:
        kept.at("layers.0").update(torch.tensor([[9, 9]], dtype=torch.bfloat16), ["calm"])
    assert store.verify(tmp_path / "acts").rows == 8
    assert activations(tmp_path / "acts")["layers.0"].rows[-2:].tolist() == [[5, 6], [9, 9]]


def test_joined_ranks(tmp_path: Path) -> None:
    assert store.verify(KEPT / "ranks").rows == 4
    found = activations(KEPT / "ranks")
    assert (found.manifest.ranks, found.manifest.world, found.labels) == ([0, 1], 2, ("calm",))
    assert found["layers.0"].dtype == torch.float16
    assert found["layers.0"].rows.tolist() == [[1, 2], [3, 4], [11, 12], [13, 14]]
    assert columns(found, "layers.0")["request"] == ["a", "b0", "a", "b1"]
    assert columns(found, "layers.0")["label"] == [0, -1, 0, -1]
    shutil.copytree(KEPT / "ranks", tmp_path / "ranks")
    assert store.join(tmp_path / "ranks") == 2


def test_exported(tmp_path: Path) -> None:
    audit = store.from_hdf5(KEPT / "exported", tmp_path / "acts")
    assert (audit.hook_points, audit.shards, audit.rows, audit.bytes) == (3, 7, 7, 209)
    check_activations(activations(tmp_path / "acts"))


# --- what is written now


def bare(data: bytes) -> bytes:
    """A manifest without the versions of what wrote it."""
    return re.sub(rb'"crc32": \d+|"versions": {[^}]*}', b"", data)


def content(path: Path) -> dict[str, Any]:
    """What an HDF5 file holds, and how; the bytes between are the library's."""
    with h5py.File(path, "r") as file:
        return {
            name: (one.dtype, one.shape, one.id.get_create_plist().get_layout(), dict(one.attrs), one[()].tobytes())
            for name, one in datasets(file)
        }


READ: dict[str, Callable[[Path], Any]] = {
    ".safetensors": Path.read_bytes,
    ".json": lambda path: bare(path.read_bytes()),
    ".h5": content,
}


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    golden.write(folder)
    return folder


def test_the_same_files_are_written(written: Path) -> None:
    assert names(written) == names(KEPT)


@pytest.mark.parametrize("name", sorted(names(KEPT)))
def test_what_is_written_has_not_changed(name: str, written: Path) -> None:
    """Where it has: that is a new format, and gets a number and golden files of its own."""
    read = READ[Path(name).suffix]
    assert read(written / name) == read(KEPT / name)
