"""Reading what a store has committed: any rows in any order, queries, data sets, and a reader's own generation."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from emocore import ActivationStore, activations, capture, load, store
from emocore.errors import ArgumentError, HookPointError, LabelError, ShapeError, StoreError


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A store of 100 rows in shards of 16, label i % 3 - 1, request i // 10."""
    path, x = tmp_path_factory.mktemp("acts"), randn(100, 6).bfloat16()
    with ActivationStore(path, labels=["calm", "sad"], shard_rows=16) as writer:
        for start in range(0, 100, 8):
            part = torch.arange(start, min(start + 8, 100))
            names = [f"r{i // 10}" for i in part.tolist()]
            writer.at("a").update(x[part], labels=part % 3 - 1, requests=names)
    return path, x


@pytest.mark.parametrize(
    "at",
    [
        slice(None),
        slice(3, 9),
        slice(10, 90),
        slice(15, 17),
        slice(-5, None),
        slice(50, 20),
        slice(0, 100, 7),
        slice(90, 3, -11),
        0,
        -1,
        [3, 1, 99, -100],
        [40, 41, 42],
        [*range(60, 99), *range(3, 40), *range(62, 70)],
        [],
        torch.tensor([17, 5, 5]),
        torch.arange(100) % 7 == 2,
    ],
    ids=str,
)
def test_random_access_is_the_whole_s(at, kept: tuple[Path, Tensor]) -> None:
    path, x = kept
    rows = list(range(100)[at]) if isinstance(at, slice) else at
    expected = x[torch.tensor(rows, dtype=torch.long) if isinstance(rows, list) else rows]
    found = activations(path)["a"][at]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_consecutive_rows_are_not_copied(kept: tuple[Path, Tensor]) -> None:
    """Two readings of them share memory, and writing to it changes no file."""
    path, x = kept
    view = activations(path)["a"]
    one, other = view[3:9], view[5:7]
    assert one[2:4].data_ptr() == other.data_ptr()
    assert one.data_ptr() % 4096 == 3 * 6 * 2
    one.zero_()
    assert torch.equal(activations(path)["a"][3:9], x[3:9])


@pytest.mark.parametrize("at", [100, -101, [100], [0, -101]])
def test_rows_that_are_not_there(at, kept: tuple[Path, Tensor]) -> None:
    with pytest.raises(IndexError):
        activations(kept[0])["a"][at]


@pytest.mark.parametrize("at", [torch.zeros(2, 2).long(), torch.tensor([0.5]), torch.tensor([True, False])])
def test_what_is_no_row_number(at, kept: tuple[Path, Tensor]) -> None:
    with pytest.raises(ShapeError):
        activations(kept[0])["a"][at]


def test_queries(kept: tuple[Path, Tensor]) -> None:
    path, x = kept
    view, every = activations(path)["a"], torch.arange(100)
    label, request = every % 3 - 1, every // 10
    for chosen, expected in (
        (view.where(label="sad"), label == 1),
        (view.where(label=-1), label == -1),
        (view.where(label=["calm", 1]), label >= 0),
        (view.where(request="r3"), request == 3),
        (view.where(request=["r3", "r7"], label="calm"), (label == 0) & ((request == 3) | (request == 7))),
        (view.where(label="sad").where(request="r3"), (label == 1) & (request == 3)),
        (view.where(sequence=range(5)), every < 0),
        (view.where(), every >= 0),
    ):
        assert torch.equal(chosen.rows, x[expected])
        assert len(chosen) == int(expected.sum())
        assert torch.equal(chosen.places.label.long(), label[expected])
    sad = view.where(label="sad")
    assert torch.equal(sad[2:5], x[label == 1][2:5])
    assert torch.equal(sad[-1], x[label == 1][-1])


def test_queries_by_place(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    ids = torch.arange(3, 15).reshape(3, 4)
    with ActivationStore(tmp_path) as writer, capture(model, "layers.*", writer):
        model(ids, torch.ones_like(ids))
    view = activations(tmp_path)["layers.0"]
    x = model.layers[0](model.embed(ids)).reshape(-1, 5)
    assert torch.equal(view.where(position=0).rows, x[::4])
    assert torch.equal(view.where(position=slice(1, 3)).rows, x.reshape(3, 4, 5)[:, 1:3].reshape(-1, 5))
    assert torch.equal(view.where(position=range(0, 4, 2)).rows, x[::2])
    assert torch.equal(view.where(sequence=[0, 2]).rows, x[[0, 1, 2, 3, 8, 9, 10, 11]])
    assert torch.equal(view.where(token=torch.tensor([5, 14])).rows, x[[2, 11]])


def test_unknown_names_list_the_known(kept: tuple[Path, Tensor]) -> None:
    found = activations(kept[0])
    with pytest.raises(HookPointError, match="Known: 'a'"):
        found["layers.0"]
    with pytest.raises(LabelError, match="Did you mean 'calm'"):
        found["a"].where(label="clam")
    with pytest.raises(ArgumentError, match="request"):
        found["a"].where(request="r99")
    assert "layers.0" not in found
    assert torch.equal(load(kept[0])["a"].rows, kept[1])
    assert repr(found["a"]) == "<View a: 100 rows [6] torch.bfloat16>"


def test_numpy(kept: tuple[Path, Tensor], tmp_path: Path) -> None:
    path, x = kept
    found = activations(path)["a"].numpy()
    assert found.dtype == np.float32
    assert np.array_equal(found, x.float().numpy())
    with ActivationStore(tmp_path) as writer:
        writer.at("a").update(x.half())
    assert activations(tmp_path)["a"].numpy().dtype == np.float16


@pytest.mark.parametrize("context", [None, "fork", "spawn"])
def test_data_loader(context: str | None, kept: tuple[Path, Tensor]) -> None:
    path, x = kept
    chosen = activations(path)["a"].where(label=["calm", "sad"])
    workers = {} if context is None else {"num_workers": 2, "multiprocessing_context": context}
    loader = DataLoader(chosen.dataset(), batch_size=16, shuffle=True, **workers)
    seen = list(loader)
    rows, labels = (torch.cat([batch[name] for batch in seen]) for name in ("row", "label"))
    label = torch.arange(100) % 3 - 1
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, x[label >= 0].tolist()))
    assert labels.bincount().tolist() == [33, 33]
    item = chosen.dataset()[0]
    assert torch.equal(item["row"], x[1])
    assert item["label"] == 0


