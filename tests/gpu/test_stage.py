"""The op stage on a GPU: rows gathered, tested and measured, against float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emocore import ops
from emocore.kernels import staging
from emocore.reference import stage_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def rows_of(n: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(n + dim)
    return (torch.randn(n, dim, generator=g, dtype=torch.float64) * 3).to(dtype).to(device)


def outputs(n: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Poisoned: rows and norms NaN, finite alternating."""
    rows = torch.full((n, dim), torch.nan, dtype=dtype, device=device)
    return rows, rows.new_full((n,), torch.nan, dtype=torch.float64), torch.arange(n, device=device) % 2 == 0


def agree(x: Tensor, index: Tensor | None = None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    n = len(x) if index is None else len(index)
    found, wanted = (outputs(n, x.shape[1], dtype or x.dtype, x.device) for _ in range(2))
    ops.stage(x, index, *found)
    stage_ref(x, index, *wanted)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-13, atol=0)
    assert torch.equal(found[2], wanted[2])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 17, 65, 100, 384, 5000])
def test_equals_float64(device: torch.device, dtype: torch.dtype, dim: int) -> None:
    for n in (1, 31, 33):
        x = rows_of(n, dim, dtype, device)
        x[0, dim // 2] = torch.nan
        x[n // 2, -1] = -torch.inf
        agree(x)
        agree(x, torch.tensor([n - 1, 0, n // 2, 0, n - 1], device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [65, 100, 128])
def test_rows_too_wide_to_hold(
    device: torch.device, dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "STAGE_WIDEST", 32 * dtype.itemsize)
    monkeypatch.setattr(staging, "STAGE_BYTES", 64 * dtype.itemsize)
    monkeypatch.setattr(staging, "STAGE_LANE", dtype.itemsize)
    x = rows_of(5, dim, dtype, device)
    x[1, 0], x[3, -1] = torch.inf, torch.nan
    finite = agree(x, torch.tensor([4, 3, 2, 1, 0], device=device))[2]
    assert finite.tolist() == [True, False, True, False, True]


def test_literal(device: torch.device) -> None:
    x = torch.tensor([[3.0, 4.0], [torch.nan, 1.0], [0.0, -2.0], [torch.inf, 0.0]], device=device)
    rows, norms, finite = outputs(5, 2, torch.float32, device)
    ops.stage(x, torch.tensor([2, 0, 1, 3, 0], device=device), rows, norms, finite)
    assert rows.tolist() == [[0, -2], [3, 4], [0, 0], [0, 0], [3, 4]]
    assert norms.tolist() == [2, 5, 0, 0, 5]
    assert finite.tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("dtype", "large"),
    [(torch.bfloat16, 3e38), (torch.float16, 65504.0), (torch.float32, 3.4e38), (torch.float64, 1e150)],
)
def test_squares_do_not_overflow(device: torch.device, dtype: torch.dtype, large: float) -> None:
    x = torch.full((3, 64), large, dtype=dtype, device=device)
    x[1] = -x[1]
    norms, finite = agree(x)[1:]
    assert bool(finite.all())
    torch.testing.assert_close(norms, x.double().abs()[:, 0] * 8, rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, under the interpreter
def test_finite_float64_rows_whose_norm_overflows_are_kept(device: torch.device) -> None:
    x = torch.full((2, 3), 1e200, dtype=torch.float64, device=device)
    x[1, 0] = torch.inf
    rows, norms, finite = agree(x)
    assert finite.tolist() == [True, False]
    assert norms.tolist() == [torch.inf, 0]
    assert rows[0].tolist() == [1e200] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_small_numbers_and_zeros_are_kept(device: torch.device, dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([[tiny, tiny / 4, -0.0], [0.0, -0.0, 0.0]], dtype=dtype, device=device)
    rows = agree(x)[0]
    assert torch.equal(rows.signbit(), x.signbit())


@pytest.mark.parametrize(("given", "held"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float64)])
def test_into_rows_of_a_wider_dtype(device: torch.device, given: torch.dtype, held: torch.dtype) -> None:
    x = rows_of(9, 20, given, device)
    x[4, 4], x[7, 0] = torch.nan, -torch.inf
    agree(x, dtype=held)


@pytest.mark.filterwarnings("ignore:overflow")
def test_what_the_rows_dtype_cannot_hold_is_still_finite(device: torch.device) -> None:
    x = torch.tensor([[1e38, 1.0], [torch.nan, 1.0]], device=device)
    norms, finite = agree(x, dtype=torch.float16)[1:]
    assert finite.tolist() == [True, False]
    assert norms.tolist() == [torch.inf, 0]


@pytest.mark.parametrize("view", ["offset", "strided", "transposed", "expanded", "sliced outputs", "strided outputs"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_views_are_bitwise_their_copies(device: torch.device, dtype: torch.dtype, view: str) -> None:
    n, dim = 12, 40
    x = rows_of(n, dim, dtype, device)
    x[3, 3] = torch.nan
    wide = torch.full((2 * n, dim + 5), torch.nan, dtype=dtype, device=device)
    if view == "offset":
        wide[:n, 3 : dim + 3] = x
        agree(wide[:n, 3 : dim + 3], torch.arange(n, device=device).flip(0))
    elif view == "strided":
        wide[::2, :dim] = x
        agree(wide[::2, :dim])
    elif view == "transposed":
        agree(x.T.contiguous().T)
    elif view == "expanded":
        agree(x[:1].expand(n, dim))
        agree(x, torch.arange(2 * n, device=device)[::2] // 2)
    else:
        wanted = agree(x)
        if view == "sliced outputs":
            rows, norms, finite = wide[:n, 2 : dim + 2], wide.new_zeros(n, dtype=torch.float64), wide.new_zeros(n) > 0
        else:
            rows = wide.new_zeros(dim, n).T
            norms, finite = wide.new_zeros(n, 2, dtype=torch.float64)[:, 1], (wide.new_zeros(n, 3) > 0)[:, 1]
        ops.stage(x, None, rows, norms, finite)
        for a, b in zip((rows, norms, finite), wanted, strict=True):
            assert torch.equal(a, b)
        if view == "sliced outputs":
            assert bool(wide[n:].isnan().all() & wide[:, :2].isnan().all() & wide[:, dim + 2 :].isnan().all())


def test_no_rows(device: torch.device) -> None:
    agree(rows_of(0, 5, torch.float32, device))
    agree(rows_of(4, 5, torch.float32, device), torch.zeros(0, dtype=torch.int64, device=device))


@pytest.mark.parametrize("dim", [7, 600])
def test_a_row_is_the_same_in_any_company(device: torch.device, dim: int) -> None:
    x = rows_of(20, dim, torch.bfloat16, device)
    whole = agree(x)
    alone = agree(x[13:14])
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[13:14], b)


COMPILED = r"""
import dataclasses, re
from emocore import aot

factors = "(4104|4112|4120|8208|8224|8240)"  # of an offset, in numbers or bytes
for variant in aot.variants("staging"):
    dim, name = variant.constants["D"], variant.types["x_ptr"]
    if dim not in ((384, 4096) if "bf16" in name else (8192,)) or "fp16" in name:
        continue
    for arch in aot.ARCHITECTURES if dim == 4096 else (90,):
        built = aot.build(variant, arch)
        assert built.spilled == 0 and built.registers <= 64, built
        assert re.search(r"ld\.global[.\w:]*v(4\.b32|2\.b64)", built.ptx), built.name
        assert re.search(r"st\.global[.\w:]*v(4\.b32|2\.b64)", built.ptx), built.name
    if dim == 4096:
        odd = {**variant.constants, "D": 4104, "X_STRIDE": 4112, "ROWS_STRIDE": 4120}
        ptx = aot.build(dataclasses.replace(variant, constants=odd), 90).ptx
        assert len(re.findall(rf"m(?:ul|ad)\.(?:wide\.[su]32|lo\.[su]64)[^;]*, {factors}\b", ptx)) >= 2
        assert not re.search(rf"m(ul|ad)\.lo\.[su]32[^;]*, {factors}\b", ptx)
"""


def test_it_compiles_without_spills_and_with_wide_accesses_and_offsets(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
