"""Sums of products as Hopper's tensor cores make them, on any CPU.

An instruction adds K = 16 products of 16-bit numbers to a float32 accumulator. The products are exact; they and the
accumulator are cut, toward zero, to multiples of 2^(e - 25), 2^e being the leading bit of the largest of them; their
sum is exact, and cut toward zero to float32. Order within an instruction does not matter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

K = 16  # products of an instruction
FRACTION = 25  # bits kept under the leading bit of the largest summand
LEADING = np.int64(0x7FF << 52)  # the bits of a float64 that say its leading bit
FLOAT32 = ~np.int64((1 << 29) - 1)  # and those that a float32 has too

Array = NDArray[np.float64]


def chain(a: Array, b: Array) -> Array:
    """Sums [C] over the rows of a, b [n, C], n a multiple of 16: one instruction after the other."""
    total = np.zeros(a.shape[1:])
    for start in range(0, len(a), K):
        products = a[start : start + K] * b[start : start + K]
        top = np.maximum(np.maximum(products.max(0), -products.min(0)), np.abs(total))
        unit = (np.maximum(top, 1e-30).view(np.int64) & LEADING).view(np.float64) * 2.0**-FRACTION
        products *= 1 / unit
        total = (np.trunc(products, out=products).sum(0) + np.trunc(total / unit)) * unit
        total = (total.view(np.int64) & FLOAT32).view(np.float64)
    return total


def gram(a: Array, b: Array, rows: int, block: int) -> Array:
    """Sums [N / block, C] over blocks of the rows of a, b [P, N, C], in P = 1 or 2 parts, the second times 2^11.

    Chains of `rows` rows, of the first parts and of the cross products, are summed in float32 in their order.
    """
    blocks = a.shape[1] // block

    def fold(part: Array) -> Array:
        return np.ascontiguousarray(part.reshape(-1, rows, part.shape[1]).swapaxes(0, 1)).reshape(rows, -1)

    left, right = [fold(p) for p in a], [fold(p) for p in b]
    sums = [chain(left[0], right[0])]
    if len(a) == 2:
        cross = chain(np.concatenate([left[0], left[1]]), np.concatenate([right[1], right[0]]))
        sums.append(cross / 2048)
    terms = np.stack(sums).reshape(len(sums), blocks, -1, a.shape[2]).astype(np.float32)
    total = np.zeros((blocks, a.shape[2]), np.float32)
    for i in range(terms.shape[2]):
        for term in terms:
            total += term[:, i]
    return total.astype(np.float64)
