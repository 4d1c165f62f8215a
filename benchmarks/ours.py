"""Ours: what the engine has for this machine, found when it is asked for; what it does not have yet says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emocore

from .harness import Absent, Contender
from .machine import Machine

OURS = "emocore"


def served(machine: Machine, op: str) -> str:
    """The implementation that serves an op here: "native (...)", "triton" or "reference"; "none" for no such op."""
    where = "cuda" if machine.cuda else "cpu"
    return emocore.ops.implementations().get(op, {}).get(where, "none")


def attach(machine: Machine) -> dict[str, Any]:
    """Load the kernels that were built ahead of time, building what is not there yet; says what that gave."""
    if not machine.cuda:
        return {}
    try:
        from emocore import aot

        found = aot.attach(machine.device, building=True)
    except Exception as error:
        return {"attached": f"failed: {error}"}
    return {"attached": len(found.loaded), "left to the JIT": dict(found.left)}


def lacks_op(machine: Machine, *ops: str) -> Absent | None:
    """Says which op has no kernel here, None where all have one."""
    for op in ops:
        try:
            by = served(machine, op)
        except Exception as error:  # its file is broken; the other cases still run
            return Absent(OURS, f"missing: {error}"[:120])
        if by == "none":
            return Absent(OURS, f"missing: no op {op}")
        if by == "reference":
            return Absent(OURS, f"missing: no kernel for {op}, the reference serves it")
    return None


def lacks_step(machine: Machine, *steps: str) -> Absent | None:
    """Says which step of the drain has no kernel here, None where all have one."""
    for name in steps:
        reference = emocore.ops.STEPS.get(name)
        if reference is None:
            return Absent(OURS, f"missing: no step {name}")
        try:
            serves = emocore.ops.step(name, machine.device)
        except Exception as error:  # its file is broken; the other cases still run
            return Absent(OURS, f"missing: {error}"[:120])
        if serves is reference:
            return Absent(OURS, f"missing: no kernel for {name}, the reference serves it")
    return None


def step(machine: Machine, name: str) -> Callable[..., Any]:
    """A step of the drain, as docs/gpu.md describes it."""
    return emocore.ops.step(name, machine.device)


def by_op(machine: Machine, op: str, call: Callable[[Any], Any], **options: Any) -> Contender | Absent:
    """Ours by an op, absent where no kernel serves it."""
    return lacks_op(machine, op) or Contender(OURS, call, **options)
