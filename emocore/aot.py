"""Ahead of time: every shipped variant of every kernel compiled without a GPU, kept, and loaded where there is one."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from . import formats, native, publishing
from .errors import ArgumentError, DeviceError, StoreError

ARCHITECTURES = (80, 90, 100)
MAX_SHARED = 227 * 1024  # bytes of shared memory a block may have on sm_90
GRAM = Path(__file__).parent / "cubins" / "gram_sm90a.cubin"

# Bytes of a parameter by the type of its argument; pointers have 8.
_BYTES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "fp32": 4, "i64": 8, "fp64": 8}


@dataclass(frozen=True)
class Built:
    """A compiled variant: its cubin, its PTX, how it is launched, and what it takes of a multiprocessor."""

    name: str
    arch: int
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes of shared memory a block
    entry: str  # of the cubin
    threads: int  # a block
    hidden: int  # parameters behind the variant's own, all null; -1 where only Triton can launch it
    ptx: str
    cubin: bytes


def modules() -> list[str]:
    """The files of kernels/ that ship variants."""
    folder = Path(__file__).parent / "kernels"
    return sorted(p.stem for p in folder.glob("*.py") if "\ndef variants(" in p.read_text())


def variants(module: str) -> Iterator[Any]:
    """The variants that a file of kernels/ ships."""
    yield from importlib.import_module(f"emocore.kernels.{module}").variants()


def build(variant: Any, arch: int) -> Built:
    """Compile one variant for sm_<arch>."""
    _need_compiler()
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = variant.kernel
    names = [p.name for p in kernel.params]
    if unsaid := [n for n in names if n not in variant.types and n not in variant.constants]:
        raise ArgumentError(f"{variant.name}: a variant says the type or the value of every argument", got=unsaid)
    types = {n: variant.types[n].removesuffix(":16") if n in variant.types else "constexpr" for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in variant.types.items() if t.endswith(":16")}
    source = triton.compiler.ASTSource(kernel, types, dict(variant.constants), attrs=aligned)
    options = _options(variant)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin, ptx, said = built.asm["cubin"], built.asm["ptx"], built.metadata
    registers, spilled = _resources(cubin)
    hidden = _hidden(variant, said, ptx)
    launched = {"entry": said.name, "threads": 32 * said.num_warps, "hidden": hidden}
    return Built(variant.name, arch, registers, spilled, said.shared, **launched, ptx=ptx, cubin=cubin)


def _options(variant: Any) -> dict[str, Any]:
    from .kernels import _launch

    return {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": _launch.FUSED}


def _need_compiler() -> None:
    if importlib.util.find_spec("triton") is None:
        raise DeviceError("triton is not installed", way_out="Install it, for example by pip install triton.")
    from .kernels import _launch

    if _launch.INTERPRETED:
        raise DeviceError(
            "an interpreted kernel cannot be compiled", way_out="Run without TRITON_INTERPRET in the environment."
        )


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


def _hidden(variant: Any, said: Any, ptx: str) -> int:
    """How many null pointers follow the variant's own parameters, for Triton's scratch memory.

    -1 where something must be in them, or the entry takes anything else, or the launch needs what we do not do.
    """
    needed = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "tensordesc_meta")
    if any(getattr(said, name, 0) for name in needed) or said.num_ctas != 1:
        return -1
    own = [variant.types[p.name].removesuffix(":16") for p in variant.kernel.params if p.name in variant.types]
    expected = [8 if t.startswith("*") else _BYTES.get(t) for t in own]
    found = parameter_bytes(ptx)
    hidden = len(found) - len(expected)
    return hidden if 0 <= hidden <= 2 and found == [*expected, *[8] * hidden] else -1


def parameter_bytes(ptx: str) -> list[int]:
    """The bytes of every parameter of the one entry in a PTX text."""
    (entry,) = re.findall(r"\.entry\s+\w+\(([^)]*)\)", ptx)
    words = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)\b[^,\[]*(?:\[(\d+)\])?", entry)
    return [int(bits) // 8 * int(count or 1) for bits, count in words]


# --- the cache


def cache_folder() -> Path:
    """Where cubins are kept: emocore/kernels in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emocore" / "kernels"


def cached(variant: Any, arch: int) -> Built | None:
    """The variant as it was built before, from the same source by the same Triton; None where it was not."""
    with contextlib.suppress(Exception):  # whatever is in the file, building is the way out
        text, tensors = formats.FORMATS[".safetensors"].unpack(_path(variant, arch).read_bytes())
        data = {name: tensors[name].numpy().tobytes() for name in ("ptx", "cubin")}
        return Built(**json.loads(text), ptx=data["ptx"].decode(), cubin=data["cubin"])
    return None


