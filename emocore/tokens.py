"""Which positions of a batch count, and how they pool into rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError, ShapeError, TokenError

POOLS = (None, "mean", "last", "max")

# One sequence's named spans: {"assistant": [(start, stop), ...]}, ranks of real tokens from 0, half open.
Spans = Mapping[str, Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Tokens:
    """Token rule of a sink: skip a sequence's first `skip` real tokens, keep those in span `span`, pool the rest.

    Ranks count real tokens, special tokens included, whatever the padding side; `skip=49` is the paper's "from the
    50th". `span` names spans that `tap.batch(spans=...)` gives, such as a chat role. `pool` is None (a row a token),
    "mean", "last" or "max" (a float32 row a sequence). Raises ArgumentError.

    >>> Tokens(skip=49, pool="mean")
    Tokens(skip=49, pool='mean', span=None)
    """

    skip: int = 0
    pool: str | None = None
    span: str | None = None

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise ArgumentError("pool", expected="None, 'mean', 'last' or 'max'", got=repr(self.pool))
        if isinstance(self.skip, bool) or not isinstance(self.skip, int) or self.skip < 0:
            raise ArgumentError("skip", expected="a count of tokens >= 0", got=repr(self.skip))

    def as_dict(self) -> dict[str, Any]:
        """The rule as JSON-ready fields."""
        return asdict(self)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one forward stand, position by position of the flattened `shape`, (B, T) or (N,).

    sequence [N] int64: which sequence of the batch; rank [N] int64: 0-based among its real tokens, over all it has
    been shown; real [N] bool; seen [B] int64: how many ranks earlier forwards of the same batch have shown.
    """

    shape: tuple[int, ...]
    sequence: Tensor
    rank: Tensor
    real: Tensor
    seen: Tensor
    ranked: bool = True  # False for plain rows, which have no place in a sequence

    @property
    def sequences(self) -> int:
        """How many sequences the batch has."""
        return len(self.seen)

    def shown(self) -> Tensor:
        """Ranks shown per sequence after this forward [B] int64."""
        return self.seen.scatter_reduce(0, self.sequence, torch.where(self.real, self.rank + 1, 0), "amax")


@dataclass(frozen=True)
class Selection:
    """What a rule keeps of a layout: `index` [n] of the flattened positions, their `sequence` [n], what fell away.

    `counted` [n] marks the rows whose norm enters the mean norm: all but the first real token of a sequence, which is
    the BOS or the attention sink.
    """

    index: Tensor
    sequence: Tensor
    counted: Tensor
    offered: int
    masked: int
    skipped: int
    reseen: int


def select(layout: Layout, rule: Tokens, spans: Sequence[Spans] | None = None) -> Selection:
    """Apply `rule` to `layout`; raises TokenError where the rule needs ranks or spans that are not there."""
    if rule.skip and not layout.ranked:
        raise TokenError(
            "skip: plain rows [N, D] have no place in a sequence",
            way_out="Give tap.batch(cu_seqlens=...) for packed sequences, or use skip=0.",
        )
    fresh = layout.real & (layout.rank >= layout.seen[layout.sequence])
    keep = fresh & (layout.rank >= rule.skip)
    if rule.span is not None:
        keep &= _in_span(layout, rule.span, spans)
    index = keep.nonzero().squeeze(1)
    real, new, kept = (int(m.sum()) for m in (layout.real, fresh, keep))
    return Selection(
        index=index,
        sequence=layout.sequence[index],
        counted=layout.rank[index] > 0 if layout.ranked else torch.ones_like(index, dtype=torch.bool),
        offered=layout.real.numel(),
        masked=layout.real.numel() - real,
        skipped=new - kept,
        reseen=real - new,
    )


def _in_span(layout: Layout, name: str, spans: Sequence[Spans] | None) -> Tensor:
    if spans is None:
        raise TokenError(
            f"span {name!r}: the batch names no spans",
            way_out="Open tap.batch(spans=[{name: [(start, stop)]}, ...]), one mapping a sequence.",
        )
    if len(spans) != layout.sequences:
        raise ShapeError("spans", expected=f"{layout.sequences} mappings, one a sequence", got=len(spans))
    inside = torch.zeros_like(layout.real)
    for b, named in enumerate(spans):
        for start, stop in named.get(name, ()):
            inside |= (layout.sequence == b) & (layout.rank >= start) & (layout.rank < stop)
    return inside


