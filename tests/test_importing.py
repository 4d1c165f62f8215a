"""What `to_hdf5` wrote becomes a store again; files made to do harm become a StoreError, and nothing is left behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import pytest
import torch
from torch import Tensor

from emocore import ActivationStore, activations, importing, store
from emocore.errors import StoreError
from emocore.replaying import Activations
from emocore.unpacking import unpack


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Two shards each of three hook points, one of them without a row that is not finite."""
    with ActivationStore(tmp_path / "acts", labels=["calm", "sad"], model="m", shard_rows=10) as writer:
        for start in (0, 10):
            numbers = torch.arange(start, start + 10)
            for name, dtype in (("b", torch.bfloat16), ("a", torch.float16), ("c", torch.float32)):
                x = randn(10, 6, seed=start).to(dtype)
                x[3, 3] = torch.nan if name == "c" else 0.0
                requests = [f"é{i}" for i in numbers.tolist()]
                writer.at(name).update(
                    x, ["sad", None] * 5, requests, sequence=numbers, token=numbers, position=numbers
                )
    return tmp_path / "acts"


@pytest.fixture
def files(kept: Path, tmp_path: Path) -> Path:
    store.to_hdf5(kept, tmp_path / "out")
    return tmp_path / "out"


def alike(one: Activations, other: Activations) -> None:
    """Everything but generations and names of files."""
    assert one.hook_points == other.hook_points
    assert (one.labels, one.ledger, one.manifest.model) == (other.labels, other.ledger, other.manifest.model)
    assert one.manifest.sequences == other.manifest.sequences or one.manifest.ranks
    assert [shard.rows for shard in one.manifest.rows] == [shard.rows for shard in other.manifest.rows]
    for name, view in one.items():
        assert torch.equal(view.rows, other[name].rows)
        assert (view.dtype, view.tokens) == (other[name].dtype, other[name].tokens)
        assert view.places.names == other[name].places.names
        for column in ("sequence", "request", "position", "token", "label"):
            assert torch.equal(getattr(view.places, column), getattr(other[name].places, column))


def nothing_left(tmp_path: Path) -> None:
    assert {path.name for path in tmp_path.iterdir()} <= {"acts", "out"}


def test_round_trip(kept: Path, files: Path, tmp_path: Path) -> None:
    """Rows, places, ledgers, and which hook points share an index; and the store goes on."""
    audit = store.from_hdf5(files, tmp_path / "again")
    assert (audit.rows, audit.hook_points) == (58, 3)
    alike(activations(kept), activations(tmp_path / "again"))
    assert len(list((tmp_path / "again").glob("index-*"))) == len(list(kept.glob("index-*")))
    assert not list(tmp_path.glob(".*"))
    for folder in (kept, tmp_path / "again"):
        with ActivationStore(folder) as writer:
            writer.at("a").update(randn(3, 6).half(), sequence=torch.tensor([20, 21, 22]))
    alike(activations(kept), activations(tmp_path / "again"))


def with_empty(folder: Path) -> None:
    """Three hook points, of which the first and the last have no row that is finite."""
    with ActivationStore(folder, labels=["calm"]) as writer:
        writer.at("none").update(torch.full((2, 5), torch.nan), ["calm", None])
        writer.at("some").update(randn(3, 4).bfloat16(), requests=["r", "s", "r"])
        writer.at("last").update(torch.full((7, 6), torch.inf, dtype=torch.float16))


def test_a_hook_point_without_rows(tmp_path: Path) -> None:
    with_empty(tmp_path / "acts")
    files = store.to_hdf5(tmp_path / "acts", tmp_path / "out")
    assert [file.name for file in files] == ["rows-00000000-001.h5", "empty-000.h5", "empty-002.h5"]
    store.from_hdf5(tmp_path / "out", tmp_path / "again")
    again = activations(tmp_path / "again")
    alike(activations(tmp_path / "acts"), again)
    assert again.hook_points == ("none", "some", "last")
    assert (again["none"].rows.shape, again["last"].rows.dtype) == ((0, 5), torch.float16)
    assert [ledger.rows.nonfinite for ledger in again.ledger.values()] == [2, 0, 7]
    for name in ("acts", "again"):
        with ActivationStore(tmp_path / name) as writer:
            writer.at("none").update(randn(1, 5))
    alike(activations(tmp_path / "acts"), activations(tmp_path / "again"))


