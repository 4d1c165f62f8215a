"""The numerical contract: what is accumulated in what, and the error that this allows.

rows        multiplied in   chain   block        state     relative error of a variance, error of a correlation
float64     float64         256     32 chains    float64   1e-12
pooled      float64         256     32 chains    float64   1e-12
float32     float32         256     32 chains    float64   1e-6
bfloat16    float32 (1)     256     32 chains    float64   2e-6
float16     float32         256     32 chains    float64   2e-6

Rows are multiplied as y = x - s about a frozen per-column shift s of few bits (`sums.shift_of`), whatever the ratio of
mean to deviation; fewer than FREEZE_ROWS together in float64, as are all means, label means and label variances. The
bounds hold while max((mean - s)/std)^2 stays under OFFSET_LIMIT; `variance_bound` says what a larger offset costs. In
float32, a column that takes few values, or that few rows make up, errs more, as its roundings do not average out: by
4e-6 measured, by (CHAIN + BLOCK_CHAINS) 2^-24 = 1.7e-5 at the very worst. In float64 no column is off.

(1) Two instruction sets multiply bfloat16 rows without weights as bfloat16, where that loses nothing; everything else
in float32. Products of bfloat16 are exact in float32; those under its smallest normal number, and operands under it,
are nothing to these instructions.
- avx512_bf16 (VDPBF16PS), where shifts have at most 12 bits and four columns of five are about 0: the two products of a
  pair of rows are added to the sum one after the other, each rounded to nearest. The tree is the one above. A column
  about another shift is the sum of two bfloat16, which hold 16 bits of y, and counts as two.
- amx_bf16 (TDPBF16PS), where every shift has at most 12 bits: y is the sum of two bfloat16, which hold 16 bits of it,
  and all four products are taken. 16 even and 16 odd rows are summed apart, then together, then added to the chain; a
  chain is 512 rows, a block 16 chains. Variances err by 1e-7 about such shifts.
One bfloat16 of y alone would not do, however short s is: what it rounds does not bias a variance over ever more rows,
but over 65,536 it still moves one of 48 columns by 5e-5.
"""

from __future__ import annotations

import torch

from .errors import ArgumentError

CHAIN = 256  # consecutive rows summed in the input's accumulator
BLOCK_CHAINS = 32  # chains summed in order before they go to float64
BLOCK_ROWS = CHAIN * BLOCK_CHAINS
DEVICE_CHAIN = 512  # most consecutive rows summed in a tensor core's float32, and a divisor of every block there
DEVICE_BLOCK_ROWS = DEVICE_CHAIN * BLOCK_CHAINS
FREEZE_ROWS = 512  # fewest committed rows a shift may be frozen from
TILE = 128  # edge of the square tiles that hold the lower triangle of a scatter

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Contract bound on the relative error of a variance and on the error of a correlation, by row dtype.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}

# Offset ((mean - s)/std)^2 up to which BOUND was measured to hold; a frozen shift starts below 1/4.
OFFSET_LIMIT = 1.0


def check_dtype(dtype: torch.dtype, argument: str = "x") -> torch.dtype:
    """Return `dtype` if rows may have it, else raise ArgumentError."""
    if dtype not in FLOATS:
        raise ArgumentError(
            f"{argument}: rows must be floating point",
            expected=", ".join(str(f) for f in FLOATS),
            got=dtype,
            way_out="Convert it first, for example x.float().",
        )
    return dtype


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype` are multiplied on the CPU."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_chain(dtype: torch.dtype) -> int:
    """Consecutive rows that a tensor core sums in float32, by the rows' dtype.

    Hopper keeps 25 bits of a product: most of two 8-bit numbers, but not those of two 11-bit ones (docs/gpu.md).
    """
    return DEVICE_CHAIN if dtype == torch.bfloat16 else DEVICE_CHAIN // 2


def held(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype` wait to be multiplied: their own, but one that any later rows fit in."""
    return torch.float32 if dtype == torch.float16 else dtype


def coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The one of two row dtypes with the larger bound."""
    return max(a, b, key=BOUND.__getitem__)


def variance_bound(dtype: torch.dtype, offset: float) -> float:
    """Bound on the relative variance error at `offset` = max((mean - s)/std)^2.

    The rounding of a sum of y^2 = (x - s)^2 is relative to the second moment about s, which is (1 + offset) variances.
    """
    return BOUND[dtype] * max(1.0, (1.0 + offset) / (1.0 + OFFSET_LIMIT))
