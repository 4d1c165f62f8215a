"""Ahead of time: every shipped variant of every kernel compiled for an architecture, without a GPU."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90, 100)
MAX_SHARED = 227 * 1024  # bytes of shared memory a block may have on sm_90


@dataclass(frozen=True)
class Built:
    """A compiled variant: its cubin, its PTX, and what it takes of a multiprocessor."""

    name: str
    arch: int
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes of shared memory a block
    ptx: str
    cubin: bytes


def variants(module: str) -> Iterator[Any]:
    """The variants that a file of kernels/ ships."""
    yield from importlib.import_module(f"emocore.kernels.{module}").variants()


def build(variant: Any, arch: int) -> Built:
    """Compile one variant for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = variant.kernel
    names = [p.name for p in kernel.params]
    types = {n: variant.types[n].removesuffix(":16") if n in variant.types else "constexpr" for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in variant.types.items() if t.endswith(":16")}
    source = triton.compiler.ASTSource(kernel, types, dict(variant.constants), attrs=aligned)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = built.asm["cubin"]
    registers, spilled = _resources(cubin)
    return Built(variant.name, arch, registers, spilled, built.metadata.shared, built.asm["ptx"], cubin)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory a thread, as the disassembler that ships with Triton reads them."""
    import triton

    tool = Path(os.path.dirname(triton.__file__)) / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text, re.S)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])