def test_a_hook_point_that_has_rows_by_the_next_export(tmp_path: Path) -> None:
    """The file that said it had none goes."""
    with_empty(tmp_path / "acts")
    store.to_hdf5(tmp_path / "acts", tmp_path / "out")
    with ActivationStore(tmp_path / "acts") as writer:
        writer.at("none").update(randn(1, 5))
    store.to_hdf5(tmp_path / "acts", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").glob("empty*")} == {"empty-002.h5"}
    store.from_hdf5(tmp_path / "out", tmp_path / "again")
    alike(activations(tmp_path / "acts"), activations(tmp_path / "again"))


def test_no_rows_at_all(tmp_path: Path) -> None:
    with ActivationStore(tmp_path / "acts") as writer:
        writer.at("none").update(torch.full((2, 5), torch.nan))
    store.to_hdf5(tmp_path / "acts", tmp_path / "out")
    assert store.from_hdf5(tmp_path / "out", tmp_path / "again").rows == 0
    alike(activations(tmp_path / "acts"), activations(tmp_path / "again"))


@pytest.mark.parametrize("compression", ["zstd", "blosc2"])
def test_compressed(compression: str, kept: Path, tmp_path: Path) -> None:
    store.to_hdf5(kept, tmp_path / "out", compression)
    store.from_hdf5(tmp_path / "out", tmp_path / "again")
    alike(activations(kept), activations(tmp_path / "again"))


def test_a_capture_and_joined_ranks(tokenwise: Any, tmp_path: Path) -> None:
    from emocore import Tokens, capture

    model, ids = tokenwise(), torch.arange(3, 11).reshape(2, 4)
    for rank in range(2):
        with ActivationStore(tmp_path / "acts", rank=rank, world=2) as writer:
            for _ in range(2):
                with capture(model, "layers.*", writer, tokens=Tokens(skip=1)):
                    model(ids + rank)
    store.join(tmp_path / "acts")
    store.to_hdf5(tmp_path / "acts", tmp_path / "out")
    store.from_hdf5(tmp_path / "out", tmp_path / "again")
    found, again = activations(tmp_path / "acts"), activations(tmp_path / "again")
    alike(found, again)
    assert found["layers.0"].tokens == Tokens(skip=1)
    assert again.manifest.sequences > int(again["layers.0"].places.sequence.max())


def test_joined_ranks_become_a_plain_store(tmp_path: Path) -> None:
    """Also where the ranks have not the same hook points, and one of these has no rows; a writer goes on with it."""
    for rank in range(2):
        with ActivationStore(tmp_path / "acts", labels=["calm"], model="m", rank=rank, world=2) as writer:
            where = {"requests": ["a", f"b{rank}"], "sequence": torch.tensor([rank, rank + 2])}
            writer.at(f"only.{rank}").update(torch.full((1 + rank, 3), torch.nan))
            writer.at("both").update(randn(2, 3, seed=rank), ["calm", None], **where)
    store.join(tmp_path / "acts")
    store.to_hdf5(tmp_path / "acts", tmp_path / "out")
    store.from_hdf5(tmp_path / "out", tmp_path / "again")
    found, again = activations(tmp_path / "acts"), activations(tmp_path / "again")
    alike(found, again)
    assert again.hook_points == ("only.0", "both", "only.1")
    assert (again.manifest.rank, again.manifest.world, again.manifest.ranks) == (0, 1, None)
    assert [ledger.rows.nonfinite for ledger in again.ledger.values()] == [1, 0, 2]
    with ActivationStore(tmp_path / "again") as writer:
        writer.at("both").update(randn(1, 3))
    assert store.verify(tmp_path / "again").rows == 5


def test_an_empty_folder_may_be_there_already(files: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    store.from_hdf5(files, tmp_path / "again")
    with pytest.raises(StoreError, match="again: is not empty"):
        store.from_hdf5(files, tmp_path / "again")
    store.verify(tmp_path / "again")


# --- hostile files


def replaced(name: str, **options: Any) -> Callable[[h5py.File], None]:
    """Another dataset under a name, marked as the one before."""

    def change(file: h5py.File) -> None:
        about, like = dict(file[name].attrs), {"shape": file[name].shape, "dtype": file[name].dtype}
        del file[name]
        made = file.create_dataset(name, **{**like, **options})
        made.attrs.update(about)

    return change


def text(old: bytes, new: bytes) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        data = file["emocore"][()].tobytes()
        assert old in data
        del file["emocore"]
        file["emocore"] = np.frombuffer(data.replace(old, new, 1), dtype=np.uint8)

    return change


def virtual(file: h5py.File) -> None:
    rows, about = file["rows"], dict(file["rows"].attrs)
    layout = h5py.VirtualLayout(rows.shape, rows.dtype)
    layout[:] = h5py.VirtualSource("/etc/passwd", "rows", rows.shape)
    del file["rows"]
    file.create_virtual_dataset("rows", layout).attrs.update(about)


def set_to(name: str, value: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][...] = value

    return change


def moved(name: str, link: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = link

    return change


def marked(name: str, **attributes: Any) -> Callable[[h5py.File], None]:
    return lambda file: file[name].attrs.update(attributes)


HOSTILE = {
    "external file": (replaced("rows", external=[("/etc/passwd", 0, 120)]), "does not hold its own data"),
    "virtual": (virtual, "does not hold its own data"),
    "soft link": (moved("rows", h5py.SoftLink("/label")), "'rows' is a link"),
    "external link": (moved("rows", h5py.ExternalLink("/etc/passwd", "x")), "'rows' is a link"),
    "two names": (lambda file: file.__setitem__("more", file["rows"]), "has several names"),
    "unknown": (lambda file: file.__setitem__("more", np.zeros(3)), r"datasets \['more'\] are missing or unknown"),
    "missing": (lambda file: file.__delitem__("label"), r"datasets \['label'\] are missing or unknown"),
    "deep": (lambda file: file.create_dataset("a/b/c/d/e", data=0), "too deep"),
    "a loop": (lambda file: file.create_group("a").__setitem__("b", file["/"]), "several names|too deep"),
    "a type": (lambda file: file.__setitem__("rows2", np.dtype("f4")), "neither group nor dataset"),
    "gzip": (replaced("rows", chunks=(10, 6), compression="gzip"), "does not hold its own data"),
    "chunks": (replaced("rows", chunks=(2, 6)), "does not hold its own data"),
    "huge": (replaced("rows", shape=(1 << 40, 6)), "'rows' is not all in the file"),
    "never written": (replaced("rows"), "'rows' is not all in the file"),
    "narrow": (replaced("rows", shape=(10, 5), data=np.zeros((10, 5))), "of another store"),
    "one row": (replaced("rows", shape=(6,)), "ValueError"),
    "of floats": (replaced("label", data=np.zeros(10), dtype="f4"), "'label' is float32"),
    "of text": (replaced("label", dtype=h5py.string_dtype()), "'label' is object"),
    "the other end first": (replaced("label", data=np.zeros(10), dtype=">i4"), "'label' is >i4"),
    "marked as another dtype": (marked("rows", emocore_dtype="float32"), "'rows' is uint16"),
    "marked as nothing": (marked("rows", emocore_dtype="complex256"), "KeyError"),
    "marked twice": (marked("rows", more=1), "'rows' is uint16"),
    "no text": (lambda file: file.__delitem__("emocore"), "KeyError"),
    "a text of floats": (replaced("emocore", data=np.zeros(9), shape=(9,), dtype="f4"), "not a text"),
    "no JSON": (text(b"{", b"["), "JSONDecodeError"),
    "a key twice": (text(b"{", b'{"format": 1, '), "a key twice"),
    "a key more": (text(b"{", b'{"more": 1, '), "unexpected keyword argument 'more'"),
    "newer": (text(b'"format": 1', b'"format": 2'), "format 2, not 1"),
    "a place of text": (text(b'"place": 0', b'"place": "0"'), "TypeError"),
    "another model": (text(b'"model": "m"', b'"model": "n"'), "of another store"),
    "another generation": (text(b'"generation": 5', b'"generation": 4'), "of another store"),
    "another hook point": (text(b'"hook_point": "b"', b'"hook_point": "z"'), "of another store"),
    "a ledger that lies": (text(b'"accumulated": 20', b'"accumulated": 19'), "of another store"),
    "cut": (lambda file: file.flush(), "OSError|truncated"),
    "an unknown label": (set_to("label", 2), "label ids"),
    "an unknown request": (set_to("request", -2), "request ids"),
    "names out of bounds": (set_to("request_ends", 1 << 40), "do not fit their text"),
    "a sequence out of reach": (set_to("sequence", (1 << 63) - 2), "is not a whole number below"),
}


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads the files does it in this process, for the sake of time."""

    def run(path: Path, made: Path, limit: int, *rest: object) -> None:
        unpack(path, made, limit, ())

    monkeypatch.setattr(importing, "_run", run)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile(kind: str, files: Path, tmp_path: Path) -> None:
    change, said = HOSTILE[kind]
    path = files / "rows-00000000-000.h5"
    with h5py.File(path, "a") as file:
        change(file)
    if kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StoreError, match=said):
        store.from_hdf5(files, tmp_path / "again")
    nothing_left(tmp_path)


def test_a_missing_file(files: Path, tmp_path: Path) -> None:
    (files / "rows-00000001-001.h5").unlink()
    with pytest.raises(StoreError, match=r"out: could not be imported; got the files together.*its ledger says"):
        store.from_hdf5(files, tmp_path / "again")
    nothing_left(tmp_path)


def test_all_files_of_a_hook_point_are_missing(files: Path, tmp_path: Path) -> None:
    for path in files.glob("rows-*-002.h5"):
        path.unlink()
    with pytest.raises(StoreError, match=r"files of hook points \[0, 1\], not of all 3"):
        store.from_hdf5(files, tmp_path / "again")
    nothing_left(tmp_path)


HOSTILE_EMPTY = {
    "requests": (replaced("request_ends", data=np.zeros(2), shape=(2,)), "requests of no rows"),
    "rows in the ledger": (text(b'"accumulated": 0', b'"accumulated": 2'), "do not add up"),
    "a place of another": (text(b'"place": 0', b'"place": 1'), "of another store"),
    "a place too far": (text(b'"place": 0', b'"place": 9'), r"files of hook points \[1, 2, 9\], not of all 3"),
    "hook points without number": (text(b'"hook_points": 3', b'"hook_points": 9' + b"9" * 20), "of another store"),
}


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("kind", HOSTILE_EMPTY)
def test_hostile_without_rows(kind: str, tmp_path: Path) -> None:
    change, said = HOSTILE_EMPTY[kind]
    with_empty(tmp_path / "acts")
    store.to_hdf5(tmp_path / "acts", tmp_path / "out")
    with h5py.File(tmp_path / "out" / "empty-000.h5", "a") as file:
        change(file)
    with pytest.raises(StoreError, match=said):
        store.from_hdf5(tmp_path / "out", tmp_path / "again")
    nothing_left(tmp_path)


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"acts: could not be imported.*No such file or directory"):
        store.from_hdf5(tmp_path / "acts", tmp_path / "again")
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "notes.txt").touch()
    with pytest.raises(StoreError, match="acts: no files of a store"):
        store.from_hdf5(tmp_path / "acts", tmp_path / "again")
    nothing_left(tmp_path)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/etc/passwd", path)], ids=["fifo", "link"])
def test_not_a_regular_file(make: Callable[[Path], None], files: Path, tmp_path: Path) -> None:
    (files / "rows-00000000-000.h5").unlink()
    make(files / "rows-00000000-000.h5")
    with pytest.raises(StoreError, match=r"rows-00000000-000\.h5: (not a regular file|could not be opened)"):
        store.from_hdf5(files, tmp_path / "again")
    nothing_left(tmp_path)


@pytest.mark.usefixtures("inside")
def test_more_than_the_limit(files: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="unpacked, the files so far take more than the limit"):
        store.from_hdf5(files, tmp_path / "again", limit=500)
    nothing_left(tmp_path)


# --- a child that comes to harm

HARM = {
    "crashes": ("import ctypes; ctypes.string_at(8)", "import was killed; got SIGSEGV"),
    "hangs": ("import time; time.sleep(600)", "no end within 3 s"),
    "takes memory": ("bytearray(4 << 30)", "got MemoryError"),
    "takes the processor": (
        "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 1))\n    while True: pass",
        "import was killed; got SIG(XCPU|KILL)",
    ),
    "writes without end": ("(made / 'x').write_bytes(bytes(1 << 26))", "File too large"),
    "says nothing": ("import os; os._exit(3)", "got exit status 3"),
    "makes nothing": ("pass", "what it holds is no sound store"),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_child_comes_to_harm(kind: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm, said = HARM[kind]
    program = f"from emocore import importing\ndef unpack(path, made, limit, filters):\n    {harm}\n"
    monkeypatch.setattr(importing, "PROGRAM", f"{program}importing.unpack = unpack; importing.main()")
    with pytest.raises(StoreError, match=said) as caught:
        store.from_hdf5(files, tmp_path / "again", limit=1 << 20, timeout=3 if kind == "hangs" else 120)
    assert str(files) in str(caught.value)
    nothing_left(tmp_path)


def test_an_importer_that_was_killed(files: Path, tmp_path: Path) -> None:
    """The next one beside it removes what it had begun, once its child is gone too."""
    given = f"{str(files)!r}, {str(tmp_path / 'again')!r}"
    code = f"from emocore import importing as i; i.PROGRAM = 'import time; time.sleep(60)'; i.from_hdf5({given})"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as killed:
        while not list(tmp_path.glob(".again.*")):
            assert killed.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(killed.pid, 9)
    (begun,) = tmp_path.glob(".again.*")
    time.sleep(0.2)
    store.from_hdf5(files, tmp_path / "again")
    assert not begun.exists()
    store.verify(tmp_path / "again")


def test_a_bomb(files: Path, tmp_path: Path) -> None:
    """A few bytes that would become gigabytes, in chunks as `to_hdf5` writes them."""
    with h5py.File(files / "rows-00000000-000.h5", "a") as file:
        del file["rows"]
        rows = file.create_dataset("rows", (1 << 28, 6), "u2", chunks=(1 << 20, 6), **hdf5plugin.Zstd())
        rows.attrs["emocore_dtype"] = "bfloat16"
    with pytest.raises(StoreError, match="is in chunks of"):
        store.from_hdf5(files, tmp_path / "again")
    nothing_left(tmp_path)
