"""Ceilings: what this machine can do at most, measured in the run that the figures come from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from emocore.native import extension

from .machine import Machine, Timed

ROUNDS = 7
WHILE = 0.2  # seconds of rounds on the CPU, of which the best had the cores to itself
TURNS = 1 << 22  # of a peak's loop: some milliseconds


def measure(machine: Machine) -> dict[str, float]:
    """{"copy", "read", "link to device", "link to host"} in bytes/s and {"matmul <dtype>"} in operations/s.

    The best of several rounds on random data; a copy counts what it reads and what it writes. On the CPU with the
    threads that torch has now.
    """
    found = _memory(machine)
    products = _products(machine) if machine.gpu else _peaks(machine)
    found |= {f"matmul {name}": rate for name, rate in products.items()}
    if machine.cuda:
        found |= _links(machine)
    machine.reset_peak()
    return found


def _rate(machine: Machine, call: Callable[[], Any], work: float) -> float:
    """Work a second in the best round after a call that warms up: what disturbs a round only slows it."""
    call()
    if machine.cuda:
        timed = Timed(call, hides_launch=True)
        return work / min(machine.seconds([timed])[0] for _ in range(ROUNDS))
    timed, best, start = Timed(call, computes=True), math.inf, time.perf_counter()
    while best == math.inf or (time.perf_counter() < start + WHILE and not machine.dry):
        best = min(best, machine.seconds([timed])[0])
    return work / best


def _memory(machine: Machine) -> dict[str, float]:
    n = 1 << (16 if machine.dry else 28 if machine.cuda else 25)  # float32 values: 1 GiB, 128 MiB
    x = torch.randn(n, generator=machine.generator(0), device=machine.device)
    y = torch.empty_like(x)
    copied = _rate(machine, lambda: y.copy_(x), 2 * x.nbytes)
    readers = (lambda: x.sum(), lambda: x.amax(), lambda: torch.dot(x, x))
    read = max(_rate(machine, reader, x.nbytes) for reader in readers)
    return {"copy": copied, "read": max(read, copied)}


def _peaks(machine: Machine) -> dict[str, float]:
    """The CPU's multiply-adds on registers, by the fastest instruction set: no library's product comes as far."""
    threads, peak = torch.get_num_threads(), extension().peak
    found = {}
    for arithmetic in ("float64", "float32", "bfloat16"):
        work = peak(arithmetic, TURNS, threads)
        found[arithmetic] = _rate(machine, lambda kind=arithmetic: peak(kind, TURNS, threads), work)
    return found


def _products(machine: Machine) -> dict[str, float]:
    """The fastest dense product that a library has on a GPU, by dtype."""
    n = 64 if machine.dry else 8192
    found = {}
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (torch.randn(n, n, generator=machine.generator(i), device=machine.device).to(dtype) for i in range(2))
        found[str(dtype).removeprefix("torch.")] = _rate(machine, lambda a=a, b=b: a @ b, 2 * n**3)
    return found


def _links(machine: Machine) -> dict[str, float]:
    here = torch.randn(1 << 26, generator=machine.generator(0), device=machine.device)
    there = torch.empty(here.shape, pin_memory=True)
    return {
        "link to host": _rate(machine, lambda: there.copy_(here, non_blocking=True), here.nbytes),
        "link to device": _rate(machine, lambda: here.copy_(there, non_blocking=True), here.nbytes),
    }
