"""The activation store: what is captured is read again, with its places and its ledger; commits, resumes, policies."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from emocore import ActivationStore, Tokens, activations, capture, store
from emocore.errors import ArgumentError, LabelError, LedgerError, ShapeError, StoreError
from emocore.feeds import Feed
from emocore.ring import Ring, sample
from emocore.sinks import Observed

BLOCKS = "layers.*"


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and mask [B, T] of sequences of these lengths, padded on the right."""
    ids = torch.randint(3, 64, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return ids * mask, mask


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    x = randn(100, 24)
    with ActivationStore(tmp_path, dtype=dtype, shard_rows=16) as kept:
        for part in x.split(7):
            kept.at("a").update(part)
    view = activations(tmp_path)["a"]
    assert (view.dtype, view.dim, len(view)) == (dtype, 24, 100)
    assert torch.equal(view.rows, x.to(dtype))
    assert store.verify(tmp_path).rows == 100


def test_rows_keep_their_own_dtype(tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept:
        kept.at("a").update(randn(3, 4).half())
        kept.at("b").update(randn(3, 4))
        with pytest.raises(ArgumentError, match=r"rows of torch\.float64.*dtype=torch\.float32"):
            kept.at("c").update(randn(3, 4).double())
    found = activations(tmp_path)
    assert [found[name].dtype for name in found] == [torch.float16, torch.float32]


def test_capture_into_one_store(tokenwise, tmp_path: Path) -> None:
    """Every block's rows, whose they are, and the same ledger as any sink's."""
    model = tokenwise()
    ids, mask = batch(4, 2, 3)
    with (
        ActivationStore(tmp_path, labels=["calm", "sad"]) as kept,
        capture(model, BLOCKS, kept) as tap,
        tap.batch(labels=["sad", None, "calm"], requests=["a", "b", "a"]),
    ):
        model(ids, mask)
    found = activations(tmp_path)
    assert found.hook_points == ("layers.0", "layers.1")
    real = mask.bool()
    x = model.layers[0](model.embed(ids))
    assert torch.equal(found["layers.0"].rows, x[real])
    places = found["layers.1"].places
    assert places.sequence.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert places.position.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert places.label.tolist() == [1] * 4 + [-1] * 2 + [0] * 3
    assert [places.names[i] for i in places.request.tolist()] == ["a"] * 4 + ["b"] * 2 + ["a"] * 3
    assert torch.equal(places.token, ids[real].int())
    ledger = found.ledger["layers.0"]
    assert (ledger.tokens.offered, ledger.tokens.masked, ledger.rows.accumulated) == (12, 3, 9)
    assert ledger == kept.ledger["layers.0"]
    ledger.check()
    assert len(list(tmp_path.glob("index-*"))) == 1  # both blocks hold the same tokens


def test_pooled_rows_and_token_rules(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    ids, mask = batch(4, 1, 3)
    rule = Tokens(skip=1, pool="mean")
    with (
        ActivationStore(tmp_path, labels=2) as kept,
        capture(model, {"layers.1": (kept, rule)}) as tap,
        tap.batch(labels=[0, 1, 1], requests=["a", "b", "c"]),
    ):
        model(ids, mask)
    view = activations(tmp_path)["layers.1"]
    assert (len(view), view.dtype, view.tokens) == (2, torch.float32, rule)  # one sequence is too short
    assert view.places.sequence.tolist() == [0, 2]
    assert view.places.position.tolist() == [-1, -1]
    assert view.places.label.tolist() == [0, 1]
    assert activations(tmp_path).ledger["layers.1"].rows.too_short == 1


def test_a_sequence_goes_on_over_forwards(tokenwise, tmp_path: Path) -> None:
    """Longer and longer prompts within one batch: every token once, under one sequence number."""
    model = tokenwise()
    ids, mask = batch(5, 5)
    with ActivationStore(tmp_path) as kept, capture(model, BLOCKS, kept) as tap:
        for _ in range(2):
            with tap.batch():
                model(ids[:, :3], mask[:, :3])
                model(ids, mask)
    places = activations(tmp_path)["layers.0"].places
    assert places.sequence.tolist() == [0] * 3 + [1] * 3 + [0] * 2 + [1] * 2 + [2] * 3 + [3] * 3 + [2] * 2 + [3] * 2
    assert places.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4] * 2


def test_a_rolled_back_forward_never_reaches_the_store(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    ids, mask = batch(3, 3)

    def fails(*args: object) -> None:
        raise RuntimeError("no memory")

    with ActivationStore(tmp_path) as kept, capture(model, BLOCKS, kept):
        model(ids, mask)
        handle = model.layers[1].register_forward_hook(fails)
        with pytest.raises(RuntimeError, match="no memory"):
            model(ids, mask)
        handle.remove()
    found = activations(tmp_path)
    assert [len(found[name]) for name in found] == [6, 6]
    assert found.ledger["layers.0"].tokens.rolled_back == 6


def test_hook_points_with_other_rows_have_an_index_of_their_own(tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept:
        kept.at("a").update(randn(4, 3), requests=list("wxyz"))
        kept.at("b").update(randn(4, 3), requests=list("wxyz"))
        bad = randn(4, 3)
        bad[1, 2] = torch.nan
        kept.at("c").update(bad, requests=list("wxyz"))
    found = activations(tmp_path)
    assert [found[n].places.names for n in "abc"] == [tuple("wxyz"), tuple("wxyz"), tuple("wyz")]
    assert found.ledger["c"].rows.nonfinite == 1


def test_rows_that_do_not_fit_the_dtype_are_counted(tmp_path: Path) -> None:
    x = torch.tensor([[1.0, 2.0], [1e6, 0.0], [torch.inf, 0.0], [3.0, 4.0]])
    with ActivationStore(tmp_path, dtype=torch.float16) as kept:
        kept.at("a").update(x)
    assert activations(tmp_path)["a"].rows.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    rows = activations(tmp_path).ledger["a"].rows
    assert (rows.formed, rows.accumulated, rows.overrange, rows.nonfinite) == (4, 2, 1, 1)


def test_what_is_known_of_rows_from_elsewhere(tokenwise, tmp_path: Path) -> None:
    """Numbers given are kept, and a capture after them begins behind them."""
    model = tokenwise()
    ids, mask = batch(2)
    with ActivationStore(tmp_path) as kept:
        numbers = torch.tensor([7, 7, 9])
        kept.at("layers.0").update(
            randn(3, 5), sequence=numbers, position=torch.tensor([0, 1, 0]), token=torch.tensor([5, 6, 7])
        )
        with pytest.raises(ShapeError, match=r"position: of rows; expected \[3\]"):
            kept.at("layers.0").update(randn(3, 5), position=torch.zeros(2).long())
        with capture(model, "layers.0", kept):
            model(ids, mask)
    places = activations(tmp_path)["layers.0"].places
    assert places.sequence.tolist() == [7, 7, 9, 10, 10]
    assert places.position.tolist() == [0, 1, 0, 0, 1]
    assert places.token[:3].tolist() == [5, 6, 7]


# --- commits


def test_pending_rows_become_durable_with_a_commit(tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept:
        feed = kept.at("a")
        feed.update(randn(5, 2))
        assert (feed.ledger.rows.pending, feed.ledger.rows.accumulated) == (5, 0)
        assert kept.commit() == 1
        assert (feed.ledger.rows.pending, feed.ledger.rows.accumulated) == (0, 5)
        assert kept.commit() == 1  # nothing new
        feed.update(randn(2, 2))
        assert len(activations(tmp_path)["a"]) == 5
    assert len(activations(tmp_path)["a"]) == 7
    assert activations(tmp_path).manifest.generation == 2


def test_two_generations_are_kept(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, shard_rows=1) as kept:
        for _ in range(5):
            kept.at("a").update(randn(1, 2))
    assert sorted(p.name for p in tmp_path.glob("manifest*")) == ["manifest-00000004.json", "manifest-00000005.json"]


def test_a_shard_ends_with_the_forward_that_fills_it(tokenwise, tmp_path: Path) -> None:
    """Full after the first block's rows, it still holds the second's: every shard has the same index for both."""
    model = tokenwise(dim=4)
    ids, mask = batch(3, 2)
    with ActivationStore(tmp_path, shard_bytes=5 * 4 * 4) as kept, capture(model, BLOCKS, kept):
        for _ in range(3):
            model(ids, mask)
    manifest = activations(tmp_path).manifest
    assert [shard.rows for shard in manifest.rows] == [5] * 6
    assert len(manifest.indexes) == 3


def test_shards_open_in_safetensors_own_reader(tmp_path: Path) -> None:
    x = randn(9, 5)
    with ActivationStore(tmp_path) as kept:
        kept.at("model.layers.20").update(x, requests=["r"] * 9)
    (path,) = tmp_path.glob("rows-*")
    assert torch.equal(safetensors.torch.load_file(path)["rows"], x)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"emocore": "1", "kind": "rows", "hook_point": "model.layers.20"}
    data = path.read_bytes()
    assert int.from_bytes(data[:8], "little") + 8 == 4096
    assert len(data) == 4096 + x.nbytes
    (index,) = tmp_path.glob("index-*")
    assert safetensors.torch.load_file(index)["request"].tolist() == [0] * 9


def test_an_empty_store_is_one(tmp_path: Path) -> None:
    ActivationStore(tmp_path).close()
    assert len(activations(tmp_path)) == 0
    assert store.verify(tmp_path).shards == 0


# --- resuming


def test_resume(tmp_path: Path) -> None:
    x = randn(12, 3)
    with ActivationStore(tmp_path, labels=["calm", "sad"], model="gpt2") as kept:
        kept.at("a").update(x[:5], ["calm"] * 5, requests=["r"] * 5)
    with ActivationStore(tmp_path) as kept:
        assert (kept.labels, kept.generation) == (("calm", "sad"), 1)
        kept.at("a").update(x[5:], ["sad"] * 7, requests=["s"] * 7)
        kept.at("b").update(x)
    found = activations(tmp_path)
    assert torch.equal(found["a"].rows, x)
    assert found["a"].places.label.tolist() == [0] * 5 + [1] * 7
    assert found["a"].places.names == ("r", "s")
    assert found.ledger["a"].rows.formed == 12
    assert found.manifest.model == "gpt2"
    store.verify(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"labels": ["calm"]}, "labels"),
        ({"model": "llama"}, "model"),
    ],
)
def test_resuming_as_something_else_is_refused(options: dict, said: str, tmp_path: Path) -> None:
    ActivationStore(tmp_path, labels=["calm", "sad"], model="gpt2").close()
    with pytest.raises(ArgumentError, match=said):
        ActivationStore(tmp_path, **options)
    ActivationStore(tmp_path).close()  # and holds no lock


def test_hook_points_keep_dtype_width_and_rule(tokenwise, tmp_path: Path) -> None:
    model = tokenwise()
    with ActivationStore(tmp_path) as kept:
        with capture(model, BLOCKS, kept, tokens=Tokens(skip=1)):
            model(*batch(3))
        with pytest.raises(ShapeError, match="width of rows; expected 5; got 6"):
            kept.at("layers.0").update(randn(1, 6))
    with ActivationStore(tmp_path) as kept, pytest.raises(ArgumentError, match="already holds other rows"):
        capture(model, BLOCKS, kept, tokens=Tokens(skip=2))
    with ActivationStore(tmp_path, dtype=torch.float16) as kept, pytest.raises(ArgumentError, match="dtype"):
        kept.at("layers.0")


def test_orphans_are_swept(tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept:
        kept.at("a").update(randn(2, 2))
    for name in ("rows-00000001-000.safetensors.open", "index-00000007-000.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with ActivationStore(tmp_path) as kept:
        assert kept.swept == 2
        kept.at("a").update(randn(2, 2))
    assert (tmp_path / "notes.txt").exists()
    assert len(activations(tmp_path)["a"]) == 4
    assert not list(tmp_path.glob("*.open"))


def test_nothing_sealed_is_swept_where_the_newest_manifest_is_damaged(tmp_path: Path) -> None:
    with ActivationStore(tmp_path, shard_rows=2) as kept:
        for i in range(3):
            kept.at("a").update(randn(2, 2, seed=i))
    newest = tmp_path / "manifest-00000003.json"
    newest.write_bytes(newest.read_bytes()[:-9])
    assert len(activations(tmp_path)["a"]) == 4
    assert "manifest-00000003.json" in activations(tmp_path).damaged[0]
    with ActivationStore(tmp_path) as kept:
        assert kept.swept == 0
        kept.at("a").update(randn(2, 2, seed=9))
    assert len(list(tmp_path.glob("rows-*"))) == 4
    found = activations(tmp_path)
    assert (found.manifest.generation, found.damaged) == (4, ())
    assert torch.equal(found["a"][4:], randn(2, 2, seed=9))


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with ActivationStore(tmp_path), pytest.raises(StoreError, match=f"somebody else.*process {os.getpid()}"):
        ActivationStore(tmp_path)
    ActivationStore(tmp_path).close()


def test_a_closed_store_and_a_forked_child_take_nothing(tmp_path: Path) -> None:
    kept = ActivationStore(tmp_path)
    feed = kept.at("a")
    feed.update(randn(1, 2))
    kept._pid -= 1
    with pytest.raises(StoreError, match="used in its child"):
        feed.update(randn(1, 2))
    kept._pid += 1
    kept.close()
    kept.close()
    with pytest.raises(StoreError, match="closed"):
        feed.update(randn(1, 2))
    assert (feed.ledger.rows.accumulated, feed.ledger.rows.dropped) == (1, 2)


# --- policies


def test_drop_counts_what_does_not_fit(tmp_path: Path) -> None:
    """A disk that writes nothing for now: memory is full after two slots, and the rest is dropped, exactly."""
    x = torch.arange(4096.0).unsqueeze(1).expand(4096, 16).contiguous()
    with Ring(slots=3, slot_bytes=4096, throttle=0) as ring:
        kept = ActivationStore(tmp_path, policy="drop", ring=ring)
        for part in x.split(256):
            kept.at("a").update(part, requests=["r"] * len(part))
        counts = kept.ledger["a"].rows
        assert counts.formed == 4096 == counts.pending + counts.dropped
        assert 0 < counts.pending <= 3 * 4096 // 64
        ring.close()
        with pytest.raises(StoreError):  # a closed ring flushes no more
            kept.commit()
        assert (counts.pending, counts.dropped) == (0, 4096)
        kept.close()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_sample_is_the_same_at_every_hook_point_and_split(p: float, tmp_path: Path) -> None:
    x = torch.arange(500.0).unsqueeze(1).expand(500, 4)

    def names(rows: Tensor) -> list[str]:
        return [str(i) for i in rows[:, 0].long().tolist()]

    for name, size in (("one", 500), ("many", 37)):
        with ActivationStore(tmp_path / name, policy=sample(p, seed=5)) as kept:
            for part in x.split(size):
                for point in "ab":
                    kept.at(point).update(part, requests=names(part))
    one, many = activations(tmp_path / "one"), activations(tmp_path / "many")
    counts = one.ledger["a"].rows
    assert counts.formed == counts.accumulated + counts.sampled_out == 500
    assert abs(counts.accumulated - 500 * p) < 50
    if p:
        assert torch.equal(one["a"].rows, many["b"].rows)
        assert torch.equal(one["a"].rows, one["b"].rows)
        assert list(one["a"].places.names) == names(one["a"].rows)


# --- arguments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.float64}, "dtype"),
        ({"policy": "hope"}, "policy; expected block or drop"),
        ({"rank": 2, "world": 2}, "rank"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"shard_bytes": 0}, "shard_bytes"),
    ],
)
def test_bad_arguments(options: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        ActivationStore(tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_bad_rows(tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept:
        feed = kept.at("a")
        with pytest.raises(LabelError, match="keeps none"):
            feed.update(randn(2, 2), labels=[0, 0])
        with pytest.raises(ShapeError):
            feed.update(randn(2, 2, 2))
        with pytest.raises(ArgumentError, match="requests; expected 2 ids"):
            feed.update(randn(2, 2), requests=["a"])
        for name in ("", "a" * 5000):
            with pytest.raises(ArgumentError, match="1 to 2048 letters"):
                kept.at(name)
        assert feed.ledger.rows.formed == 0


def test_one_store_at_one_hook_point_under_two_rules_is_refused(tokenwise, tmp_path: Path) -> None:
    with ActivationStore(tmp_path) as kept, pytest.raises(ArgumentError, match="bound twice"):
        capture(tokenwise(), "layers.0", lambda: [(kept, Tokens()), (kept, Tokens(skip=1))])


def test_requests_of_rows_that_are_not_stored_are_forgotten(tmp_path: Path) -> None:
    """Else they would fill the memory where a disk stands still."""
    with ActivationStore(tmp_path, policy=sample(0.1, seed=1)) as kept:
        for i in range(300):
            kept.at("a").update(torch.full((1, 2), float(i)), requests=[f"request {i}"])
            assert len(kept._register.requests) <= kept.ledger["a"].rows.pending
    view = activations(tmp_path)["a"]
    assert 10 < len(view) < 60
    assert [view.places.names[i] for i in view.places.request] == [f"request {int(x)}" for x in view.rows[:, 0]]


# --- counts, while others commit


def test_a_commit_while_rows_are_handed_over(tokenwise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for what a capture has counted and not handed over yet, and its manifest adds up."""
    model = tokenwise()
    ids, mask = batch(4, 4)
    observe, begun = Feed.observe, threading.Event()

    def slowly(feed: Feed, observed: Observed) -> None:
        begun.set()
        time.sleep(0.1)
        observe(feed, observed)

    with ActivationStore(tmp_path) as kept, capture(model, BLOCKS, kept), ThreadPoolExecutor(1) as other:
        model(ids, mask)
        monkeypatch.setattr(Feed, "observe", slowly)
        number = other.submit(lambda: begun.wait() and kept.commit())
        model(ids, mask)
        assert number.result() == 1
    assert store.verify(tmp_path).rows == 32


def test_a_ledger_that_does_not_add_up_is_not_saved(tmp_path: Path) -> None:
    kept = ActivationStore(tmp_path)
    kept.at("a").update(randn(3, 4))
    kept.commit()
    kept.at("a").ledger.rows.add(formed=1)
    for end in (kept.commit, kept.close):
        with pytest.raises(LedgerError, match=r"hook point 'a': rows: counts do not add up.*formed 4"):
            end()
    assert store.verify(tmp_path).rows == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_number_that_is_not_finite_is_found(dtype: torch.dtype, tmp_path: Path) -> None:
    """All bit patterns of 16 bits; of 32, those with all 16 upper ones."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    x = bits.mul(1 << 16).view(dtype) if dtype.itemsize == 4 else bits.to(torch.int16).view(dtype)
    good = x.isfinite()
    with ActivationStore(tmp_path, shard_bytes=1 << 40) as kept:
        feed = kept.at("a")
        feed.update(x[good].unsqueeze(1))
        for one in x[~good].reshape(-1, 1, 1):
            feed.update(one)
        rows = kept.ledger["a"].rows
        assert (rows.nonfinite, rows.pending) == (int((~good).sum()), int(good.sum()))
