"""Packing: readers as tensor cores multiply them, in one or more parts of the rows' own dtype that add up to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NOISE_LIMIT = 1e-3  # rounding noise of packed readers against the spread of their scores
MOST_PARTS = 3
UNKNOWN_PARTS = 2  # where no covariance tells the noise


class Packed(NamedTuple):
    """Readers [P, K, D] in parts, and offset [K] float32 = -c.v of what the parts add up to."""

    readers: Tensor
    offset: Tensor


def pack(readers: Tensor, centre: Tensor | None, dtype: torch.dtype, parts: int = UNKNOWN_PARTS) -> Packed:
    """Readers [K, D] about a centre [D], for rows of `dtype`."""
    packed = split(readers, dtype, parts)
    return Packed(packed, offset(packed, centre))


def split(readers: Tensor, dtype: torch.dtype, parts: int = UNKNOWN_PARTS) -> Tensor:
    """Readers [K, D] as parts [P, K, D] of a 16-bit dtype, each what the ones before it left; else as one part.

    >>> split(torch.tensor([[1 + 2**-9]]), torch.bfloat16).flatten().tolist()
    [1.0, 0.001953125]
    """
    if dtype in (torch.float32, torch.float64):
        return readers.to(dtype)[None]
    rest, found = readers.double(), []
    for _ in range(parts):
        found.append(rest.to(dtype))
        rest = rest - found[-1].double()
    return torch.stack(found)


def offset(packed: Tensor, centre: Tensor | None) -> Tensor:
    """-c.v [K] float32 (float64 for float64 readers) of packed readers [P, K, D]."""
    wide = torch.float64 if packed.dtype == torch.float64 else torch.float32
    if centre is None:
        return packed.new_zeros(packed.shape[1], dtype=wide)
    return -(packed.double().sum(0) @ centre.double()).to(wide)


def parts_for(readers: Tensor, covariance: Tensor, dtype: torch.dtype) -> int:
    """Fewest parts whose rounding e adds noise sqrt(e'Ce) of at most 1e-3 of sqrt(v'Cv) to the scores of v [K, D]."""
    v = readers.double()
    spread = _spread(v, covariance).clamp_min(torch.finfo(torch.float64).tiny)
    for parts in range(1, MOST_PARTS):
        error = v - split(v, dtype, parts).double().sum(0)
        if float((_spread(error, covariance) / spread).max()) <= NOISE_LIMIT:
            return parts
    return MOST_PARTS


def parts_by_dtype(readers: Tensor, covariance: Tensor) -> dict[str, int]:
    """The same for rows of either 16-bit dtype, by its name."""
    return {name: parts_for(readers, covariance, getattr(torch, name)) for name in ("bfloat16", "float16")}


def _spread(v: Tensor, covariance: Tensor) -> Tensor:
    return ((v @ covariance) * v).sum(1).clamp_min(0).sqrt()
