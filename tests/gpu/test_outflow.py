"""Rows on their way to a store on a real GPU: none lost, none mixed up, over many laps, in graphs and beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import emocore
from emocore import ActivationStore, activations, store

ROWS, DIM, LAYERS, LABELS = 16, 24, 3, 5


class Counting(nn.Module):
    """Shows rows that say which forward they are of, which row, and which layer; the device counts the forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(LAYERS))
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.register_buffer("forwards", torch.zeros(1))
        self.register_buffer("column", torch.eye(DIM)[:2])

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = inputs_embeds
        for i, layer in enumerate(self.layers):
            layer(x + self.forwards * self.column[0] + i * self.column[1])
        self.forwards += 1
        return x


def shown(device: torch.device) -> Tensor:
    """[1, ROWS, DIM]: from the third column on, the number of the row and the column."""
    x = 100 * torch.arange(ROWS, device=device).unsqueeze(1) + torch.arange(DIM, device=device)
    x[:, :2] = 0
    return x.float().unsqueeze(0)


def expected(forwards: Tensor, layer: int) -> Tensor:
    """What a layer shows in these forwards, row by row."""
    x = shown(torch.device("cpu")).repeat(len(forwards), 1, 1)
    x[:, :, 0], x[:, :, 1] = forwards.float().unsqueeze(1), layer
    return x.reshape(-1, DIM)


def check(folder: Path, forwards: int) -> None:
    """Every row of every forward, in order, whose it is, and checksums."""
    assert store.verify(folder).rows == LAYERS * forwards * ROWS
    for i, view in enumerate(activations(folder).values()):
        for first in range(0, forwards, 4096):
            some = torch.arange(first, min(first + 4096, forwards))
            part = slice(first * ROWS, (first + len(some)) * ROWS)
            assert torch.equal(view[part], expected(some, i)), (i, first)
        assert torch.equal(view.places.position, torch.arange(ROWS).repeat(forwards).to(view.places.position))
        assert torch.equal(view.places.sequence, torch.arange(forwards).repeat_interleave(ROWS))


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of two forwards: each is half a lap."""
    monkeypatch.setattr("emocore.outflow.LEAST", 1)


@pytest.mark.parametrize("run", [1, 1 << 20], ids=["forward by forward", "as room is wanted"])
def test_forward_after_forward(device: torch.device, tight: None, run: int, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("emocore.outflow.RUN", run)
    model, x, forwards = Counting().to(device), shown(device), 2000 if device.type == "cuda" else 30
    with ActivationStore(tmp_path) as kept, torch.no_grad(), emocore.capture(model, "layers.*", kept, resident=True):
        for _ in range(forwards):
            model(inputs_embeds=x)
    check(tmp_path, forwards)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("gate", [1, 2])
def test_a_hundred_thousand_laps_of_replays(device: torch.device, tight: None, gate: int, tmp_path: Path) -> None:
    """Two replays fill the ring: 200,000 of them behind gates; every row is checked."""
    model, x, replays = Counting().to(device), shown(device), 200_000 if gate == 2 else 20_000
    with ActivationStore(tmp_path) as kept, torch.no_grad():  # noqa: SIM117
        with emocore.capture(model, "layers.*", kept, resident=True) as tap:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                model(inputs_embeds=x)
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(inputs_embeds=x)
            for i in range(replays):
                if i % gate == 0:
                    tap.gate(gate)
                graph.replay()
    check(tmp_path, replays + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a stream that is still busy")
def test_a_forward_does_not_wait_for_its_rows(device: torch.device, tmp_path: Path) -> None:
    """Behind a second of sleep on the device, forwards are launched and their counts published all the same."""
    model, x = Counting().to(device), shown(device)
    with ActivationStore(tmp_path) as kept, torch.no_grad():  # noqa: SIM117
        with emocore.capture(model, "layers.*", kept, resident=True):
            for _ in range(3):
                model(inputs_embeds=x)
            torch.cuda._sleep(2_000_000_000)
            for _ in range(20):
                model(inputs_embeds=x)
            assert not torch.cuda.current_stream().query(), "the device is still asleep: nothing has waited for it"
    check(tmp_path, 23)