def test_views_are_pickled_by_what_they_are_of(kept: tuple[Path, Tensor]) -> None:
    path, x = kept
    view = activations(path)["a"].where(request="r3")
    data = pickle.dumps(view)
    assert len(data) < 2000
    assert torch.equal(pickle.loads(data).rows, x[30:40])


def test_a_reader_keeps_its_generation(tmp_path: Path) -> None:
    """While a writer goes on, and through its manifests' removal."""
    x = randn(40, 3)
    with ActivationStore(tmp_path, shard_rows=4) as writer:
        writer.at("a").update(x[:4])
        before = activations(tmp_path)
        for part in x[4:].split(4):
            writer.at("a").update(part)
            assert torch.equal(before["a"].rows, x[:4])
        now = activations(tmp_path)
        assert torch.equal(now["a"].rows, x)
        assert torch.equal(activations(tmp_path, now.manifest.generation - 1)["a"].rows, x[:36])
        with pytest.raises(StoreError):
            activations(tmp_path, 1)


def test_a_folder_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no activation store"):
        activations(tmp_path)
    with pytest.raises(StoreError, match="could not be read"):
        activations(tmp_path / "nowhere")


# --- auditing


def test_verify(kept: tuple[Path, Tensor]) -> None:
    found = store.verify(kept[0])
    assert (found.rows, found.hook_points) == (100, 1)
    assert found.bytes == sum(p.stat().st_size - 4096 for p in kept[0].glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["rows", "index"])
def test_verify_finds_a_flipped_bit(kind: str, tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as writer:
        writer.at("a").update(randn(50, 8), requests=["r"] * 50)
    (path,) = tmp_path.glob(f"{kind}-*")
    data = bytearray(path.read_bytes())
    for at in (4096, len(data) - 1):
        data[at] ^= 16
        path.write_bytes(data)
        with pytest.raises(StoreError, match=f"{kind}-.*CRC32C"):
            store.verify(tmp_path)
        data[at] ^= 16
    path.write_bytes(data)
    assert store.verify(tmp_path).rows == 50


# --- ranks


def test_ranks_are_joined(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    ids = torch.arange(3, 27).reshape(4, 6)
    for rank in (1, 0):
        with ActivationStore(tmp_path, rank=rank, world=2) as writer, capture(model, "layers.*", writer):
            for part in ids[rank::2].split(1):
                model(part, torch.ones_like(part))
    with pytest.raises(StoreError, match="joined"):
        activations(tmp_path)
    assert store.join(tmp_path) == 1
    found = activations(tmp_path)
    x = model.layers[1](model.layers[0](model.embed(ids)))
    assert torch.equal(found["layers.1"].rows, torch.cat([x[0], x[2], x[1], x[3]]))
    assert found["layers.1"].places.sequence[::6].tolist() == [0, 2, 1, 3]  # no two alike
    assert found.ledger["layers.0"].rows.accumulated == 24
    assert found.manifest.ranks == [0, 1]
    assert store.verify(tmp_path).rows == 48
    with pytest.raises(ArgumentError, match="another store"):
        ActivationStore(tmp_path)


def test_joining_again_takes_what_came_since(tmp_path: Path) -> None:
    for part in (0, 1):
        for rank in range(2):
            with ActivationStore(tmp_path, rank=rank, world=2) as writer:
                writer.at("a").update(randn(3, 2))
        assert store.join(tmp_path) == part + 1
        assert len(activations(tmp_path)["a"]) == 6 * (part + 1)


def test_a_missing_rank(tmp_path: Path) -> None:
    for rank in (0, 2):
        with ActivationStore(tmp_path, rank=rank, world=3) as writer:
            writer.at("a").update(randn(3, 2))
    with pytest.raises(StoreError, match=r"ranks are missing.*\[1\]"):
        store.join(tmp_path)
    store.join(tmp_path, allow_partial=True)
    assert activations(tmp_path).manifest.ranks == [0, 2]
    with pytest.raises(StoreError, match="no ranks"):
        store.join(tmp_path / "rank-00000")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"labels": ["calm"]}, {"labels": ["sad"]}),
        ({"model": "a"}, {"model": "b"}),
        ({"dtype": torch.float16}, {"dtype": torch.float32}),
    ],
)
def test_ranks_that_do_not_belong_together(first: dict, second: dict, tmp_path: Path) -> None:
    for rank, options in enumerate((first, second)):
        with ActivationStore(tmp_path, rank=rank, world=2, **options) as writer:
            writer.at("a").update(randn(3, 2))
    with pytest.raises(ArgumentError):
        store.join(tmp_path)
    assert not list(tmp_path.glob("manifest*"))
