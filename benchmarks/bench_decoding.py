"""Decoding: what scores and alarms at every layer cost a model that writes one token after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import emocore
from emocore import Directions, Threshold
from emocore.calibration import Calibration
from emocore.linalg import unit

from . import peers
from .bars import slows
from .collectors import PLAIN
from .graphs import graphed
from .harness import Absent, Contender, unchecked
from .llama import Cache, Llama
from .machine import Machine
from .ours import OURS
from .results import Case

pytestmark = pytest.mark.gpu

ALPHA, LEVEL = 1 / 8, 4.0
ALARMS = 8  # watched at each layer
FEW = 8  # layers
CONTEXT, ROOM = 1024, 64  # tokens in the cache, and room for more
BOUND_SCORE = 1e-2  # a score is of 16-bit rows, in units of the largest


def _names(model: Llama, count: int | None = None) -> list[str]:
    """Hook points: the first `count` layers, else all."""
    return [f"layers.{i}" for i in range(model.shape.layers)][:count]


@pytest.mark.alike
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("layers", [None, FEW], ids=["all", str(FEW)])
def test_decode(race, machine: Machine, seed: int, model: Llama, batch: int, layers: int | None) -> None:
    """One token a sequence in a CUDA graph, scored on every direction with alarms: G11."""
    names = _names(model, layers)
    watched = Watched(machine, model, names, 2 if machine.scale.tiny else batch, seed)
    case = watched.case("in a graph", (slows("G11", 0.03 if layers is None else 0.01, PLAIN),))
    plain = graphed(machine, watched.step)
    with torch.no_grad(), watched.monitor() as watch:
        ours: Contender | Absent
        try:
            with watched.serving(watch):
                replay = graphed(machine, watched.step)
            ours = Contender(
                OURS, lambda _: replay(), lambda _: watched.first(watch, replay), lambda: watched.serving(watch)
            )
        except Exception as error:
            ours = Absent(OURS, f"missing: cannot be recorded in a graph: {type(error).__name__}"[:120])
        race(case, [ours, Contender(PLAIN, lambda _: plain(), unchecked)], [None], watched.exact)


@pytest.mark.alike
@pytest.mark.parametrize("batch", [1, 64])
def test_decode_eager(race, machine: Machine, seed: int, model: Llama, batch: int) -> None:
    """The same without a graph, beside hooks that ask the host at every layer."""
    watched = Watched(machine, model, _names(model), 2 if machine.scale.tiny else batch, seed)
    chain = peers.UsualScores(watched.readers, watched.centre, LEVEL, len(watched.names), len(watched.ids))
    case = watched.case("eager", ())

    @contextlib.contextmanager
    def monitoring() -> Iterator[None]:
        with watched.monitor() as watch, watched.serving(watch):
            watched.step()
            yield

    def check(_: None) -> Tensor:
        with watched.monitor() as watch:
            return watched.first(watch, watched.step)

    contenders = [
        Contender(OURS, lambda _: watched.step(), check, monitoring),
        Contender(PLAIN, lambda _: watched.step(), unchecked),
        Contender("usual hooks", lambda _: watched.step(), unchecked, lambda: peers.hooked(model.layers, chain)),
    ]
    race(case, contenders, [None], watched.exact)


class Watched:
    """A model that decodes from a full cache, and directions at its layers, calibrated on a prompt of it."""

    def __init__(self, machine: Machine, model: Llama, names: Sequence[str], batch: int, seed: int) -> None:
        self.machine, self.model, self.names = machine, model, list(names)
        shape, g = model.shape, machine.generator(seed)
        context = 8 if machine.scale.tiny else CONTEXT
        self.ids = torch.randint(shape.vocab, (batch, 1), generator=g, device=machine.device)
        self.cache = Cache(shape, batch, context + ROOM, context, next(model.parameters()))
        k = machine.scale.labels()
        patterns = unit(torch.randn(k, shape.dim, generator=g, device=machine.device, dtype=torch.float64))[0]
        self.readers, self.centre = patterns.float(), torch.zeros(shape.dim, device=machine.device)
        self.scale = self._scales(torch.randint(shape.vocab, (4, context), generator=g, device=machine.device))

    def _scales(self, prompt: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and std [K] of the scores at each hook point."""
        rows: dict[int, Tensor] = {}
        with torch.no_grad(), peers.hooked([self.model.get_submodule(n) for n in self.names], rows.__setitem__):
            self.model(prompt)
        scores = {
            n: x.reshape(-1, x.shape[-1]).double() @ self.readers.double().T
            for n, x in zip(self.names, rows.values(), strict=True)
        }
        return {name: (z.mean(0), z.std(0)) for name, z in scores.items()}

    def vectors(self) -> Mapping[str, Directions]:
        """The directions as Directions of every hook point."""
        names = tuple(f"direction {i}" for i in range(len(self.readers)))
        readers, centre = self.readers.cpu(), self.centre.double().cpu()
        one = torch.ones(len(names), dtype=torch.float64)
        return {
            name: Directions(
                names,
                readers.double(),
                readers,
                centre,
                mean_norm=1.0,
                residual=one,
                hook_point=name,
                calibration=Calibration(mean.cpu(), std.cpu(), 1, None),
            )
            for name, (mean, std) in self.scale.items()
        }

    def monitor(self) -> Any:
        """A monitor with alarms on a few directions."""
        vectors = self.vectors()
        alarms = {name: Threshold(z=LEVEL, on="token") for name in next(iter(vectors.values())).names[:ALARMS]}
        return emocore.monitor(self.model, vectors, alarms, alpha=ALPHA, resident=True)

    @contextlib.contextmanager
    def serving(self, watch: Any) -> Iterator[None]:
        """A batch of requests of a monitor, from the cache's start."""
        self.cache.at.fill_(self.cache.filled)
        with watch.batch(requests=[f"request {i}" for i in range(len(self.ids))]):
            yield

    def step(self) -> Tensor:
        """One token of every sequence; the cache's place goes on, and round."""
        with torch.no_grad():
            y = self.model(self.ids, past_key_values=self.cache)
            self.cache.at.copy_(self.cache.filled + (self.cache.at - self.cache.filled + 1) % ROOM)
        return y

    def first(self, watch: Any, step: Callable[[], Any]) -> Tensor:
        """EMAs [layers, B, K] of requests that no step has seen, after one from the cache's start."""
        names = [f"first {i}" for i in range(len(self.ids))]
        self.cache.at.fill_(self.cache.filled)
        with watch.batch(requests=names):
            step()
        found = watch.scores
        return torch.stack([torch.stack([found[point][name] for name in names]) for point in self.names]).cpu()

    def exact(self, _: None) -> Tensor:
        """The same in float64."""
        rows: dict[int, Tensor] = {}
        self.cache.at.fill_(self.cache.filled)
        with peers.hooked([self.model.get_submodule(n) for n in self.names], rows.__setitem__):
            self.step()
        found = []
        for x, (mean, std) in zip(rows.values(), self.scale.values(), strict=True):
            z = (x[:, -1].double() @ self.readers.double().T - mean) / std
            found.append(ALPHA * z)
        return torch.stack(found).cpu()

    def case(self, how: str, bars: Any) -> Case:
        shape = self.model.shape
        return Case(
            op="model",
            name=f"decode {shape.name} B={len(self.ids)} {how}: {len(self.readers)} scores at {len(self.names)} layers",
            dtype="bfloat16",
            rows=len(self.ids),
            dim=shape.dim,
            k=len(self.readers),
            bound=BOUND_SCORE,
            bars=bars,
            baseline=PLAIN,
            hides_launch=False,
        )
