"""Peers: what others do for the same end. Libraries run as they are; chains of ops are re-expressed in torch."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .harness import Absent, Contender, failed
from .machine import Machine

NOT_INSTALLED = "skipped: not installed"


def peer(package: str, name: str, make: Callable[[], Contender]) -> Contender | Absent:
    """A contender that needs a package, or its line that says the package is not here, or cannot be used."""
    if importlib.util.find_spec(package) is None:
        return Absent(name, NOT_INSTALLED)
    try:
        return make()
    except Exception as error:
        return Absent(name, failed(error))


def compiled(machine: Machine, call: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of a chain; a run without a device, or of tiny cases, traces it and compiles nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, of when it is loaded
        torch._dynamo.reset()
        compiles = not (machine.dry or machine.scale.tiny)
        return torch.compile(call, backend="inductor" if compiles else "eager", dynamic=False)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Let float32 products run in tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- gram


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b with 16-bit factors and a float32 result: the library's own on a GPU, in float32 where it has none."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def added(acc: Tensor, x: Tensor) -> Tensor:
    """acc [D, D] += x'x, the full product and then the sum; x [N, D]."""
    return acc.add_(product(x.T, x))


def fused(acc: Tensor, x: Tensor) -> Tensor:
    """acc [D, D] + x'x in one call."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.addmm(acc, x.T, x, out_dtype=torch.float32)
    return torch.addmm(acc, x.T.float(), x.float())


def batched(acc: Tensor, x: Tensor) -> Tensor:
    """acc [S, D, D] + x'x of every hook point in one call; x [S, N, D]."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.baddbmm(acc, x.mT, x, out_dtype=torch.float32)
    return torch.baddbmm(acc, x.mT.float(), x.float())


class Welford:
    """What LeaceFitter.update computes, in its dtype: running means of x and of one-hot z, covariance and
    cross-covariance by two centred copies of the batch.
    """

    def __init__(self, dim: int, labels: int, device: torch.device) -> None:
        self.n = 0
        self.mean_x = torch.zeros(dim, device=device)
        self.mean_z = torch.zeros(labels, device=device)
        self.scatter = torch.zeros(dim, dim, device=device)
        self.cross = torch.zeros(dim, labels, device=device)

    def update(self, x: Tensor, z: Tensor) -> Tensor:
        """Add rows x [N, D] with one-hot z [N, K]."""
        x, z = x.to(self.mean_x.dtype), z.to(self.mean_z.dtype)
        self.n += len(x)
        before_x, before_z = x - self.mean_x, z - self.mean_z
        self.mean_x += before_x.sum(0) / self.n
        self.mean_z += before_z.sum(0) / self.n
        self.scatter.addmm_(before_x.T, x - self.mean_x)
        self.cross.addmm_(before_x.T, z - self.mean_z)
        return self.scatter


def leace(dim: int, labels: int, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """concept-erasure's own update, which returns its covariance sums."""
    from concept_erasure import LeaceFitter

    fitter = LeaceFitter(dim, labels, device=device, dtype=torch.float32)

    def update(x: Tensor, z: Tensor) -> Tensor:
        fitter.update(x, z)
        return fitter.sigma_xx_

    return update


# --- steering: the chains of ops that steering libraries run, on x [N, D]


def chain_add(x: Tensor, v: Tensor, strength: float) -> Tensor:
    return x + strength * v


def chain_ablate(x: Tensor, q: Tensor) -> Tensor:
    """x - (x q') q, q [R, D] orthonormal."""
    return x - (x @ q.T) @ q


def chain_clamp(x: Tensor, v: Tensor, dual: Tensor, target: Tensor) -> Tensor:
    return x + (target - x @ v.T) @ dual


def chain_conditional(x: Tensor, gate: Tensor, level: float, delta: Tensor) -> Tensor:
    """Rows whose score is above the level are moved."""
    high = (x @ gate) > level
    return torch.where(high.unsqueeze(1), x + delta, x)


def chain_rows(x: Tensor, table: Tensor, slot: Tensor) -> Tensor:
    """Every row moved by the vector of its slot; table [R, D]."""
    return x + table[slot]


# --- hooks on a whole model


@contextlib.contextmanager
def hooked(modules: Sequence[nn.Module], act: Callable[[int, Tensor], None]) -> Iterator[None]:
    """act(layer, hidden [.., D]) at every module's output."""

    def hook(layer: int) -> Callable[..., None]:
        return lambda module, args, output: act(layer, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class UsualStatistics:
    """The usual hooks for means and covariances on the device: float32 copies, sums and addmm_ at every layer."""

    def __init__(self, layers: int, dim: int, device: torch.device) -> None:
        self.count = [0] * layers
        self.sums = torch.zeros(layers, dim, device=device)
        self.scatter = torch.zeros(layers, dim, dim, device=device)

    def __call__(self, layer: int, hidden: Tensor) -> None:
        x = hidden.detach().reshape(-1, hidden.shape[-1]).float()
        self.count[layer] += len(x)
        self.sums[layer] += x.sum(0)
        self.scatter[layer].addmm_(x.T, x)


class UsualScores:
    """The usual hooks for scores and alarms: project, average, compare, and ask the host at every layer."""

    def __init__(self, readers: Tensor, centre: Tensor, level: float, layers: int, batch: int) -> None:
        self.readers, self.centre, self.level = readers, centre, level
        self.ema = torch.zeros(layers, batch, len(readers), device=readers.device)
        self.alarms = 0

    def __call__(self, layer: int, hidden: Tensor) -> None:
        z = (hidden[:, -1].float() - self.centre) @ self.readers.T
        self.ema[layer] = 0.875 * self.ema[layer] + 0.125 * z
        if bool((self.ema[layer] > self.level).any()):
            self.alarms += 1
