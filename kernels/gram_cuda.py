"""The gram of csrc/gram_cuda.cu, compiled by nvcc for sm_90a, where its cubin is there and loaded (emocore/aot.py)."""

import functools

import torch
from torch import Tensor

from .. import native
from ._launch import current_stream

HANDLES: dict[tuple[int, int], int] = {}  # of the driver, by device and parts of y


CHAIN = 512  # rows; half with two parts


def fold_gram(y: Tensor, cursor: Tensor, block: int, exponent: Tensor, tiles: Tensor, chain: int) -> bool:
    """tiles [S, T, 128, 128] += the lower tiles of the block y [S, P, block, D] (docs/gpu.md); False where it cannot.

    It needs D divisible by 8 and 16-byte alignment.
    """
    hooks, parts, _, dim = y.shape
    device = y.get_device()
    handle = HANDLES.get((device, parts))
    if handle is None or chain * parts != CHAIN or dim % 8 or not y.is_contiguous() or y.data_ptr() % 16:
        return False
    driver = native.extension()
    grid = driver.gram_cuda_grid(hooks, dim, _multiprocessors(device))
    arguments = (_map(y.data_ptr(), hooks, parts, block, dim), exponent, cursor, tiles, hooks, block, dim)
    return bool(driver.driver_launch((handle,), (grid,), current_stream(device), arguments))


@functools.lru_cache(maxsize=256)
def _map(address: int, hooks: int, parts: int, block: int, dim: int) -> bytes:
    return bytes(native.extension().gram_cuda_map(address, hooks, parts, block, dim))


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
