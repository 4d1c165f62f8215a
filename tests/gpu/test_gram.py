"""fold_gram and the op gram: kernels against the float64 reference, by hand, and as they compile."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from emocore import ops
from emocore.kernels import gram, gram_rows
from emocore.kernels.gram import _panels
from emocore.linalg import pack_tiles, tile_count, unpack_tiles
from emocore.precision import DEVICE_CHAIN as CHAIN
from emocore.precision import device_chain
from emocore.reference import gram_ref
from emocore.reference_drain import fold_gram_ref

NAN = float("nan")
# Of a sum in fp32 by chains, relative to the root of the two variances: products of a chain in any order, then chains.
BOUND = 2e-6


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tiles are then enough for some to be whole and some to be cut, and the interpreter has less to do."""
    monkeypatch.setattr(gram, "GRAM_WORKERS", 5)
    for constants in (gram.FOLD, gram_rows.PEAKS, gram_rows.SCALE):
        monkeypatch.setitem(constants, "ROWS", 64)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not written is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(NAN))


def fold(
    y: Tensor,
    exponent: Tensor,
    tiles: Tensor,
    cursor: tuple[int, int] | None = None,
    step: Any = None,
    chain: int = CHAIN,
) -> Tensor:
    """tiles after one step over y [S, P, block, D]."""
    block = y.shape[2]
    at = torch.tensor(cursor or (4 * block + 7, 3 * block), device=y.device)
    (step or ops.step("fold_gram", y.device))(y, at, block, exponent, tiles, chain)
    return tiles


def zeros(hooks: int, dim: int, device: torch.device) -> Tensor:
    return torch.zeros(hooks, tile_count(dim), 128, 128, dtype=torch.float64, device=device)


