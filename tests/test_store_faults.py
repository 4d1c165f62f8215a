"""Store against files that are damaged, foreign or hostile: a StoreError naming the file, never anything else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from emocore import load, save
from emocore.calibration import StreamReference
from emocore.directions import Directions
from emocore.errors import StoreError
from emocore.formats import FORMATS
from emocore.moments import Moments

SUFFIXES = (".safetensors", ".h5")
every_format = pytest.mark.parametrize("suffix", SUFFIXES)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def directions() -> Directions:
    patterns, one = randn(2, 3), torch.ones(2, dtype=torch.float64)
    plain = Directions(("calm", "sad"), patterns, patterns.float(), patterns[0], 2.0, one, "layers.0")
    reference = Moments(covariance=True)
    reference.update(randn(9, 3, seed=1))
    stream = StreamReference(0.5, 4, 9, randn(3, 2, seed=2), randn(3, 2, seed=3).abs(), randn(3, 4, 2, seed=4))
    return plain.calibrate(reference).calibrate(stream)


def moments() -> Moments:
    m = Moments(labels=["calm", "sad"])
    m.update(randn(9, 3), torch.arange(9) % 2)
    return m


def refused(path: Path, said: str | None = None) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


def forged(
    obj: Any, path: Path, header: Callable[[Any], Any] = lambda h: h, tensors: Callable[[Any], Any] = lambda t: t
) -> Path:
    """`obj` saved with its header and tensors changed, under a right checksum."""
    save(obj, path)
    form = FORMATS[path.suffix]
    text, found = form.unpack(path.read_bytes())
    path.write_bytes(form.pack(tensors(found), json.dumps(header(json.loads(text)))))
    return path


# --- damage


@every_format
def test_truncated_anywhere(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"v{suffix}"
    save(directions(), path)
    whole = path.read_bytes()
    for size in [*range(0, 64), *range(64, len(whole), 41), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(path, "not a file that emocore saved, or damaged")


@every_format
def test_a_flipped_bit_is_found_or_harmless(suffix: str, tmp_path: Path) -> None:
    path, vectors = tmp_path / f"v{suffix}", directions()
    save(vectors, path)
    whole = path.read_bytes()
    found = 0
    for at in range(0, len(whole), 23):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            back = load(path)
        except StoreError:
            found += 1
            continue
        for name in ("patterns", "readers", "centre", "residual"):  # a byte that nothing depends on
            assert torch.equal(getattr(back, name), getattr(vectors, name))
        assert (back.names, back.mean_norm) == (vectors.names, vectors.mean_norm)
    assert found > len(whole) // 23 // 4


@every_format
def test_garbage_behind_and_before(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"v{suffix}"
    save(directions(), path)
    whole = path.read_bytes()
    path.write_bytes(b"\0" * 8 + whole)
    refused(path)
    path.write_bytes(whole[: len(whole) // 2] * 2)
    refused(path)


@every_format
def test_what_was_saved_before_is_named_where_it_is_whole(suffix: str, tmp_path: Path) -> None:
    path, before = tmp_path / f"v{suffix}", tmp_path / f"v.previous{suffix}"
    save(directions(), path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, r"damaged; got .*\. Save it again from its source\.$")
    save(directions(), path)  # what is kept now is the damaged one
    save(moments(), path)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, rf"damaged; got .*or load {before}, which is what was saved there before\.")
    assert load(before).names == ("calm", "sad")
    before.write_bytes(b"")
    refused(path, r"Save it again from its source\.$")


def test_a_way_back_of_a_newer_format_is_none(tmp_path: Path) -> None:
    forged(directions(), tmp_path / "v.previous.h5", changed(format=2))
    (tmp_path / "v.h5").write_bytes(b"")
    refused(tmp_path / "v.h5", r"Save it again from its source\.$")


# --- foreign files


@every_format
@pytest.mark.parametrize("data", [b"", b"\0", b"\x89PNG\r\n\x1a\n" * 50, b"PK\x03\x04" * 50, b"{}" * 99])
def test_foreign_bytes(data: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"v{suffix}").write_bytes(data)
    refused(tmp_path / f"v{suffix}", "not a file that emocore saved")


def test_one_format_under_the_other_s_name(tmp_path: Path) -> None:
    save(directions(), tmp_path / "v.h5")
    (tmp_path / "v.h5").rename(tmp_path / "v.safetensors")
    refused(tmp_path / "v.safetensors")


def test_foreign_safetensors_and_hdf5(tmp_path: Path) -> None:
    (tmp_path / "v.safetensors").write_bytes(safetensors.numpy.save({"weight": np.ones(3)}))
    refused(tmp_path / "v.safetensors")
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["weight"] = np.ones(3)
    refused(tmp_path / "v.h5")


# --- headers that lie, in files that are otherwise sound


def changed(**values: Any) -> Callable[[Any], Any]:
    return lambda header: header | values


def inside(**values: Any) -> Callable[[Any], Any]:
    return lambda header: header | {"object": header["object"] | values}


@every_format
def test_a_newer_format_names_both_versions(suffix: str, tmp_path: Path) -> None:
    path = forged(directions(), tmp_path / f"v{suffix}", changed(format=2, kind="Later"))
    refused(path, r"newer emocore; expected format 1 or older; got 2\. Upgrade")


@every_format
@pytest.mark.parametrize(
    "header",
    [
        changed(format="1"),
        changed(format=True),
        changed(kind="Tensor"),
        changed(kind=["Directions"]),
        changed(object=None),
        changed(object={}),
        lambda h: {k: v for k, v in h.items() if k != "format"},
        lambda h: {"format": 1, "kind": "Directions", "objects": {"layers.0": h["object"]}},
        lambda h: [h],
        inside(names=["calm"]),
        inside(names=["calm", "calm"]),
        inside(names=["calm", 3]),
        inside(names=["calm", "sad", "on edge"]),
        inside(mean_norm="much"),
        inside(mean_norm=float("nan")),
        inside(mean_norm=-1.0),
        inside(hook_point=3),
        inside(tokens={"skip": -1}),
        inside(tokens={"jump": 3}),
        inside(tokens=3),
        inside(provenance="none"),
        inside(calibration={"count": 1.5, "tokens": None}),
        inside(calibration={}),
        inside(stream={"alpha": "fast", "window": 4, "count": 9}),
        inside(stream={"alpha": 0.5, "window": None, "count": 9}),
    ],
)
def test_headers_of_directions_that_lie(header: Callable[[Any], Any], suffix: str, tmp_path: Path) -> None:
    refused(forged(directions(), tmp_path / f"v{suffix}", header), "not a file that emocore saved")


@every_format
@pytest.mark.parametrize(
    "header",
    [
        inside(dtype="load"),
        inside(dtype="int64"),
        inside(labels=["calm", "calm"]),
        inside(labels=["calm"]),
        inside(labels=["calm", "sad", "on edge"]),
        inside(labels="calm"),
        inside(labels=2),
        inside(covariance=True),
        inside(covariance="no"),
        inside(block_rows=-512),
        inside(block_rows=1e9),
        inside(frozen=1),
        inside(norm_count=1.5),
        inside(ledger={}),
        lambda h: inside(ledger=h["object"]["ledger"] | {"forwards": "many"})(h),
        lambda h: inside(ledger=h["object"]["ledger"] | {"rows": {"formed": 1.5}})(h),
        lambda h: inside(ledger=h["object"]["ledger"] | {"tokens": {"offered": 1, "lost": 1}})(h),
        inside(tokens={"skip": 1, "pool": "sum", "span": None}),
    ],
)
def test_headers_of_moments_that_lie(header: Callable[[Any], Any], suffix: str, tmp_path: Path) -> None:
    refused(forged(moments(), tmp_path / f"v{suffix}", header), "not a file that emocore saved")


def replaced(name: str, t: Tensor | None) -> Callable[[Any], Any]:
    return lambda found: {k: v for k, v in (found | {name: t}).items() if v is not None}


@every_format
@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("patterns", randn(2, 3) * torch.nan),
        ("patterns", randn(2, 4)),
        ("patterns", torch.zeros(2, 3, dtype=torch.float64)),
        ("patterns", randn(2, 3).float()),
        ("patterns", torch.zeros(0, 3, dtype=torch.float64)),
        ("patterns", torch.tensor(1.0).double()),
        ("patterns", None),
        ("readers", torch.ones(2, 3, dtype=torch.int64)),
        ("centre", None),
        ("residual", randn(3)),
        ("calibration_std", torch.zeros(2, dtype=torch.float64)),
        ("calibration_mean", randn(3)),
        ("calibration_mean", None),
        ("stream_largest", randn(3, 4, 3)),
        ("stream_largest", randn(2)),
        ("stream_std", None),
        ("extra", randn(2)),
    ],
)
def test_tensors_of_directions_that_lie(name: str, t: Tensor | None, suffix: str, tmp_path: Path) -> None:
    refused(forged(directions(), tmp_path / f"v{suffix}", tensors=replaced(name, t)), "not a file that emocore saved")


@every_format
@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("shift", randn(4)),
        ("shift", randn(3).float()),
        ("shift", torch.tensor(1.0).double()),
        ("shift", None),
        ("count", torch.zeros(2, dtype=torch.int64)),
        ("count", torch.tensor(1.0).double()),
        ("tiles", torch.zeros(1, 128, 128).double()),
        ("label_total", randn(3, 3)),
        ("label_total", None),
        ("norm_sum", randn(2)),
        ("norm_sum", None),
        ("extra", randn(2)),
    ],
)
def test_tensors_of_moments_that_lie(name: str, t: Tensor | None, suffix: str, tmp_path: Path) -> None:
    refused(forged(moments(), tmp_path / f"v{suffix}", tensors=replaced(name, t)), "not a file that emocore saved")


@every_format
def test_a_tensor_of_no_listed_hook_point(suffix: str, tmp_path: Path) -> None:
    obj = {"layers.0": directions()}
    refused(forged(obj, tmp_path / f"v{suffix}", tensors=lambda t: t | {"layers.1/patterns": randn(2, 3)}))
    refused(forged(obj, tmp_path / f"v{suffix}", tensors=lambda t: t | {"patterns": randn(2, 3)}))


@every_format
def test_a_changed_tensor_or_header_does_not_fit_the_checksum(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"v{suffix}"
    save(directions(), path)
    whole = path.read_bytes()
    patterns = directions().patterns.numpy().tobytes()
    assert whole.count(patterns) == 1
    path.write_bytes(whole.replace(patterns, (directions().patterns * 2).numpy().tobytes()))
    refused(path, "the checksum does not fit")
    assert whole.count(b"calm") == 1
    path.write_bytes(whole.replace(b"calm", b"clam"))
    refused(path, "the checksum does not fit")


@every_format
def test_a_key_twice_in_the_json_text(suffix: str, tmp_path: Path) -> None:
    path, form = tmp_path / f"v{suffix}", FORMATS[suffix]
    save(directions(), path)
    text, tensors = form.unpack(path.read_bytes())
    path.write_bytes(form.pack(tensors, text.replace('"format": 1', '"format": 1, "format": 1')))
    refused(path, "a key twice")


def test_an_empty_tensor_of_an_absurd_shape(tmp_path: Path) -> None:
    absurd = torch.zeros(1, dtype=torch.float64)[:0].expand(99_999_999, 0).reshape(0, 99_999_999)
    refused(forged(moments(), tmp_path / "v.safetensors", tensors=replaced("label_total", absurd)))


def test_names_that_look_like_paths_touch_nothing(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "v.safetensors"
    path.parent.mkdir()
    refused(forged(directions(), path, tensors=lambda t: t | {"../../escaped": randn(2)}))
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]
