"""How the work of a projection is cut into tiles, by how much of it there is."""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._tiles import PROJECT, PROJECT_FROM


class Tile(NamedTuple):
    """How the work is cut: rows and columns of a step, readers of a program (head + tail), programs abreast, stages."""

    rows: int
    block_d: int
    head: int
    tail: int
    groups: int
    warps: int
    stages: int


def tile_of(form: str, k: int, parts: int, dtype: torch.dtype) -> Tile:
    """The tile of a form of the tuning table; readers are padded to 16, 32, 64, 128, 128 + 32 or 128 + 64."""
    rows, block_d, most, warps, stages = PROJECT[form]
    groups = triton.cdiv(k, most)
    width = triton.cdiv(k, groups)
    head = min(max(triton.next_power_of_2(width), 16), 128)
    tail = 0 if width <= 128 else 32 if width <= 160 else 64
    if dtype == torch.float32:
        block_d //= 2
    return Tile(rows, block_d, head, tail, groups, warps, max(2, stages - parts + 1))


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def form_of(x: Tensor, plain: bool) -> str:
    """Which form serves x [S, n, D]: the more rows, the larger its tiles."""
    if x.shape[1] <= PROJECT_FROM["low"]:
        return "short"
    rows = x.shape[0] * x.shape[1]
    if x.dtype == torch.float32 or rows <= PROJECT_FROM["tall"]:
        return "low"
    return "wide" if plain and rows > PROJECT_FROM["wide"] and _major(x.device) >= 9 else "tall"
