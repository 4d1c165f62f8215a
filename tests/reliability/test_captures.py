"""Rows of a capture on the device, whatever the forwards do: what is stored is what a capture on the host stores."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emocore import ActivationStore, Tokens, activations, capture, store
from emocore.capturing import Tap
from emocore.errors import CaptureError
from emocore.places import Places

VOCAB, NAN = 12, 11


class BrokenError(RuntimeError):
    """Of a forward."""


class Model(nn.Module):
    """Embeddings through two layers that may break, and a token that is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.layers = nn.ModuleList(nn.Identity() for _ in range(2))
        self.broken = False
        with torch.no_grad():
            self.embed.weight[NAN] = torch.nan

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.layers[0](self.embed(input_ids))
        if self.broken:
            raise BrokenError
        return self.layers[1](2 * x)


def run(tap: Tap, kept: ActivationStore, seed: int) -> None:
    """A program of forwards, in batches and outside, some of which break; and of commits and looks at the ledger."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(choose.randint(1, 12)):
        b, forwards = choose.randint(1, 4), choose.randint(1, 3)
        with _batch(tap, choose, b):
            ids = torch.randint(1, VOCAB, (b, 9), generator=g)
            mask = (torch.rand(b, 9, generator=g) > 0.3).long() if choose.random() < 0.7 else None
            for t in sorted(choose.randint(1, 9) for _ in range(forwards)):  # each shows the last one's tokens again
                tap.model.broken = choose.random() < 0.15
                with suppress(BrokenError):
                    tap.model(ids[:, :t], None if mask is None else mask[:, :t])
        what = choose.random()
        if what < 0.1:
            kept.commit()
        elif what < 0.2:
            tap.ledger  # noqa: B018 (waits until all is brought)


@contextmanager
def _batch(tap: Tap, choose: random.Random, b: int) -> Iterator[None]:
    labels = [choose.choice(["calm", "sad", None]) for _ in range(b)]
    names = [f"request {choose.randint(0, 9)}" for _ in range(b)] if choose.random() < 0.5 else None
    with tap.batch(labels=labels, requests=names):
        yield


def stored(model: Model, folder: Path, seed: int, resident: bool) -> tuple[Any, Any]:
    """The store of a program, and its ledger."""
    choose = random.Random(-seed)
    rule, rows = Tokens(skip=choose.randint(0, 2)), choose.choice([20, None, None])
    with ActivationStore(folder, labels=["calm", "sad"], shard_rows=rows) as kept, torch.no_grad():  # noqa: SIM117
        with suppress(CaptureError), capture(model, "layers.*", kept, tokens=rule, resident=resident) as tap:
            run(tap, kept, seed)
    store.verify(folder)
    return activations(folder), kept.ledger


def test_random_programs(scale: Any, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through rings of two forwards as through large ones."""
    model = Model()
    for seed in range(scale(15, 600)):
        monkeypatch.setattr("emocore.outflow.LEAST", 1 if seed % 2 else 64 << 20)
        monkeypatch.setattr("emocore.outflow.RUN", random.Random(seed).choice([1, 100, 1 << 20]))
        (mine, counts), (other, right) = (stored(model, memory / f"{seed}{r}", seed, r) for r in (True, False))
        assert counts == right, seed
        for name in other:
            assert torch.equal(mine[name].rows, other[name].rows), (seed, name)
            for one, two in zip(said(mine[name].places), said(other[name].places), strict=True):
                assert one == two, seed


def said(places: Places) -> tuple[list[Any], ...]:
    """Whose rows are; numbers of sequences without gaps: a batch without a row takes none on the device."""
    requests = [places.names[i] if i >= 0 else None for i in places.request]
    sequences = places.sequence.unique(return_inverse=True)[1]
    return requests, *(column.tolist() for column in (sequences, places.position, places.token, places.label))


def test_many_laps(scale: Any, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forwards fill the ring; each row says which forward and which row it is, and is found where it belongs."""
    monkeypatch.setattr("emocore.outflow.LEAST", 1)
    monkeypatch.setattr("emocore.outflow.RUN", 1)
    laps, rows = scale(300, 20_000), 3

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.place = nn.Identity(), nn.Parameter(torch.zeros(1))

        def forward(self, inputs_embeds: Tensor) -> Tensor:
            return self.layer(inputs_embeds)

    model, row = Counted(), torch.arange(rows).float().expand(1, rows)
    with ActivationStore(memory, shard_rows=50_000) as kept, torch.no_grad():  # noqa: SIM117
        with capture(model, "layer", kept, resident=True):
            for i in range(2 * laps):
                model(torch.stack([torch.full_like(row, i), row], 2))
    found = activations(memory)["layer"]
    assert torch.equal(found.rows[:, 0], torch.arange(2 * laps).repeat_interleave(rows).float())
    assert torch.equal(found.rows[:, 1], row[0].repeat(2 * laps))
    assert torch.equal(found.places.sequence, torch.arange(2 * laps).repeat_interleave(rows))
    store.verify(memory)
