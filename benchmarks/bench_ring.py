"""Capture to host: rows streamed off the device while a model runs, against the link: G12."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from .bars import reaches
from .harness import Absent, Contender
from .machine import Machine
from .ours import OURS
from .results import Case, Work

pytestmark = pytest.mark.gpu


def test_to_host(race, machine: Machine, seed: int) -> None:
    """What hooks that copy get of the link; the engine's own ring has a line as soon as there is one."""
    rows, dim = machine.scale.rows(65_536), machine.scale.dim(4096)
    x = torch.randn(rows, dim, generator=machine.generator(seed), device=machine.device).bfloat16()
    case = Case(
        op="ring",
        name=f"to host bfloat16 D={dim}",
        dtype="bfloat16",
        rows=rows,
        dim=dim,
        bound=0.0,
        work=Work(read=x.nbytes),
        bars=(reaches("G12", 0.90),),
        hides_launch=False,
    )
    there = "missing: emocore has no ring to the host yet"
    if importlib.util.find_spec("emocore.ring"):
        there = "missing: emocore.ring is there, and this file does not call it yet"
    race(case, [Absent(OURS, there), Contender(".cpu()", lambda given: given.cpu())], [x], lambda given: given.double())
