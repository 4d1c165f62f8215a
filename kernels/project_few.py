"""Scores on a few readers on a GPU: a tile of whole rows stays in registers while every reader passes over it."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant, launch
from ._tiles import FEW_ELEMENTS, FEW_PROGRAMS, WIDTHS
from .steering import variant_of, warps_for


@triton.jit(do_not_specialize=["n", "K"])
def project_few_kernel(
    x_ptr,
    packed_ptr,
    offset_ptr,
    centre_ptr,
    count_ptr,
    out_ptr,
    n,
    K,
    D,
    x_station,
    x_stride,
    out_station,
    out_stride,
    PARTS: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[s, r, k] = x[s, r] . sum_p packed[s, p, k] + offset[s, k], over |x - c| where NORMALISE; float32 throughout.

    x: [stations, n, D], packed: [stations, PARTS, K, D], offset: [stations, K], out: [stations, n, >= K]. Rows from
    count[0] on are left out.
    """
    station = tl.program_id(1).to(tl.int64)
    if count_ptr is not None:
        n = tl.minimum(tl.load(count_ptr), n).to(tl.int32)
        if tl.program_id(0) * ROWS >= n:
            return
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < n
    mask = inside[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + station * x_station + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if NORMALISE:
        z = x
        if centre_ptr is not None:
            z = x - tl.load(centre_ptr + cols, mask=cols < D, other=0.0)[None, :]
        square = tl.sum(z * z, 1)
        scale = tl.where(square > 0, 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0)), 0.0)
        scale = tl.where(square < float("inf"), scale, float("nan"))  # too long for float32
    for k in range(K):
        v = tl.zeros([BLOCK_D], tl.float32)
        for p in tl.static_range(PARTS):
            at = packed_ptr + ((station * PARTS + p) * K + k) * D + cols
            v += tl.load(at, mask=cols < D, other=0.0).to(tl.float32)
        score = tl.sum(x * v[None, :], 1) + tl.load(offset_ptr + station * K + k)
        tl.store(out_ptr + station * out_station + rows * out_stride + k, score * scale, mask=inside)


def project_few(
    x: Tensor, packed: Tensor, offset: Tensor, normalise: bool, centre: Tensor | None, count: Tensor | None, out: Tensor
) -> None:
    """Launch on x [S, n, D] with unit column stride."""
    (stations, n, dim), (parts, k) = x.shape, packed.shape[1:3]
    block = triton.next_power_of_2(dim)
    tall = min(FEW_ELEMENTS // block, triton.next_power_of_2(max(1, triton.cdiv(stations * n, FEW_PROGRAMS))))
    launch(
        project_few_kernel,
        (triton.cdiv(n, tall), stations),
        x,
        packed,
        offset,
        centre,
        count,
        out,
        n,
        k,
        dim,
        *x.stride()[:2],
        *out.stride()[:2],
        PARTS=parts,
        NORMALISE=normalise,
        ROWS=tall,
        BLOCK_D=block,
        warps=warps_for(tall * block),
    )


def variants() -> Iterator[Variant]:
    """bfloat16 rows one a program, readers in two parts of their own and in one of float32."""
    types = {"x_ptr": "*bf16:16", "packed_ptr": "*bf16:16", "offset_ptr": "*fp32", "out_ptr": "*fp32:16", "n": "i32"}
    types |= {"K": "i32", "D": "i32:16", "x_station": "i64:16", "x_stride": "i64:16"}
    types |= {"out_station": "i64", "out_stride": "i64"}
    for block in sorted({triton.next_power_of_2(dim) for dim in WIDTHS}):
        for readers, parts in (("*bf16:16", 2), ("*fp32:16", 1)):
            tile = {"PARTS": parts, "NORMALISE": False, "ROWS": 1, "BLOCK_D": block}
            yield variant_of(project_few_kernel, types | {"packed_ptr": readers}, tile, warps_for(block))
