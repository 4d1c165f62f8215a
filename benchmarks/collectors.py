"""Collectors: ways that people have to label means and covariances at every layer of a model, on the model's device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import peers
from .harness import Absent, Contender, unchecked
from .peers import hooked

PLAIN = "plain forward"


@dataclass(frozen=True)
class Subject:
    """A model, what it is shown, and what is wanted of its modules: means of `labels` [B], perhaps the covariance."""

    model: nn.Module
    inputs: dict[str, Tensor]  # input_ids [B, T], every token real
    names: list[str]  # of the modules
    labels: Tensor
    k: int
    dim: int
    covariance: bool
    numbered: str  # the modules' names with {num} in place of their number
    hidden: Callable[[Any], Sequence[Tensor]] | None = None  # reads output_hidden_states, where the model has it
    rows: Tensor = field(init=False)  # the label of every row [B T]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", self.labels.repeat_interleave(self.inputs["input_ids"].shape[1]))

    @property
    def modules(self) -> list[nn.Module]:
        """The modules themselves."""
        return [self.model.get_submodule(name) for name in self.names]

    def forward(self, **options: Any) -> Any:
        """One forward without gradients."""
        with torch.no_grad():
            return self.model(**self.inputs, **options)


class Raw:
    """A float32 copy of the rows, index_add_ by label, addmm_ for x'x: what most hooks do."""

    def __init__(self, subject: Subject, dtype: torch.dtype = torch.float32) -> None:
        layers, dim = len(subject.names), subject.dim
        self.labels, self.covariance = subject.rows, subject.covariance
        self.counts = torch.zeros(layers, subject.k, dtype=torch.float64)
        self.sums = torch.zeros(layers, subject.k, dim, dtype=dtype)
        self.scatter = torch.zeros(layers, dim, dim, dtype=dtype) if self.covariance else None

    def __call__(self, layer: int, hidden: Tensor) -> None:
        x = hidden.detach().reshape(-1, hidden.shape[-1]).to(self.sums.dtype)
        self.counts[layer] += torch.bincount(self.labels, minlength=self.counts.shape[1])
        self.sums[layer].index_add_(0, self.labels, x)
        if self.scatter is not None:
            self.scatter[layer].addmm_(x.T, x)

    def found(self) -> Tensor:
        """[layers, K (+ D), D]: label means, and the covariance below them."""
        sums, n = self.sums.double(), self.counts.sum(1)[:, None, None]
        means = sums / self.counts.unsqueeze(2).clamp(min=1)
        if self.scatter is None:
            return means
        mean = sums.sum(1, keepdim=True) / n
        return torch.cat([means, (self.scatter.double() - n * mean.mT @ mean) / (n - 1)], 1)


class Centred(Raw):
    """As baukit's running Covariance: a batch about its own mean, merged into float32 sums by Chan's formula."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.seen = [0] * len(subject.names)
        self.mean = torch.zeros(len(subject.names), subject.dim)

    def __call__(self, layer: int, hidden: Tensor) -> None:
        x = hidden.detach().reshape(-1, hidden.shape[-1]).float()
        self.counts[layer] += torch.bincount(self.labels, minlength=self.counts.shape[1])
        self.sums[layer].index_add_(0, self.labels, x)
        mean, before, n = x.mean(0), self.seen[layer], len(x)
        apart, self.seen[layer] = mean - self.mean[layer], before + n
        self.mean[layer] += apart * (n / (before + n))
        y = x - mean
        self.scatter[layer].addmm_(y.T, y).addr_(apart, apart, alpha=before * n / (before + n))

    def found(self) -> Tensor:
        """As Raw's, the scatter already about the mean."""
        means = self.sums.double() / self.counts.unsqueeze(2).clamp(min=1)
        return torch.cat([means, self.scatter.double() / (self.seen[0] - 1)], 1)


class Fitters:
    """concept-erasure's LeaceFitter at every layer; label means are in its cross-covariance."""

    def __init__(self, subject: Subject) -> None:
        from concept_erasure import LeaceFitter

        self.hot = nn.functional.one_hot(subject.rows, subject.k).float()
        self.all = [LeaceFitter(subject.dim, subject.k, dtype=torch.float32) for _ in subject.names]

    def __call__(self, layer: int, hidden: Tensor) -> None:
        self.all[layer].update(hidden.float(), self.hot)

    def found(self) -> Tensor:
        """As Raw's."""
        each = []
        for one in self.all:
            n, share = int(one.n), one.mean_z.double()
            means = one.mean_x.double() + (one.sigma_xz_.double() / n / share.clamp(min=1 / n)).T
            each.append(torch.cat([means * (share > 0)[:, None], one.sigma_xx_.double() / (n - 1)]))
        return torch.stack(each)


