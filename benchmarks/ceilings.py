"""Ceilings: what this machine can do at most, measured in the run that the figures come from."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from .machine import Machine, Timed

ROUNDS = 7


def measure(machine: Machine) -> dict[str, float]:
    """{"copy", "read", "link to device", "link to host"} in bytes/s and {"matmul <dtype>"} in operations/s, medians.

    On random data; a copy counts what it reads and what it writes. On the CPU with the threads that torch has now.
    """
    found = _memory(machine)
    found |= {f"matmul {name}": rate for name, rate in _products(machine).items()}
    if machine.cuda:
        found |= _links(machine)
    machine.reset_peak()
    return found


def _rate(machine: Machine, call: Callable[[], Any], work: float) -> float:
    """Work a second, the median after a call that warms up."""
    call()
    timed = Timed(call, hides_launch=True)
    return work / statistics.median(machine.seconds([timed])[0] for _ in range(1 if machine.dry else ROUNDS))


def _memory(machine: Machine) -> dict[str, float]:
    n = 1 << (16 if machine.dry else 28 if machine.cuda else 25)  # float32 values: 1 GiB, 128 MiB
    x = torch.randn(n, generator=machine.generator(0), device=machine.device)
    y = torch.empty_like(x)
    copied = _rate(machine, lambda: y.copy_(x), 2 * x.nbytes)
    readers = (lambda: x.sum(), lambda: x.amax(), lambda: torch.dot(x, x))
    read = max(_rate(machine, reader, x.nbytes) for reader in readers)
    return {"copy": copied, "read": max(read, copied)}


def _products(machine: Machine) -> dict[str, float]:
    """The fastest dense product that a library here does, by dtype."""
    n = 64 if machine.dry else 8192 if machine.cuda else 1024
    found = {}
    for dtype in (torch.float16, torch.bfloat16) if machine.gpu else (torch.float32,):
        a, b = (torch.randn(n, n, generator=machine.generator(i), device=machine.device).to(dtype) for i in range(2))
        found[str(dtype).removeprefix("torch.")] = _rate(machine, lambda a=a, b=b: a @ b, 2 * n**3)
    if not machine.gpu:  # numpy's library may know this processor better
        x, y = a.numpy(), b.numpy()
        found["float32"] = max(found["float32"], _rate(machine, lambda: x @ y, 2 * n**3))
    return found


def _links(machine: Machine) -> dict[str, float]:
    here = torch.randn(1 << 26, generator=machine.generator(0), device=machine.device)
    there = torch.empty(here.shape, pin_memory=True)
    return {
        "link to host": _rate(machine, lambda: there.copy_(here, non_blocking=True), here.nbytes),
        "link to device": _rate(machine, lambda: here.copy_(there, non_blocking=True), here.nbytes),
    }
