"""Whole models: what label means and covariances at every layer cost the forward, of ours and of the usual ways."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emocore
from emocore.precision import BOUND, CHAIN, FREEZE_ROWS

from . import collectors, peers
from .bars import faster, slows
from .collectors import PLAIN, Subject
from .harness import Absent, Contender, error_of, unchecked
from .llama import Llama
from .machine import Machine
from .ours import OURS, lacks_step
from .outgoing import Outgoing
from .passing import FORWARD, STORED, bound_16, moments
from .results import Case
from .shapes import SMALL_LLAMA, TINY_MODEL

WHAT = pytest.mark.parametrize("covariance", [False, True], ids=["means", "covariance"])


def minilm(machine: Machine, covariance: bool, seed: int) -> Subject | Absent:
    """all-MiniLM-L6-v2 on 32 x 128 random tokens, where its package is."""
    try:
        from emocore.demo import load_model

        model, tokenizer, _ = load_model(None)
    except (emocore.errors.ArgumentError, ImportError) as error:
        return Absent(OURS, f"skipped: {error}"[:100])
    quick = machine.scale.name == "quick"
    size = (2, 16) if machine.scale.tiny else (4 if quick else 32, 128)
    ids = torch.randint(1000, tokenizer.vocab_size, size, generator=machine.generator(seed))
    names = [f"encoder.layer.{i}" for i in range(len(model.encoder.layer))]
    return Subject(
        model.requires_grad_(False),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        names,
        torch.arange(len(ids)) % machine.scale.labels(),
        machine.scale.labels(),
        model.config.hidden_size,
        covariance,
        "encoder.layer.{num}",
        lambda output: output.hidden_states[1:],
    )


def llama(machine: Machine, covariance: bool, seed: int) -> Subject:
    """Sixteen blocks of Llama with random weights in bfloat16, on 4 x 256 tokens."""
    shape = TINY_MODEL if machine.scale.tiny else SMALL_LLAMA
    torch.manual_seed(seed)
    model = Llama(shape, machine.device, torch.bfloat16)
    size = (2, 16) if machine.scale.tiny else (2 if machine.scale.name == "quick" else 4, 256)
    ids = torch.randint(shape.vocab, size, generator=machine.generator(seed))
    names, k = [f"layers.{i}" for i in range(shape.layers)], machine.scale.labels()
    return Subject(
        model, {"input_ids": ids}, names, torch.arange(len(ids)) % k, k, shape.dim, covariance, "layers.{num}"
    )


@pytest.mark.cpu
@WHAT
def test_minilm(race, machine: Machine, seed: int, covariance: bool) -> None:
    """A real encoder in float32."""
    bars = (slows("G18", 0.05 if covariance else 0.015, PLAIN),)
    _collect(race, machine, "MiniLM", minilm(machine, covariance, seed), covariance, bars)


@pytest.mark.cpu
@WHAT
def test_llama(race, machine: Machine, seed: int, covariance: bool) -> None:
    """A decoder of many blocks in bfloat16: what one layer costs, and what all."""
    _collect(race, machine, "Llama", llama(machine, covariance, seed), covariance, ())


def _collect(
    race: Callable[..., Any], machine: Machine, name: str, subject: Subject | Absent, covariance: bool, bars: Any
) -> None:
    what = "means, covariance" if covariance else "means"
    if isinstance(subject, Absent):
        case = Case(op="model", name=f"{name}: {what}", dtype="", rows=0, dim=0, bound=0.0, bars=bars)
        race(case, [subject], [None], None)
        return
    sequences, tokens = subject.inputs["input_ids"].shape
    dtype = next(subject.model.parameters()).dtype
    case = Case(
        op="model",
        name=f"{name} {sequences} x {tokens}: {what}, {len(subject.names)} layers",
        dtype=str(dtype).removeprefix("torch."),
        rows=sequences * tokens,
        dim=subject.dim,
        k=subject.k,
        bound=BOUND[dtype] if covariance else 1e-6,
        bars=bars,
        rounds=11,
        baseline=PLAIN,
    )
    all_layers, one = Capturing(subject, subject.names), Capturing(subject, subject.names[:1])
    contenders = [
        Contender(OURS, all_layers.forward, all_layers.check, all_layers.open),
        Contender("emocore, one layer", one.forward, one.check, one.open),
        *collectors.everyone(subject),
    ]
    race(
        case,
        contenders,
        [None],
        lambda _: collectors.exact(subject),
        error=lambda found, right: collectors.error(subject, found, right),
    )


class Capturing:
    """Ours at some of a subject's layers. A forward's rows fill a block, so that each pays for its own sums."""

    def __init__(self, subject: Subject, names: Sequence[str]) -> None:
        self.subject, self.names = subject, names
        self.held = self._moments()
        self.tap: Any = None

    def _moments(self) -> dict[str, emocore.Moments]:
        rows = max(self.subject.inputs["input_ids"].numel() // CHAIN * CHAIN, FREEZE_ROWS)
        return {
            name: emocore.Moments(self.subject.k, covariance=self.subject.covariance, block_rows=rows)
            for name in self.names
        }

    @contextlib.contextmanager
    def open(self, held: dict[str, emocore.Moments] | None = None) -> Iterator[None]:
        """Hooks on."""
        with emocore.capture(self.subject.model, held or self.held) as self.tap:
            yield

    def forward(self, _: Any = None) -> None:
        """One batch."""
        with self.tap.batch(labels=self.subject.labels):
            self.subject.forward()

    def check(self, _: Any) -> Tensor:
        """What it finds from nothing, [layers, K (+ D), D]."""
        clean = self._moments()
        with self.open(clean):
            self.forward()
        parts = [[one.label_mean.nan_to_num()] for one in clean.values()]
        if self.subject.covariance:
            parts = [[*part, one.covariance()] for part, one in zip(parts, clean.values(), strict=True)]
        return torch.stack([torch.cat(part) for part in parts])


@pytest.mark.gpu
def test_prefill(race, machine: Machine, seed: int, model: Llama) -> None:
    """Means and token covariances while prompts are read: G10, and one layer against all."""
    tiny = machine.scale.tiny
    sequences, tokens = (2, machine.scale.block // 2) if tiny else (8, 2048)
    ids = torch.randint(
        model.shape.vocab, (sequences, tokens), generator=machine.generator(seed), device=machine.device
    )
    names = [f"layers.{i}" for i in range(model.shape.layers)]
    usual = peers.UsualStatistics(len(names), model.shape.dim, machine.device)
    case = Case(
        op="model",
        name=f"prefill {model.shape.name} {sequences} x {tokens}: mean and covariance at {len(names)} layers",
        dtype="bfloat16",
        rows=sequences * tokens,
        dim=model.shape.dim,
        bound=bound_16(sequences * tokens),
        bars=(slows("G10", 0.06, PLAIN),),
        baseline=PLAIN,
        hides_launch=False,
    )

    def forward(given: Tensor) -> Tensor:
        with torch.no_grad():
            return model(given)

    def capturing(some: Sequence[str]) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """An open capture that has its memory."""
        held = {name: moments(machine.scale.block, tiny) for name in some}

        @contextlib.contextmanager
        def around() -> Iterator[None]:
            with emocore.capture(model, held, resident=True):
                forward(ids)
                yield

        return around

    def covariance(some: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Of the first and last layer, those that are captured."""

        def check(given: Tensor) -> Tensor:
            found = {name: moments(machine.scale.block, tiny) for name in some}
            with emocore.capture(model, found, resident=True):
                forward(given)
            return torch.stack([found[name].covariance() for name in (names[0], names[-1]) if name in found])

        return check

    def exact(given: Tensor) -> Tensor:
        rows: dict[int, Tensor] = {}
        with peers.hooked([model.layers[0], model.layers[-1]], rows.__setitem__):
            forward(given)
        return torch.stack([torch.cov(x.reshape(-1, model.shape.dim).double().T) for x in rows.values()])

    absent = lacks_step(machine, *FORWARD)
    contenders = [
        absent or Contender(OURS, forward, covariance(names), capturing(names)),
        Contender("emocore, one layer", forward, covariance(names[:1]), capturing(names[:1])),
        Contender(PLAIN, forward, unchecked),
        Contender("usual hooks", forward, unchecked, lambda: peers.hooked(model.layers, usual)),
    ]
    race(case, contenders, [ids], exact, error=lambda found, right: error_of(found, right[: len(found)]))


