"""Which rows a conditional edit is for, on a GPU: the slot of each row whose scores exceed the levels of its slot."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from emocore.reference_steering import rows_per_slot, steer_slots_ref

from ._launch import Variant, launch
from ._tiles import SLOT_ROWS
from .project import project
from .steering import slot_of, variant_of


@triton.jit(do_not_specialize=["n", "share", "S", "W"])
def slots_kernel(scores_ptr, slots_ptr, levels_ptr, out_ptr, n, share, S, W, scores_stride, ROWS: tl.constexpr):
    """out[r] = slots[r // share] where all scores[r, w] > levels[slot, w], else 0; scores: [n, W], levels: [S, W]."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    slot = slot_of(slots_ptr, rows, inside, share, S)
    on = slot > 0
    for w in range(W):
        score = tl.load(scores_ptr + rows * scores_stride + w, mask=inside, other=0.0)
        on = on & (score > tl.load(levels_ptr + slot * W + w))
    tl.store(out_ptr + rows, tl.where(on, slot, 0), mask=inside)


def steer_slots(x: Tensor, slots: Tensor, readers: Tensor, levels: Tensor) -> Tensor:
    """The slot [N] of each row whose scores all exceed its slot's levels, else 0."""
    if x.dtype == torch.float64:
        return steer_slots_ref(x, slots, readers, levels)
    n = len(x)
    out = torch.empty(n, dtype=torch.int32, device=x.device)
    scores = project(x, readers.float(), None, False)
    launch(
        slots_kernel,
        (triton.cdiv(n, SLOT_ROWS),),
        scores,
        slots,
        levels.float().contiguous(),
        out,
        n,
        rows_per_slot(n, slots),
        len(levels),
        len(readers),
        scores.stride(0),
        ROWS=SLOT_ROWS,
    )
    return out


def variants() -> Iterator[Variant]:
    """Scores in float32."""
    types = {"scores_ptr": "*fp32", "slots_ptr": "*i32", "levels_ptr": "*fp32", "out_ptr": "*i32", "n": "i32"}
    types |= {"share": "i32", "S": "i32", "W": "i32", "scores_stride": "i64"}
    yield variant_of(slots_kernel, types, {"ROWS": SLOT_ROWS}, 4)
