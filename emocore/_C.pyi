# ruff: noqa: N999
"""The CPU kernels. Formulas, shapes and accumulators: emocore/precision.py and `csrc/*_cpu.h`.

A NumPy array is seen as rows of its last axis, which is contiguous; one axis is one row. The tuple
`(address, dtype, rows, cols, row_stride)` says the same of any memory, the stride in elements; a 1-D array is
`(address, dtype, 1, n, n)`. Activations are float64, float32 or bfloat16 (only as a tuple: NumPy has none).
Raises ValueError for a shape or dtype, IndexError for an index or label, before anything is written.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

TILE: int
CHAIN: int
BLOCK_CHAINS: int

Memory: TypeAlias = tuple[int, str, int, int, int]
Activations: TypeAlias = NDArray[np.float64] | NDArray[np.float32] | Memory
Reals: TypeAlias = NDArray[np.float64] | NDArray[np.float32] | Memory
Float64s: TypeAlias = NDArray[np.float64] | Memory

def stage(
    source: Activations,
    index: NDArray[np.int64] | Memory | None,
    out: Activations,
    norms: Float64s,
    finite: NDArray[np.uint8] | Memory,
    threads: int,
) -> int:
    """out[j] = source[index[j]] with its norm; a row not finite becomes zeros. Returns how many did."""

def label_sums(
    rows: Activations,
    labels: NDArray[np.int32] | Memory | None,
    weights: Float64s | None,
    shift: Float64s,
    sums: Float64s,
    squares: Float64s | None,
    threads: int,
) -> None:
    """sums[k] += w (x - shift), squares[k] += w (x - shift)^2, k the label of the row; -1 is skipped."""

def gram(
    rows: Activations,
    weights: Float64s | None,
    shift: Float64s,
    tiles: Float64s,
    threads: int,
) -> None:
    """tiles += the lower triangle of sum w (x - shift)(x - shift)', tiles [T, 128, 128] by tile rows."""

def project(
    rows: Activations,
    readers: Reals,
    centre: Float64s | None,
    normalise: bool,
    out: Reals,
    threads: int,
) -> None:
    """out[r, k] = (x_r - centre) . v_k, divided by |x_r - centre| when normalise; a zero row gives 0."""

def steer_add(rows: Activations, delta: Reals, out: Activations, threads: int) -> None:
    """out = x + delta, rounded once; out may be rows."""

def isa() -> str:
    """The instruction set in use."""

def isas() -> list[str]:
    """Those that this machine can use, narrowest first."""

def use_isa(name: str) -> None:
    """Computes with this instruction set from now on."""

def openmp() -> str:
    """Path of the OpenMP runtime whose threads are used, "" for our own."""