@pytest.mark.gpu
def test_prefill_to_host(race, machine: Machine, seed: int, model: Llama, tmp_path: Path) -> None:
    """Rows of every layer to the host while prompts are read, several forwards on end: G12, and hooks that copy."""
    sequences, tokens, forwards = (2, 16, 2) if machine.scale.tiny else (4, 1024, 4)
    ids = torch.randint(
        model.shape.vocab, (sequences, tokens), generator=machine.generator(seed), device=machine.device
    )
    names = [f"layers.{i}" for i in range(model.shape.layers)]
    case = Case(
        op="model",
        name=f"prefill {model.shape.name} {forwards} x {sequences} x {tokens}: rows of {len(names)} layers to the host",
        dtype="bfloat16",
        rows=forwards * sequences * tokens,
        dim=model.shape.dim,
        bound=0.0,
        bars=(slows("G12", 0.03, PLAIN), faster("G12", 5.0, "hooks with .cpu()")),
        baseline=PLAIN,
        hides_launch=False,
    )

    def several(given: Tensor) -> None:
        with torch.no_grad():
            for _ in range(forwards):
                model(given)

    @contextlib.contextmanager
    def away() -> Iterator[None]:
        with Outgoing() as nowhere, emocore.capture(model, nowhere.sinks(names), resident=True):
            several(ids)  # has its memory
            yield

    def check(given: Tensor) -> Tensor:
        some = [names[0], names[-1]]
        with emocore.ActivationStore(tmp_path) as kept, torch.no_grad():  # noqa: SIM117
            with emocore.capture(model, dict.fromkeys(some, kept), resident=True):
                model(given)
        found = emocore.activations(tmp_path)
        return torch.stack([found[name].rows for name in some])

    def exact(given: Tensor) -> Tensor:
        rows: dict[int, Tensor] = {}
        with peers.hooked([model.layers[0], model.layers[-1]], rows.__setitem__), torch.no_grad():
            model(given)
        return torch.stack([x.reshape(-1, model.shape.dim).double() for x in rows.values()])

    contenders = [
        lacks_step(machine, *STORED) or Contender(OURS, several, check, away),
        Contender(PLAIN, several, unchecked),
        Contender("hooks with .cpu()", several, unchecked, lambda: peers.hooked(model.layers, lambda _, x: x.cpu())),
    ]
    race(case, contenders, [ids], exact)
