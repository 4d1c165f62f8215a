"""CUDA graphs, and what a small call costs the host and the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .machine import Machine

CALLS, REPEATS = 200, 5  # few enough that the device's queue never fills
IN_GRAPH = 32


def graphed(machine: Machine, call: Callable[[], Any]) -> Callable[[], Any]:
    """What replays a recorded call; the call itself where there is no GPU."""
    if not machine.cuda:
        return call
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def small(machine: Machine, call: Callable[[], Any], layers: int = 1) -> dict[str, float]:
    """Of one call, by layer: the host's time, and on a GPU its allocations, whether it waits for the device, and its
    time in a graph.
    """
    calls, repeats = (1, 1) if machine.dry else (CALLS, REPEATS)
    found = {"host us": _host(machine, call, calls, repeats) / layers * 1e6}
    if machine.cuda:
        found["allocations"] = _allocations(call)
        found["waits"] = float(waits(call))
        found["graph us"] = _in_graph(machine, call, 1 if layers > 1 else IN_GRAPH) / layers * 1e6
    return found


def _host(machine: Machine, call: Callable[[], Any], calls: int, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        machine.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls)
    machine.synchronize()
    return statistics.median(taken)


def _allocations(call: Callable[[], Any]) -> float:
    def count() -> int:
        return torch.cuda.memory_stats()["allocation.all.allocated"]

    before = count()
    call()
    return float(count() - before)


def waits(call: Callable[[], Any]) -> bool:
    """Whether a call makes the host wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _in_graph(machine: Machine, call: Callable[[], Any], calls: int) -> float:
    def several() -> None:
        for _ in range(calls):
            call()

    replay = graphed(machine, several)
    taken = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / 10 / calls)
    return statistics.median(taken)