def padded_layout(shape: tuple[int, int], mask: Tensor | None, past: int, seen: Tensor | None) -> Layout:
    """Layout of a padded batch [B, T]: `mask` [B, >= T] covers all that was shown so far, its last T columns this call.

    Without a mask all tokens count, from rank `past` on. Raises ShapeError for a mask that does not fit.
    """
    b, t = shape
    if mask is None:
        real = torch.ones(b, t, dtype=torch.bool)
        rank = (past + torch.arange(t)).expand(b, t)
    else:
        if mask.dim() != 2 or mask.shape[0] != b or mask.shape[1] < t:
            raise ShapeError(
                "attention_mask",
                expected=f"[{b}, {t}], or [{b}, past + {t}] while decoding",
                got=list(mask.shape),
                way_out="Give the 2-D padding mask of the tokens, not the 4-D attention bias.",
            )
        every = mask.detach().to("cpu") != 0
        start = mask.shape[1] - t
        rank = (every.long().cumsum(1) - 1)[:, start:]
        real = every[:, start:]
    return Layout(
        shape=shape,
        sequence=torch.arange(b).repeat_interleave(t),
        rank=rank.reshape(-1),
        real=real.reshape(-1),
        seen=_seen(seen, b),
    )


def without_stops(layout: Layout, ids: Tensor, start: int, stops: Collection[int]) -> Layout:
    """`layout` with the stop ids [B, T] from column `start` on taken for padding.

    `generate` goes on feeding them, unmasked, to the rows of a batch that have ended before the others.
    """
    if not stops:
        return layout
    ended = torch.isin(ids.detach().to("cpu"), torch.tensor(sorted(stops)))
    ended[:, :start] = False
    return replace(layout, real=layout.real & ~ended.reshape(-1))


def packed_layout(rows: int, cu_seqlens: Tensor, seen: Tensor | None) -> Layout:
    """Layout of packed sequences [N]: sequence i stands at cu_seqlens[i] .. cu_seqlens[i+1]; the rest is padding."""
    cu = cu_seqlens.detach().to("cpu", torch.long)
    if cu.dim() != 1 or len(cu) < 1 or int(cu[0]) != 0 or bool((cu.diff() < 0).any()) or int(cu[-1]) > rows:
        raise ShapeError("cu_seqlens", expected=f"[S + 1] rising from 0 to at most {rows}", got=cu.tolist()[:8])
    lengths = cu.diff()
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    rank = torch.arange(int(cu[-1])) - cu[:-1].repeat_interleave(lengths)
    tail = rows - len(sequence)
    zeros = torch.zeros(tail, dtype=torch.long)
    return Layout(
        shape=(rows,),
        sequence=torch.cat([sequence, zeros]),
        rank=torch.cat([rank, zeros]),
        real=torch.arange(rows) < int(cu[-1]),
        seen=_seen(seen, len(lengths)),
    )


def _seen(seen: Tensor | None, sequences: int) -> Tensor:
    if seen is None:
        return torch.zeros(sequences, dtype=torch.long)
    if len(seen) != sequences:
        raise ShapeError(
            "tap.batch: its forwards show different numbers of sequences",
            expected=len(seen),
            got=sequences,
            way_out="Open one tap.batch for each batch of sequences.",
        )
    return seen


def plain_layout(rows: int) -> Layout:
    """Layout of plain rows [N, D]: every row is real, its own sequence, and without a rank."""
    every = torch.arange(rows)
    return Layout(
        shape=(rows,),
        sequence=every,
        rank=torch.zeros(rows, dtype=torch.long),
        real=torch.ones(rows, dtype=torch.bool),
        seen=torch.zeros(rows, dtype=torch.long),
        ranked=False,
    )
