"""Triton kernels without a GPU: under the interpreter, and compiled ahead of time."""

import os
import subprocess
import sys

import pytest

INTERPRETED = """
import torch
from emocore.kernels.steering import steer_add, steer_add_
for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16):
    for rows, dim in ((0, 3), (1, 1), (3, 17), (2, 2049), (5, 4100)):
        x, delta = torch.randn(rows, dim, dtype=torch.float64).to(dtype), torch.randn(dim)
        expected = (x.double() + delta.double()).to(dtype)
        # the interpreter truncates to bfloat16 where the hardware rounds to nearest
        ulp = 2 ** -7 if dtype == torch.bfloat16 else torch.finfo(dtype).eps
        found = steer_add(x, delta)
        torch.testing.assert_close(found, expected, rtol=ulp, atol=1e-30)
        wide = torch.zeros(rows, dim + 5, dtype=dtype)
        wide[:, 2 : dim + 2] = x
        steer_add_(wide[:, 2 : dim + 2], delta)
        assert torch.equal(wide[:, 2 : dim + 2], found) and not wide[:, :2].any() and not wide[:, dim + 2 :].any()
        across = x.T.contiguous().T
        steer_add_(across, delta)
        assert torch.equal(across, found)
"""

COMPILED = """
import re, sys, triton
from triton.backends.compiler import GPUTarget
from emocore.kernels._tiles import STEER_BLOCK, STEER_WARPS
from emocore.kernels.steering import steer_add_kernel
types = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "fp64": "*fp64"}
for name, pointer in types.items():
    for capability in (80, 90, 100):
        signature = {"x_ptr": pointer, "delta_ptr": "*fp32", "out_ptr": pointer, "rows": "i32",
                     "x_stride": "i64", "out_stride": "i64", "D": "constexpr", "BLOCK_D": "constexpr"}
        source = triton.compiler.ASTSource(steer_add_kernel, signature, {"D": 4096, "BLOCK_D": STEER_BLOCK})
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": STEER_WARPS})
        assert built.asm["cubin"]
        ptx = built.asm["ptx"]
        assert "ld.local" not in ptx and "st.local" not in ptx, "spills"
        assert built.metadata.shared <= 227 * 1024
        assert "mul.wide.s32" not in ptx or "mul.lo.s64" in ptx, "row offsets must be 64 bit"
        if name == "bf16":
            assert "cvt.rn.bf16" in ptx, "one rounding, to nearest"
"""


def run(code: str, **env: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("code", [INTERPRETED], ids=["steer_add"])
def test_interpreted_kernel_equals_float64(code: str) -> None:
    run(code, TRITON_INTERPRET="1")


@pytest.mark.parametrize("code", [COMPILED], ids=["steer_add"])
def test_kernel_compiles_for_every_architecture(code: str, tmp_path) -> None:
    run(code, TRITON_CACHE_DIR=str(tmp_path))
