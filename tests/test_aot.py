"""Every kernel compiled ahead of time: what ships compiles for every architecture, without spills; and the cache."""

import ctypes
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from emocore import _C, aot
from emocore.cli import main
from emocore.errors import DeviceError

# Bytes of shared memory that a block may ask for, by architecture.
MOST_SHARED = {80: 163 * 1024, 90: aot.MAX_SHARED, 100: aot.MAX_SHARED}

ROWS = {"x_ptr", "rows_ptr", "y_ptr", "source_ptr"}  # arguments that hold activations, by the row
WIDE = re.compile(
    r"ld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.b32|v4\.b64)"
    r"|cp\.async\.c[ga]\.shared\.global \[[^]]*\], \[[^]]*\], (?:16|0x10)\b"
    r"|cp\.async\.bulk"
)
# A product in 64 bits, of more than an index and the bytes of an element: an offset of rows that passes 2^31.
LONG = re.compile(r"(?:mul|mad)\.lo\.s64|(?:mul|mad)\.wide\.[su]32 \s*%rd\d+, %r\d+, (?:%r|\d{2})|shl\.b64")

BUILD = """
import json, sys
from emocore import aot
found = []
for row in aot.table(jobs=2):
    built = row.built
    facts = {} if built is None else {**vars(built), "cubin": None}
    found.append({"module": row.module, "name": row.name, "arch": row.arch, "error": row.error, "built": facts})
whole = {row["module"] for row in found} - {row["module"] for row in found if row["error"]}
shipped = {v.name: v for module in whole for v in aot.variants(module)}
for row in found:
    if row["name"] in shipped:
        variant = shipped[row["name"]]
        row |= {"arguments": variant.arguments, "types": dict(variant.types), "constants": dict(variant.constants)}
        row["sizes"] = aot.parameter_bytes(row["built"]["ptx"])
json.dump(found, open(sys.argv[1], "w"))
"""