def noise(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def powers(hooks: int, dim: int, device: torch.device) -> Tensor:
    """Exponents [S, D] of either sign, beyond what fp32 holds."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(-126, 127, (hooks, dim), generator=g, dtype=torch.int32).to(device)


def error(found: Tensor, exact: Tensor, dim: int) -> float:
    """Of tiles [T, 128, 128], relative to the root of the two diagonal elements."""
    a, b = unpack_tiles(found, dim), unpack_tiles(exact, dim)
    scale = b.diagonal().sqrt().clamp_min(torch.finfo(b.dtype).tiny)
    return ((a - b) / scale / scale[:, None]).abs().max().item()


# --- against the reference


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("hooks", "dim", "block"),
    [(1, 1, 512), (3, 17, 512), (1, 100, 768), (1, 128, 4 * CHAIN), (3, 128, 1024), (1, 200, 600), (1, 384, 512)],
)
def test_fold_gram_is_the_reference(hooks: int, dim: int, block: int, parts: int, device: torch.device) -> None:
    y = noise(hooks, parts, block, dim, device=device).half()
    exponent = powers(hooks, dim, device)
    exact = fold(y, exponent, zeros(hooks, dim, device), step=fold_gram_ref)
    found = fold(y, exponent, zeros(hooks, dim, device))
    for a, b in zip(found, exact, strict=True):
        assert error(a, b, dim) <= BOUND
        padding = pack_tiles(torch.ones(dim, dim, dtype=torch.float64, device=device)) == 0
        assert not a[padding].any()


def test_literal_fold_gram(device: torch.device) -> None:
    for step in (fold_gram_ref, None):
        y = torch.zeros(1, 2, 512, 2, dtype=torch.float16, device=device)
        y[0, 0, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        y[0, 1, 511] = torch.tensor([5.0, 6.0])  # lo'lo is left out
        y[0, 1, 1] = torch.tensor([0.0, 1024.0])
        tiles = zeros(1, 2, device)
        tiles[0, 0, 1, 0] = 0.5
        fold(y, torch.tensor([[1, -2]], dtype=torch.int32, device=device), tiles, step=step)
        assert tiles[0, 0, 0, 0] == 10 * 4
        assert tiles[0, 0, 1, 0] == (14 + 3 * 1024 / 2048) / 2 + 0.5
        assert tiles[0, 0, 1, 1] == (20 + 2 * 4 * 1024 / 2048) / 16


# --- chains


@pytest.mark.parametrize(
    ("hooks", "dim", "chains", "extra", "workers"),
    [(1, 1, 4, 0, 132), (1, 16, 8, 0, 3), (2, 129, 5, 0, 1), (1, 129, 5, 0, 8), (2, 129, 3, 64, 5)],
)
def test_every_row_is_taken_once(
    hooks: int,
    dim: int,
    chains: int,
    extra: int,
    workers: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of small integers are exact."""
    monkeypatch.setattr(gram, "GRAM_WORKERS", workers)
    block = chains * CHAIN + extra
    column = torch.arange(dim, device=device) % 3 + 1.0
    chain = torch.arange(block, device=device) // CHAIN + 1.0
    y = torch.arange(1, hooks + 1, device=device)[:, None, None, None] * chain[:, None] * column
    found = fold(y.half(), torch.zeros(hooks, dim, dtype=torch.int32, device=device), zeros(hooks, dim, device))
    for s in range(hooks):
        exact = (s + 1.0) ** 2 * chain.double().square().sum() * torch.outer(column, column).double()
        assert torch.equal(unpack_tiles(found[s], dim), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_chain_starts_from_zero(dtype: torch.dtype, device: torch.device) -> None:
    """Beside 2^30 in the running chain the 64 of a step would be lost."""
    chain = device_chain(dtype)
    y = torch.ones(1, 1, 2 * chain, 16, dtype=torch.float16, device=device)
    y[0, 0, :chain] = 0.0
    y[0, 0, 0] = 2.0**15
    found = fold(y, torch.zeros(1, 16, dtype=torch.int32, device=device), zeros(1, 16, device), chain=chain)
    assert (unpack_tiles(found[0], 16) == 2.0**30 + chain).all()


@pytest.mark.parametrize(
    ("items", "chains", "cut"), [(5, 32, 0), (6, 32, 1), (9, 32, 4), (9, 9, 0), (4, 2, 0), (3, 7, 0), (3, 8, 3)]
)
def test_tiles_are_cut_where_it_pays(items: int, chains: int, cut: int) -> None:
    assert gram._cut(items, chains) == cut


@pytest.mark.parametrize("panels", [1, 7, 8, 9, 40])
def test_panels_are_the_lower_triangle(panels: int, device: torch.device) -> None:
    count = panels * (panels + 1) // 2
    placed = torch.full((count, 2), -1, device=device, dtype=torch.int32)
    panels_kernel[(1,)](placed, panels, count, BAND=gram.GRAM_BAND, BLOCK=1024)
    found = placed.tolist()
    assert sorted(found) == [[i, j] for i in range(panels) for j in range(i + 1)]
    for start in range(0, count, 132):
        read = {panel for pair in found[start : start + 132] for panel in pair}
        assert len(read) <= 31, "tiles summed at a time read too many panels"


@triton.jit
def panels_kernel(out_ptr, panels, count, BAND: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.minimum(tl.arange(0, BLOCK), count - 1)
    i, j = _panels(t, panels, BAND)
    tl.store(out_ptr + 2 * t, i)
    tl.store(out_ptr + 2 * t + 1, j)


# --- what is left alone, and what is the same


@pytest.mark.parametrize("block", [512, 4 * CHAIN])
def test_a_block_that_is_not_full_changes_nothing(block: int, device: torch.device) -> None:
    y = torch.full((2, 1, block, 130), NAN, dtype=torch.float16, device=device)
    exponent = torch.zeros(2, 130, dtype=torch.int32, device=device)
    before = noise(2, 3, 128, 128, device=device).double()
    for step in (fold_gram_ref, None):
        tiles = fold(y, exponent, before.clone(), (8 * block - 1, 7 * block), step)
        assert torch.equal(tiles, before)
    assert fold(y, exponent, before.clone(), (8 * block, 7 * block)).isnan().any()


@pytest.mark.parametrize(("hooks", "chains", "workers"), [(1, 6, 7), (2, 4, 5), (2, 2, 5)])
def test_any_grid_gives_the_same(
    hooks: int, chains: int, workers: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "GRAM_WORKERS", workers)
    y = noise(hooks, 1, chains * CHAIN, 144, device=device).half()
    exponent = powers(hooks, 144, device)
    assert bool(gram._cut(3 * hooks, chains)) == (chains > 2)
    expected = fold(y, exponent, zeros(hooks, 144, device))
    for programs in (None, 1, 3):
        if programs:
            monkeypatch.setattr(gram, "_programs", lambda device, programs=programs: programs)
        assert torch.equal(fold(y, exponent, zeros(hooks, 144, device)), expected)


def test_a_drain_allocates_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    y, exponent = noise(1, 1, 512, 3, device=device).half(), powers(1, 3, device)
    tiles, cursor = zeros(1, 3, device), torch.tensor([512, 0], device=device)
    step = ops.step("fold_gram", y.device)
    step(y, cursor, 512, exponent, tiles, CHAIN)
    once = tiles.clone()
    for name in ("empty", "zeros"):
        monkeypatch.delattr(torch, name)
    step(y, cursor, 512, exponent, tiles[:1], CHAIN)
    assert torch.equal(tiles, 2 * once)


def test_blocks_add_up(device: torch.device) -> None:
    one, two = noise(2, 1, 1, 1024, 48, device=device).half()
    exponent = powers(1, 48, device)
    alone = [fold(y, exponent, zeros(1, 48, device)) for y in (one, two)]
    assert torch.equal(fold(two, exponent, fold(one, exponent, zeros(1, 48, device))), alone[0] + alone[1])


# --- the op


DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bound(dtype: torch.dtype, rows: int, weighted: bool = False) -> float:
    """Of y in fp16 the roundings average out, four deviations; of two parts they are small."""
    return BOUND + (0.0 if weighted or dtype == torch.float32 else 2.0**-11 * 4 / max(rows, 16) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (511, 17), (513, 130)])
def test_gram_is_the_reference(rows: int, dim: int, weighted: bool, dtype: torch.dtype, device: torch.device) -> None:
    scale = torch.exp2(noise(dim, device=device, seed=2).round() * 4)
    shift = scale * (noise(dim, device=device, seed=3) * 3).round()  # few bits, as of every shift that is frozen
    x = (scale * noise(rows, dim, device=device) + shift).to(dtype)
    weights = (noise(rows, device=device, seed=4).double() ** 2).where(noise(rows, device=device, seed=5) < 1, 0.0)
    args = (x, weights if weighted else None, shift.double())
    exact, found = zeros(1, dim, device)[0], zeros(1, dim, device)[0]
    gram_ref(*args, exact)
    if weighted:
        x[weights == 0] = torch.finfo(dtype).max
    for _ in range(2):
        ops.gram(*args, found)
    assert error(found, 2 * exact, dim) <= bound(dtype, rows, weighted)


def test_gram_of_float64_is_the_reference(device: torch.device) -> None:
    x, found, exact = noise(65, 33, device=device).double(), zeros(1, 33, device)[0], zeros(1, 33, device)[0]
    gram_ref(x, None, x[0], exact)
    ops.gram(x, None, x[0], found)
    assert torch.equal(found, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_no_rows(dtype: torch.dtype, device: torch.device) -> None:
    tiles = noise(1, 128, 128, device=device).double()
    before = tiles.clone()
    ops.gram(torch.zeros(0, 3, dtype=dtype, device=device), None, torch.zeros(3, dtype=torch.float64), tiles)
    assert torch.equal(tiles, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_strided_rows(dtype: torch.dtype, device: torch.device) -> None:
    wide = noise(80, 60, device=device).to(dtype)
    shift = torch.zeros(2 * 20, dtype=torch.float64, device=device)[::2]
    expected = None
    for x in (wide[1::2, 3:23], wide.T.contiguous().T[1::2, 3:23], wide[1::2, 3:23].contiguous()):
        found = zeros(1, 20, device)[0]
        ops.gram(x, None, shift, found)
        assert expected is None or torch.equal(found, expected)
        expected = found
    exact = zeros(1, 20, device)[0]
    gram_ref(wide[1::2, 3:23], None, shift, exact)
    assert error(expected, exact, 20) <= bound(dtype, 40)


def test_gram_goes_block_by_block(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "DEVICE_BLOCK_ROWS", 512)
    x = noise(1100, 16, device=device).bfloat16()
    weights = noise(1100, device=device, seed=1).double() ** 2
    zero, found, exact = torch.zeros(16, dtype=torch.float64, device=device), *zeros(2, 16, device)
    ops.gram(x, weights, zero, found)
    gram_ref(x, weights, zero, exact)
    assert error(found, exact, 16) <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e4, 1e9, 1e38])
def test_a_huge_row_leaves_the_bound_and_the_other_columns(
    size: float, dtype: torch.dtype, device: torch.device
) -> None:
    x = noise(1024, 8, device=device).to(dtype)
    x[300, 5] = size
    zero, found, exact = torch.zeros(8, dtype=torch.float64, device=device), *zeros(2, 8, device)
    ops.gram(x, None, zero, found)
    gram_ref(x, None, zero, exact)
    assert found.isfinite().all()
    assert error(found, exact, 8) <= BOUND
    # what is left of its column without it was rounded beside its square, by every step of a chain
    rest = found[0, 5, 5].item() - x[300, 5].double().item() ** 2
    assert abs(rest - (exact[0, 5, 5].item() - x[300, 5].double().item() ** 2)) <= 2.0**-19 * size**2


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_not_finite_stays_so_in_its_column(bad: float, device: torch.device) -> None:
    x = noise(512, 4, device=device)
    x[100, 2] = bad
    zero, found, exact = torch.zeros(4, dtype=torch.float64, device=device), *zeros(2, 4, device)
    ops.gram(x, None, zero, found)
    x[:, 2] = 1.0
    gram_ref(x, None, zero, exact)
    found, exact = unpack_tiles(found, 4), unpack_tiles(exact, 4)
    assert not found[2].isfinite().any()
    kept = [0, 1, 3]
    torch.testing.assert_close(found[kept][:, kept], exact[kept][:, kept], rtol=1e-5, atol=1e-3)


# --- as they compile


BUILD = r"""
import json, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from emocore import aot
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
found = []
for variant in aot.variants("gram"):
    for arch in aot.ARCHITECTURES:
        built = aot.obtain(variant, arch)
        row = {"name": variant.name, "arch": arch, "ptx": built.ptx, "spilled": built.spilled, "shared": built.shared}
        if arch == 90:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.cubin)
                file.flush()
                row["sass"] = subprocess.run([tool, "-c", file.name], capture_output=True, text=True).stdout
        found.append(row | {"odd": not variant.types["D"].endswith(":16")})
variant = next(aot.variants("gram"))
types = {p.name: variant.types.get(p.name, "constexpr").removesuffix(":16") for p in variant.kernel.params}
source = triton.compiler.ASTSource(variant.kernel, types, dict(variant.constants))
ir = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": variant.warps}).asm["ttir"]
json.dump({"variants": found, "ir": ir}, open(sys.argv[1], "w"))
"""


MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gram") / "built.json"
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BUILD, str(path)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def products(compiled: dict[str, Any]) -> list[dict[str, Any]]:
    found = [row for row in compiled["variants"] if row["name"].startswith("gram_kernel")]
    assert {(row["arch"], row["odd"]) for row in found} == {(a, odd) for a in MOST_SHARED for odd in (True, False)}
    return found


def test_nothing_spills_and_a_block_fits(compiled: dict[str, Any]) -> None:
    for row in compiled["variants"]:
        assert row["spilled"] == 0, row["name"]
        assert row["shared"] <= MOST_SHARED[row["arch"]], row["name"]


def test_products_are_the_tensor_cores(compiled: dict[str, Any]) -> None:
    op = {
        80: r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
        90: r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.f16\.f16",
        100: r"tcgen05\.mma\.cta_group::1\.kind::f16",
    }
    for row in products(compiled):
        assert re.search(op[row["arch"]], row["ptx"]), row["name"]


def test_rows_and_state_move_16_bytes_at_a_time(compiled: dict[str, Any]) -> None:
    for row in products(compiled):
        assert "ld.global.v2.b64" in row["ptx"]
        assert "st.global.v2.b64" in row["ptx"]
        assert row["odd"] or re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], (16|0x10)", row["ptx"])
        assert row["odd"] or not re.search(r"ld\.global\.b16|cp\.async\.ca", row["ptx"])


def test_products_run_ahead_on_sm_90(compiled: dict[str, Any]) -> None:
    """The assembler waits behind every wgmma where it cannot tell that nothing else touches their sums."""
    for row in products(compiled):
        if row["arch"] == 90 and not row["odd"]:
            order = re.findall(r"HGMMA|WARPGROUP\.DEPBAR", row["sass"])
            assert order[:5] == ["HGMMA"] * 4 + ["WARPGROUP.DEPBAR"]


def test_offsets_of_rows_have_64_bits(compiled: dict[str, Any]) -> None:
    """Between pointers of their own; 32 bits are enough within a tile."""
    for element in ("f16", "f64"):
        widths = re.findall(rf"tt\.addptr .*: !tt\.ptr<{element}>, (i\d+)", compiled["ir"])
        assert widths
        assert set(widths) == {"i64"}
