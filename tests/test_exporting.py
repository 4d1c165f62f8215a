"""An activation store as HDF5 files: what h5py reads there is what was stored."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import h5py
import pytest
import torch
from torch import Tensor

from emocore import ActivationStore, activations, store
from emocore.errors import ArgumentError, StoreError


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    with ActivationStore(tmp_path / "acts", labels=["calm", "sad"], model="m", shard_rows=10) as writer:
        for name, dtype in (("a", torch.bfloat16), ("b", torch.float16), ("c", torch.float32)):
            for part in randn(30, 6).to(dtype).split(10):
                writer.at(name).update(part, labels=[1] * 10, requests=["r"] * 10)
    return tmp_path / "acts"


def read(files: tuple[Path, ...]) -> dict[str, Tensor]:
    """Rows by hook point."""
    found: dict[str, list[Tensor]] = {}
    for path in files:
        with h5py.File(path, "r") as file:
            about = json.loads(file["emocore"][()].tobytes())
            rows = torch.from_numpy(file["rows"][()])
            if file["rows"].attrs["emocore_dtype"] == "bfloat16":
                rows = rows.view(torch.bfloat16)
            assert file["label"][()].tolist() == [1] * len(rows)
            assert file["request"][()].tolist() == [0] * len(rows)
            assert file["request_names"][()].tobytes() == b"r"
            assert (about["labels"], about["model"]) == (["calm", "sad"], "m")
            found.setdefault(about["hook_point"], []).append(rows)
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_every_dtype(kept: Path, tmp_path: Path) -> None:
    files = store.to_hdf5(kept, tmp_path / "out")
    assert len(files) == 9
    assert set(files) == set((tmp_path / "out").iterdir())
    found = read(files)
    for name, view in activations(kept).items():
        assert torch.equal(found[name], view.rows)
        assert found[name].dtype == view.dtype


@pytest.mark.parametrize("compression", ["zstd", "blosc2"])
def test_compressed(compression: str, kept: Path, tmp_path: Path) -> None:
    found = read(store.to_hdf5(kept, tmp_path / "out", compression))
    assert torch.equal(found["a"], activations(kept)["a"].rows)


def test_joined_ranks_do_not_collide(tmp_path: Path) -> None:
    for rank in range(2):
        with ActivationStore(tmp_path, rank=rank, world=2) as writer:
            writer.at("a").update(randn(3, 2) + rank)
    store.join(tmp_path)
    assert len({*store.to_hdf5(tmp_path, tmp_path / "out")}) == 2


def test_what_is_refused(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="compression; expected None or zstd or blosc2; got 'gzip'"):
        store.to_hdf5(kept, tmp_path / "out", "gzip")

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(StoreError, match=r"hdf5plugin is not installed.*emocore-engine\[hdf5\]"):
        store.to_hdf5(kept, tmp_path / "out", "zstd")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"):
        store.to_hdf5(kept, tmp_path / "file")


def test_other_tools_read_it(kept: Path, tmp_path: Path) -> None:
    if not shutil.which("h5dump"):
        pytest.skip("no h5dump")
    path = store.to_hdf5(kept, tmp_path / "out")[0]
    shown = subprocess.run(["h5dump", "-H", str(path)], capture_output=True, text=True, check=True).stdout
    assert 'DATASET "rows"' in shown
    assert "( 10, 6 )" in shown
