"""Store: what is saved comes back bit for bit, in both formats, and other readers can open it."""

import dataclasses
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from emocore import load, save
from emocore.calibration import StreamReference
from emocore.capturing import capture
from emocore.directions import ByHookPoint, Directions
from emocore.errors import ArgumentError, StoreError
from emocore.moments import Moments
from emocore.tokens import Tokens

SUFFIXES = (".safetensors", ".h5", ".hdf5")
LABELS = ["at ease", "grief-stricken", "self-conscious", "a/b", 'quo"ted', "naïve 🙂", ".", ""]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(
    rows: int = 1000, dim: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> Moments:
    m = Moments(labels=LABELS, covariance=True, **options)
    m.update(randn(rows, dim, seed=seed).to(dtype), torch.arange(rows) % len(LABELS))
    return m


def directions_of(k: int = len(LABELS), dim: int = 9, seed: int = 0, **changes: Any) -> Directions:
    patterns = randn(k, dim, seed=seed)
    return Directions(
        names=tuple(LABELS[:k]),
        patterns=patterns,
        readers=(patterns / patterns.norm(dim=1, keepdim=True)).to(changes.pop("readers", torch.float32)),
        centre=randn(dim, seed=seed + 1),
        mean_norm=13.25,
        residual=torch.rand(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        **{"hook_point": "model.layers.20", "tokens": Tokens(skip=49, pool="mean"), **changes},
    )


def calibrated(**changes: Any) -> Directions:
    reference = Moments(covariance=True)
    reference.update(randn(50, 9, seed=3))
    reference.tokens = Tokens(span="assistant")
    k = len(LABELS)
    largest = randn(3, 7, k, seed=6)
    stream = StreamReference(1 / 3, 5, 70, randn(3, k, seed=4), randn(3, k, seed=5).abs(), largest)
    provenance = {"method": "whitened", "rank": None, "model": "Toy(hidden_size=9)", "tiny": 5e-324, "third": 1 / 3}
    return directions_of(provenance=provenance, **changes).calibrate(reference).calibrate(stream)


def bits(value: Any) -> Any:
    """Anything as nested plain values, floats and tensors by their bits."""
    if isinstance(value, Tensor):
        return str(value.dtype), list(value.shape), value.contiguous().reshape(-1).numpy().tobytes()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: bits(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(v) for v in value]
    return value.hex() if isinstance(value, float) else value


def state(obj: Any) -> Any:
    if isinstance(obj, dict):
        return {name: state(one) for name, one in obj.items()}
    return bits(obj.state_dict()) if isinstance(obj, Moments) else bits(obj)


def back(obj: Any, path: Path) -> Any:
    save(obj, path)
    return load(path)


every_format = pytest.mark.parametrize("suffix", SUFFIXES)


# --- round trips


@every_format
@pytest.mark.parametrize(
    "obj",
    [
        moments_of(),
        moments_of(20_000),  # folded blocks and staged rows
        moments_of(10, dtype=torch.float64),
        moments_of(600, dtype=torch.bfloat16, block_rows=1024),
        moments_of(300, dim=130),  # three tiles
        Moments(),
        Moments(labels=["a"]),
        Moments(dim=3, covariance=True),
        directions_of(),
        directions_of(2, tokens=None, hook_point=None),
        directions_of(readers=torch.float64),
        calibrated(),
    ],
    ids=repr,
)
def test_round_trip_is_bit_for_bit(obj: Any, suffix: str, tmp_path: Path) -> None:
    found = back(obj, tmp_path / f"x{suffix}")
    assert type(found) is type(obj)
    assert state(found) == state(obj)


@every_format
def test_mappings_keep_names_and_order(suffix: str, tmp_path: Path) -> None:
    names = ["transformer.h.11", "transformer.h.2", "a b-c", "ü", ".."]
    vectors = {name: directions_of(seed=i, hook_point=name) for i, name in enumerate(names)}
    found = back(vectors, tmp_path / f"v{suffix}")
    assert isinstance(found, ByHookPoint)
    assert list(found) == names
    assert state(found) == state(vectors)
    moments = {name: moments_of(seed=i) for i, name in enumerate(names)}
    assert state(back(moments, tmp_path / f"m{suffix}")) == state(moments)


@every_format
def test_a_captured_ledger_and_rule_come_back(suffix: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Identity()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.block(x)

    stats, model = Moments(labels=["at ease", "on edge"], covariance=True), Model()
    x, mask = randn(3, 6, 4), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    x[0, 3, 1] = torch.nan
    with capture(model, {"block": stats}, tokens=Tokens(skip=1)) as tap, tap.batch(labels=["at ease", None, "on edge"]):
        model(x, mask)
    stats.ledger.check()
    assert stats.ledger.tokens.as_dict() | {"selected": 7, "masked": 7, "skipped": 3, "nonfinite": 1} == (
        stats.ledger.tokens.as_dict()
    )
    found = back(stats, tmp_path / f"x{suffix}")
    assert found.ledger == stats.ledger
    assert found.tokens == Tokens(skip=1)
    found.ledger.check()


@every_format
def test_a_loaded_moments_goes_on(suffix: str, tmp_path: Path) -> None:
    rows, labels = randn(3000, 5).float(), torch.arange(3000) % 2
    whole = Moments(labels=2, covariance=True)
    whole.update(rows, labels)
    first = Moments(labels=2, covariance=True)
    first.update(rows[:1700], labels[:1700])
    resumed = back(first, tmp_path / f"x{suffix}")
    resumed.update(rows[1700:], labels[1700:])
    assert resumed.count == whole.count == 3000
    assert torch.equal(resumed.label_count, whole.label_count)
    # a split point of the summation tree: float32 chains regrouped
    torch.testing.assert_close(resumed.mean, whole.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(resumed.covariance(), whole.covariance(), rtol=1e-6, atol=1e-6)
    resumed.ledger.check()


@every_format
def test_saving_leaves_the_object_as_it_was(suffix: str, tmp_path: Path) -> None:
    m = moments_of(700)
    twin = moments_of(700)
    save(m, tmp_path / f"x{suffix}")
    for one in (m, twin):
        one.update(randn(900, 9, seed=2).float(), torch.zeros(900, dtype=torch.int64))
    assert state(m) == state(twin)


@every_format
def test_tensors_that_share_memory_are_saved(suffix: str, tmp_path: Path) -> None:
    patterns = torch.eye(2, dtype=torch.float64)
    v = Directions(("a", "b"), patterns, patterns, patterns[0], 1.0, patterns[1], "layers.0")
    assert state(back(v, tmp_path / f"x{suffix}")) == state(v)


@every_format
def test_the_same_object_makes_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    made = set()
    for _ in range(8):
        save(calibrated(), tmp_path / f"x{suffix}")
        made.add((tmp_path / f"x{suffix}").read_bytes())
    assert len(made) == 1


def test_loaded_tensors_are_the_caller_s_own(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        found = back(directions_of(), tmp_path / f"x{suffix}")
        found.patterns.add_(1.0)  # neither read-only nor shared
        assert not torch.equal(load(tmp_path / f"x{suffix}").patterns, found.patterns)


# --- other readers


def test_other_tools_read_our_safetensors(tmp_path: Path) -> None:
    path, vectors = tmp_path / "v.safetensors", calibrated()
    save({"model.layers.3": vectors}, path)
    with safetensors.safe_open(path, "np") as file:
        assert np.array_equal(file.get_tensor("model.layers.3/patterns"), vectors.patterns.numpy())
        header = json.loads(file.metadata()["emocore"])
    assert header["format"] == 1
    assert header["kind"] == "Directions"
    assert header["objects"]["model.layers.3"]["names"] == LABELS
    assert header["objects"]["model.layers.3"]["tokens"] == {"skip": 49, "pool": "mean", "span": None}


def test_other_tools_read_our_hdf5(tmp_path: Path) -> None:
    path, vectors = tmp_path / "v.h5", calibrated()
    save({"model.layers.3": vectors}, path)
    with h5py.File(path) as file:
        assert np.array_equal(file["tensors/model.layers.3/patterns"], vectors.patterns.numpy())
        header = json.loads(bytes(file["emocore"][()]))
    assert header["objects"]["model.layers.3"]["names"] == LABELS


def test_a_file_says_the_checksum_of_its_content(tmp_path: Path) -> None:
    save(directions_of(), tmp_path / "v.safetensors")
    with safetensors.safe_open(tmp_path / "v.safetensors", "pt") as file:
        text = file.metadata()["emocore"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    crc = zlib.crc32(text.encode())
    for name in ("centre", "patterns", "readers", "residual"):
        t = tensors[name]
        crc = zlib.crc32(t.numpy().tobytes(), zlib.crc32(f"{name} {t.dtype} {list(t.shape)}".encode(), crc))
    assert tensors["crc32"].tolist() == [crc]


# --- where it goes


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o000])
def test_the_mode_follows_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save(directions_of(), tmp_path / "v.h5")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "v.h5").stat().st_mode) == 0o666 & ~mask


@every_format
def test_saving_keeps_what_was_there_and_nothing_else(suffix: str, tmp_path: Path) -> None:
    for seed in range(3):
        save(directions_of(seed=seed), tmp_path / f"v{suffix}")
    assert {p.name for p in tmp_path.iterdir()} == {f"v{suffix}", f"v.previous{suffix}"}
    assert state(load(tmp_path / f"v{suffix}")) == state(directions_of(seed=2))
    assert state(load(tmp_path / f"v.previous{suffix}")) == state(directions_of(seed=1))


def test_a_file_of_another_s_is_kept_too(tmp_path: Path) -> None:
    (tmp_path / "v.h5").write_bytes(b"mine")
    save(directions_of(), tmp_path / "v.h5")
    assert (tmp_path / "v.previous.h5").read_bytes() == b"mine"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "v.h5").symlink_to(tmp_path / "real" / "kept.h5")
    save(directions_of(), tmp_path / "v.h5")
    assert (tmp_path / "v.h5").is_symlink()
    assert state(load(tmp_path / "real" / "kept.h5")) == state(directions_of())
    save(directions_of(seed=1), tmp_path / "v.h5")
    assert state(load(tmp_path / "real" / "kept.previous.h5")) == state(directions_of())


def test_paths_may_be_strings_and_long(tmp_path: Path) -> None:
    path = str(tmp_path / ("n" * 240 + ".safetensors"))
    save(directions_of(), path)
    assert state(load(path)) == state(directions_of())


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(directions_of(), "v.h5")
    assert (tmp_path / "v.h5").is_file()


# --- what cannot be saved


@pytest.mark.parametrize("name", ["v.pt", "v", "v.safetensors.bak", ".h5"])
def test_other_suffixes_are_refused_both_ways(name: str, tmp_path: Path) -> None:
    for call in (lambda: save(directions_of(), tmp_path / name), lambda: load(tmp_path / name)):
        with pytest.raises(ArgumentError, match=r"path: suffix; expected \.safetensors or \.h5 or \.hdf5"):
            call()


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        (torch.zeros(3), "expected Moments, Directions, or a mapping of them; got Tensor"),
        ({}, "cannot be saved; .*got dict"),
        ({"a": 3}, "cannot be saved; .*got int"),
        ({"a": Moments(), "b": directions_of()}, r"of one type; got \['Directions', 'Moments'\]"),
        ({"a/b": Moments()}, "without '/' or NUL; got 'a/b'"),
        ({"": Moments()}, "without '/' or NUL"),
        ({".": Moments()}, "without '/' or NUL"),
        ({3: Moments()}, "without '/' or NUL; got 3"),
        (directions_of(provenance={"run": torch.zeros(1)}), "provenance must be JSON"),
        (directions_of(provenance={"note": "x" * (1 << 23)}), "at most 8388608 bytes"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_the_old_file_kept(obj: Any, said: str, tmp_path: Path) -> None:
    save(directions_of(), tmp_path / "v.h5")
    with pytest.raises(ArgumentError, match=said):
        save(obj, tmp_path / "v.h5")
    assert state(load(tmp_path / "v.h5")) == state(directions_of())


@every_format
def test_a_missing_file_and_a_folder_are_named(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=rf"{tmp_path}/no{suffix}: could not be read; got No such file"):
        load(tmp_path / f"no{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(StoreError, match="not a regular file"):
        load(tmp_path / f"folder{suffix}")