def obtain(variant: Any, arch: int) -> Built:
    """The variant from the cache, else built and put there."""
    found = cached(variant, arch)
    if found is None:
        found = build(variant, arch)
        said = asdict(replace(found, ptx="", cubin=b""))
        text = json.dumps({name: value for name, value in said.items() if name not in ("ptx", "cubin")})
        data = {"ptx": found.ptx.encode(), "cubin": found.cubin}
        tensors = {name: torch.frombuffer(bytearray(value), dtype=torch.uint8) for name, value in data.items()}
        path = _path(variant, arch)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            way_out = "Name a folder that can be written in XDG_CACHE_HOME."
            raise StoreError(f"{path.parent}: no folder for kernels", got=str(error), way_out=way_out) from error
        publishing.publish(path, formats.FORMATS[".safetensors"].pack(tensors, text))
    return found


def _path(variant: Any, arch: int) -> Path:
    import triton

    kernel = variant.kernel
    fields = [f"{name}={value}" for given in (variant.types, variant.constants) for name, value in given.items()]
    said = [_FORMAT, triton.__version__, kernel.cache_key, sorted(fields), sorted(_options(variant).items()), arch]
    digest = hashlib.sha256(repr(said).encode()).hexdigest()[:32]
    return cache_folder() / f"sm_{arch}" / f"{kernel.__name__}-{digest}.safetensors"


_FORMAT = 1  # of a file of the cache


# --- all of them


@dataclass(frozen=True)
class Row:
    """A variant, or a file whose variants cannot be listed: built, or why not, and in how many seconds."""

    name: str
    module: str
    arch: int
    built: Built | None = None
    seconds: float = 0.0
    was_cached: bool = False
    error: str = ""


def table(architectures: Sequence[int] = ARCHITECTURES, jobs: int = 1, building: bool = True) -> Iterator[Row]:
    """Every variant of every module for the architectures, built by `jobs` processes unless it is in the cache.

    With `building=False`, only looked up.
    """
    _need_compiler()
    work = [(arch, module, at, building) for arch in architectures for module in modules() for at in _count(module)]
    return _rows(work, jobs if building else 1)


def _rows(work: list[tuple[int, str, int, bool]], jobs: int) -> Iterator[Row]:
    if jobs == 1:
        yield from map(_row, work)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from pool.map(_row, work)


def _count(module: str) -> range:
    with contextlib.suppress(Exception):  # `_row` says what is wrong
        return range(len(list(variants(module))))
    return range(1)


def _row(work: tuple[int, str, int, bool]) -> Row:
    arch, module, at, building = work
    name, start = module, time.perf_counter()
    try:
        variant = list(variants(module))[at]
        name = variant.name
        found = cached(variant, arch)
        built = obtain(variant, arch) if building else found
    except Exception as error:
        return Row(name, module, arch, error=f"{type(error).__name__}: {error}")
    return Row(name, module, arch, built, time.perf_counter() - start, was_cached=found is not None)


@dataclass(frozen=True)
class Attached:
    """What `attach` did: the variants that are served by the driver, and those that Triton's JIT serves, and why."""

    arch: int
    loaded: tuple[str, ...]
    left: Mapping[str, str]


_attached: dict[int, Attached] = {}
_attaching = threading.Lock()


def attach(device: torch.device | int | None = None, building: bool = False) -> Attached:
    """Load what was built for a CUDA device's architecture: no call that it serves waits for a compiler.

    What is not in the cache is built first if `building`, which takes a minute or two, else left to Triton's JIT, as is
    what cannot be loaded. Not while a CUDA graph is captured. Raises DeviceError where there is no CUDA device.
    """
    _need_compiler()
    if not torch.cuda.is_available():
        raise DeviceError("attach: there is no CUDA device", way_out="Nothing needs to be attached on a CPU.")
    index = torch.cuda._utils._get_device_index(device, optional=True)
    with _attaching, torch.cuda.device(index):
        if index not in _attached:
            torch.zeros(1, device="cuda")  # the context must be there
            major, minor = torch.cuda.get_device_capability()
            _attached[index] = _load(index, 10 * major + minor, building)
        return _attached[index]


def _load(index: int, arch: int, building: bool) -> Attached:
    from .kernels import _launch, gram_cuda

    driver, left = native.extension(), {}
    loaded = []

    def load(name: str, *form: Any) -> int | None:
        try:
            handle: int = driver.driver_load(*form)
        except (DeviceError, ValueError) as error:
            left[name] = str(error)
            return None
        loaded.append(name)
        return handle

    shipped = [v for module in modules() for v in variants(module)]
    for variant in sorted(shipped, key=lambda v: -v.promises):  # the most special that serves a call is tried first
        built = obtain(variant, arch) if building else cached(variant, arch)
        if built is None or built.hidden < 0:
            left[variant.name] = "not built" if built is None else "only Triton can launch it"
            continue
        words = " ".join([*variant.arguments, *["null"] * built.hidden])
        handle = load(variant.name, built.cubin, built.entry, words, built.threads, built.shared)
        if handle is not None:
            _launch.serve(variant, index, handle, driver.driver_launch)
    for parts in (1, 2) if arch == 90 and GRAM.exists() else ():
        entry, *form = driver.gram_cuda_form(parts)
        handle = load(entry, GRAM.read_bytes(), entry, *form)
        if handle is not None:
            gram_cuda.HANDLES[index, parts] = handle
    return Attached(arch, tuple(loaded), left)