def compiler(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python where kernels are compiled, not interpreted."""
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run([sys.executable, *command], env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every variant for every architecture; the second run of the tests takes them from the cache."""
    path = tmp_path_factory.mktemp("aot") / "table.json"
    done = compiler("-c", BUILD, str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout
    return json.loads(path.read_text())


def wrong(table: list[dict[str, Any]], fault: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """What is wrong with the variants that were built, by name and architecture."""
    found = {f"{row['name']} sm_{row['arch']}": fault(row) for row in table if "types" in row}
    return {name: what for name, what in found.items() if what}


def test_every_variant_compiles_for_every_architecture(table: list[dict[str, Any]]) -> None:
    assert {row["name"]: row["error"] for row in table if row["error"]} == {}
    assert {row["module"] for row in table} == set(aot.modules())
    names = [(row["name"], row["arch"]) for row in table]
    assert len(names) == len(set(names)), "two variants of one name"
    assert {arch for _, arch in names} == set(aot.ARCHITECTURES)


def test_nothing_spills(table: list[dict[str, Any]]) -> None:
    assert wrong(table, lambda row: row["built"]["spilled"]) == {}


def test_a_block_fits_a_multiprocessor(table: list[dict[str, Any]]) -> None:
    assert wrong(table, lambda row: max(0, row["built"]["shared"] - MOST_SHARED[row["arch"]])) == {}
    assert wrong(table, lambda row: max(0, row["built"]["registers"] * row["built"]["threads"] - 2**16)) == {}


def test_the_driver_can_launch_every_variant(table: list[dict[str, Any]], fake: Any) -> None:
    """Its words are understood, and say parameters of the very sizes that the PTX has."""

    def fault(row: dict[str, Any]) -> str:
        if row["built"]["hidden"] < 0:
            return "only Triton can launch it"
        sizes = row["sizes"]
        fake.library.fake_reset(len(sizes), (ctypes.c_int * 64)(*sizes))
        words = [*row["arguments"], *["null"] * row["built"]["hidden"]]
        try:
            _C.driver_load(fake.cubin, row["built"]["entry"], " ".join(words), row["built"]["threads"])
        except (DeviceError, ValueError) as error:
            return str(error)
        return ""

    assert wrong(table, fault) == {}


def streaming(row: dict[str, Any]) -> bool:
    return any(name in ROWS and kind.endswith(":16") for name, kind in row["types"].items())


def share(row: dict[str, Any]) -> float:
    """Bytes of a tile of rows that each thread has."""
    kinds = [kind[1:5] for name, kind in row["types"].items() if name in ROWS and kind.endswith(":16")]
    elements = math.prod(row["constants"].get(name, 1) for name in ("ROWS", "BLOCK_N", "BLOCK_D"))
    return elements * min({"fp64": 8, "fp32": 4}.get(kind, 2) for kind in kinds) / row["built"]["threads"]


def test_rows_are_read_16_bytes_at_a_time(table: list[dict[str, Any]]) -> None:
    """Unless a tile has fewer for each thread."""

    def narrow(row: dict[str, Any]) -> bool:
        wanted = streaming(row) and ("BLOCK_D" not in row["constants"] or share(row) >= 16)
        return wanted and not WIDE.search(row["built"]["ptx"])

    assert wrong(table, narrow) == {}


def test_offsets_of_rows_have_64_bits(table: list[dict[str, Any]]) -> None:
    assert wrong(table, lambda row: streaming(row) and not LONG.search(row["built"]["ptx"])) == {}


# --- what an entry takes

PTX = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u8 kernel_param_1,
	.param .b16 kernel_param_2,
	.param .f32 kernel_param_3,
	.param .align 64 .b8 kernel_param_4[128],
	.param .u64 .ptr .global .align 1 kernel_param_5
)
"""


def test_parameter_bytes() -> None:
    assert aot.parameter_bytes(PTX) == [8, 1, 2, 4, 128, 8]
    assert aot.parameter_bytes(".entry nothing()\n{") == []


def hidden(ptx: str, types: dict[str, str], **said: Any) -> int:
    params = [SimpleNamespace(name=name) for name in (*types, "D")]
    variant = SimpleNamespace(kernel=SimpleNamespace(params=params), types=types)
    usual = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1, "launch_cooperative_grid": False}
    return aot._hidden(variant, SimpleNamespace(**usual | said), ptx)


def entry(*types: str) -> str:
    return ".entry kernel(" + ",".join(f".param .{t} kernel_param_{i}" for i, t in enumerate(types)) + ")"


def test_hidden_parameters_are_null_pointers_behind_the_others() -> None:
    types = {"x_ptr": "*bf16:16", "n": "i32", "flag": "u1"}
    own = ("u64", "u32", "u8")
    for count in (0, 1, 2):
        assert hidden(entry(*own, *["u64"] * count), types) == count
    for other in (entry(*own, *["u64"] * 3), entry(*own, "u32"), entry("u64", "u64", "u8"), entry(*own[:2]), entry()):
        assert hidden(other, types) == -1
    assert hidden(entry("u64"), {"x_ptr": "tensordesc<fp16[64,64]>"}) == -1


@pytest.mark.parametrize(
    "said",
    [
        {"global_scratch_size": 128},
        {"profile_scratch_size": 1},
        {"num_ctas": 2},
        {"launch_cooperative_grid": True},
        {"tensordesc_meta": [{}]},
    ],
)
def test_what_only_triton_can_launch(said: dict[str, Any]) -> None:
    types = {"x_ptr": "*fp32"}
    assert hidden(entry("u64", "u64", "u64"), types, **said) == -1
    assert hidden(entry("u64", "u64", "u64"), types) == 2


# --- the cache

KERNEL = """
import triton
import triton.language as tl
SCALE = tl.constexpr(2)

@triton.jit
def twice(x):
    return x * SCALE

@triton.jit
def double_kernel(x_ptr, n, one, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, twice(tl.load(x_ptr + at, mask=at < n)), mask=at < n)
"""

CACHE = """
import dataclasses, importlib.util, sys
from pathlib import Path
from emocore import aot
from emocore.errors import ArgumentError, StoreError
from emocore.kernels._launch import Variant

def kernel(*change):
    path = Path(sys.argv[1]) / "double.py"
    path.write_text(Path(sys.argv[2]).read_text().replace(*change or ("", "")))
    spec = importlib.util.spec_from_file_location("double", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double_kernel

def variant(kernel, warps=4, stages=3, n="i32", **constants):
    return Variant(kernel, {"x_ptr": "*fp32:16", "n": n}, {"one": 1, "BLOCK": 256} | constants, warps, stages)

first = variant(kernel())
assert aot.cached(first, 90) is None
built = aot.obtain(first, 90)
assert built.hidden == 2 and built.entry == "double_kernel" and built.threads == 128 and not built.spilled, built
assert built.cubin[:4] == bytes([127]) + b"ELF" and ".target sm_90" in built.ptx
assert aot.cached(first, 90) == aot.obtain(first, 90) == built

assert aot.cached(variant(kernel()), 90) == built
others = [variant(kernel(), **change) for change in ({"warps": 8}, {"stages": 2}, {"n": "i64"}, {"BLOCK": 512})]
sources = [("* SCALE", "+ SCALE"), ("tl.constexpr(2)", "tl.constexpr(3)"), ("< n)), mask", "< n - 1)), mask")]
for other in [*others, *(variant(kernel(*change)) for change in sources)]:
    assert aot.cached(other, 90) is None, other
assert aot.cached(first, 80) is None
try:
    aot.build(Variant(first.kernel, {"x_ptr": "*fp32:16"}, {"BLOCK": 256}), 90)
except ArgumentError as error:
    assert "['n', 'one']" in str(error), error
else:
    raise SystemExit("built without types")

path = aot._path(first, 90)
whole = path.read_bytes()
for at in range(0, len(whole), 997):
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert aot.cached(first, 90) in (None, built), at
    path.write_bytes(whole[:at])
    assert aot.cached(first, 90) is None, at
assert aot.obtain(first, 90) == built and path.read_bytes() == whole

path.parent.rename(path.parent.with_name("elsewhere"))
path.parent.write_text("a file where the folder should be")
try:
    aot.obtain(first, 90)
except OSError as error:
    assert isinstance(error, StoreError) and "sm_90" in str(error), repr(error)
else:
    raise SystemExit("no error")
"""


def test_the_cache(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(KERNEL)
    folders = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = compiler("-c", CACHE, str(tmp_path), str(source), **folders)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert aot.cache_folder() == tmp_path / "emocore" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert aot.cache_folder() == tmp_path / ".cache" / "emocore" / "kernels"


# --- the command


def test_the_command_lists_what_is_built(table: list[dict[str, Any]]) -> None:
    done = compiler("-m", "emocore", "aot", "--list", "--arch", "90")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["variant", "arch", "registers", "spilled", "shared", "seconds"]
    facts = {row["name"]: row["built"] for row in table if row["arch"] == 90}
    assert len(lines) == len(facts) + 2
    for line in lines[1:-1]:
        name, arch, *said = line.split()
        built = facts[name]
        numbers = [str(built[key]) for key in ("registers", "spilled", "shared")] if built else []
        assert (arch, said) == ("90", [*numbers, "cached"] if built else ["not", "built"])
    assert lines[-1] == f"in {aot.cache_folder()}"


def test_the_command_says_what_failed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    built = aot.Built("b", 80, 40, 8, 1024, "entry", 128, 2, "", b"")
    rows = [
        aot.Row("a", "m", 80, error="CompilationError: at line 3"),
        aot.Row("b", "m", 80, built, seconds=1.234),
        aot.Row("c", "m", 80),
    ]
    asked = []

    def table(architectures: Any, jobs: int, building: bool) -> Iterator[aot.Row]:
        asked.append((list(architectures), jobs, building))
        return iter(rows)

    monkeypatch.setattr(aot, "table", table)
    assert main(["aot", "--arch", "80", "--arch", "90", "--jobs", "3"]) == 1
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]] == [
        ["a", "80", "CompilationError:", "at", "line", "3"],
        ["b", "80", "40", "8", "1024", "1.23"],
        ["c", "80", "not", "built"],
    ]
    del rows[0]
    assert main(["aot", "--list"]) == 0
    assert asked[0] == ([80, 90], 3, True)
    assert asked[1][1:] == (len(os.sched_getaffinity(0)), False)
    if not torch.cuda.is_available():
        assert asked[1][0] == [80, 90, 100]


def test_the_command_needs_a_compiler() -> None:
    done = compiler("-m", "emocore", "aot", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert not done.stdout
    assert "Run without TRITON_INTERPRET" in done.stderr
    code = "import sys; sys.modules['triton'] = None; from emocore.cli import main; sys.exit(main(['aot']))"
    done = compiler("-c", code)
    assert done.returncode == 1
    assert "Install it, for example by pip install triton" in done.stderr