Collector = Raw | Fitters


def by_hooks(name: str, subject: Subject, make: Callable[[Subject], Collector]) -> Contender:
    """A collector that hooks call."""

    def check(_: Any) -> Tensor:
        clean = make(subject)
        with hooked(subject.modules, clean):
            subject.forward()
        return clean.found()

    kept = make(subject)
    return Contender(name, lambda _: subject.forward(), check, lambda: hooked(subject.modules, kept))


def after(name: str, subject: Subject, forward: Callable[[], Sequence[Tensor]]) -> Contender:
    """A forward that keeps every layer's output, and the raw sums of them afterwards."""

    def into(sums: Raw) -> None:
        for layer, hidden in enumerate(forward()):
            sums(layer, hidden)

    def check(_: Any) -> Tensor:
        clean = Raw(subject)
        into(clean)
        return clean.found()

    kept = Raw(subject)
    return Contender(name, lambda _: into(kept), check)


def kept_by_hooks(subject: Subject) -> list[Tensor]:
    """Every module's output, held until the forward is over."""
    outputs: dict[int, Tensor] = {}
    with hooked(subject.modules, outputs.__setitem__):
        subject.forward()
    return list(outputs.values())


def _traced(subject: Subject) -> Callable[[], list[Tensor]]:
    from nnsight import NNsight

    model = NNsight(subject.model)

    def forward() -> list[Tensor]:
        saved = []
        with torch.no_grad(), model.trace(**subject.inputs):
            for name in subject.names:
                saved.append(model.get(name).output.save())
        return [one[0] if isinstance(one, tuple) else one for one in saved]

    return forward


def _recorded(subject: Subject) -> Callable[[], list[Tensor]]:
    from steering_vectors import record_activations

    def forward() -> list[Tensor]:
        with record_activations(subject.model, layer_config={"decoder_block": subject.numbered}) as found:
            subject.forward()
        return [found[layer][0] for layer in range(len(subject.names))]

    return forward


def everyone(subject: Subject) -> Iterator[Contender | Absent]:
    """The plain forward, and what people do beside it."""
    yield Contender(PLAIN, lambda _: subject.forward(), unchecked)
    yield by_hooks("usual hooks, float32 sums", subject, Raw)
    if subject.hidden is None:
        yield after("as output_hidden_states, then sums", subject, lambda: kept_by_hooks(subject))
    else:
        read = subject.hidden
        yield after(
            "output_hidden_states, then sums", subject, lambda: read(subject.forward(output_hidden_states=True))
        )
    for package, name, forward in (
        ("nnsight", "nnsight trace, then sums", _traced),
        ("steering_vectors", "steering-vectors record, then sums", _recorded),
    ):
        yield peers.peer(package, name, lambda n=name, make=forward: after(n, subject, make(subject)))
    if subject.covariance:
        yield by_hooks("as baukit Covariance in hooks", subject, Centred)
        fitter = "concept-erasure LeaceFitter in hooks"
        yield peers.peer("concept_erasure", fitter, lambda: by_hooks(fitter, subject, Fitters))


def exact(subject: Subject) -> Tensor:
    """[layers, K (+ D), D] in float64, about the mean."""
    sums = Raw(subject, torch.float64)
    each = []
    for layer, hidden in enumerate(kept_by_hooks(subject)):
        sums(layer, hidden)
        each.append(torch.cov(hidden.reshape(-1, subject.dim).double().T))
    found = sums.found()
    if subject.covariance:
        found[:, subject.k :] = torch.stack(each)
    return found


def error(subject: Subject, found: Tensor, right: Tensor) -> float:
    """The largest error of a layer, of its means or of its covariance, relative to the largest of that layer's."""
    k, found = subject.k, found.double()
    worst = torch.zeros(0, dtype=torch.float64)
    for part in (slice(None, k), slice(k, None)):
        if right[:, part].numel():
            off = (found[:, part] - right[: len(found), part]).abs().amax((1, 2))
            worst = torch.cat([worst, off / right[: len(found), part].abs().amax((1, 2))])
    return float(worst.max())
