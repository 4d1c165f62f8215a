"""Tracking: running statistics of many sequences at once, one slot each, in closed form over the tokens of a step."""

from __future__ import annotations

from collections import OrderedDict, deque

import torch
from torch import Tensor

from .calibration import STATISTICS

CHUNK = 64  # tokens whose EMA is one triangular product


class Tracks:
    """State of up to `limit` sequences by name; beyond it, the one unseen for longest is forgotten.

    Per slot: tokens read [S]; EMA [S, K]; the last window - 1 scores [S, window - 1, K], zeros before the first;
    largest value of every statistic [3, S, K]; which of `alarms` rules are active [S, R]; and the statistics of the
    last `history` tokens.
    """

    def __init__(self, k: int, alarms: int, alpha: float, window: int, history: int, limit: int) -> None:
        self.alpha, self.window, self._history, self._limit = alpha, window, history, limit
        self.slots: OrderedDict[str, int] = OrderedDict()
        self.evicted = 0
        self.tokens = torch.zeros(0, dtype=torch.int64)
        self.ema = torch.zeros(0, k, dtype=torch.float64)
        self.recent = torch.zeros(0, window - 1, k, dtype=torch.float64)
        self.largest = torch.zeros(3, 0, k, dtype=torch.float64)
        self.active = torch.zeros(0, alarms, dtype=torch.bool)
        self.kept: list[deque[Tensor]] = []

    def slot(self, name: str) -> int:
        """The slot of a sequence, now the last seen; a new one starts from nothing."""
        if name not in self.slots:
            self.slots[name] = self._new()
        self.slots.move_to_end(name)
        return self.slots[name]

    def _new(self) -> int:
        if len(self.slots) >= self._limit:
            slot = self.slots.popitem(last=False)[1]
            self.evicted += 1
        else:
            slot = len(self.slots)
            if slot == len(self.tokens):
                self._grow(min(self._limit, max(16, 2 * slot)))
        for state in (self.tokens, self.ema, self.recent, self.active):
            state[slot] = 0
        self.largest[:, slot] = -torch.inf
        self.kept[slot].clear()
        return slot

    def _grow(self, size: int) -> None:
        for name in ("tokens", "ema", "recent", "active"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(size - len(old), *old.shape[1:])]))
        missing = self.largest.new_zeros(3, size - self.largest.shape[1], self.largest.shape[2])
        self.largest = torch.cat([self.largest, missing], 1)
        self.kept += [deque() for _ in range(size - len(self.kept))]

    def step(self, at: Tensor, z: Tensor, n: Tensor) -> Tensor:
        """Advance slots at [S] over scores z [S, n, K], of which the first n [S] are theirs and the rest zeros.

        Returns every statistic at every token [3, S, n, K], in the order of STATISTICS; NaN past a sequence's end.
        """
        values = torch.stack([z, self._averaged(at, z), self._windowed(at, z, n)])
        past = torch.arange(z.shape[1]) >= n[:, None]
        self.largest[:, at] = self.largest[:, at].maximum(values.masked_fill(past[..., None], -torch.inf).amax(2))
        self.ema[at] = values[STATISTICS.index("ema"), torch.arange(len(at)), n - 1]
        self.tokens[at] += n
        values.masked_fill_(past[..., None], torch.nan)
        if self._history:
            for i, slot in enumerate(at.tolist()):
                self._keep(self.kept[slot], values[:, i, : int(n[i])])
        return values

    def _averaged(self, at: Tensor, z: Tensor) -> Tensor:
        """y_t = (1 - a) y_(t-1) + a z_t [S, n, K]: by chunks, a triangle of decays times z, plus the old y's rest."""
        t = torch.arange(CHUNK, dtype=torch.float64)
        decay = self.alpha * ((1 - self.alpha) ** (t[:, None] - t).clamp_min(0)).tril()
        fade = ((1 - self.alpha) ** (t + 1))[:, None]
        last, parts = self.ema[at], []
        for part in z.split(CHUNK, 1):
            m = part.shape[1]
            parts.append(decay[:m, :m] @ part + fade[:m] * last[:, None])
            last = parts[-1][:, -1]
        return torch.cat(parts, 1)

    def _windowed(self, at: Tensor, z: Tensor, n: Tensor) -> Tensor:
        """Mean of the last `window` scores [S, n, K], of all of them where there are fewer."""
        run = torch.cat([self.recent[at], z], 1)
        sums = torch.cat([run.new_zeros(len(at), 1, run.shape[2]), run.cumsum(1)], 1)
        seen = self.tokens[at][:, None] + torch.arange(1, z.shape[1] + 1)
        ends = n[:, None] + torch.arange(self.window - 1)
        self.recent[at] = run.gather(1, ends[..., None].expand(-1, -1, run.shape[2]))
        return (sums[:, self.window :] - sums[:, : z.shape[1]]) / seen.clamp_max(self.window)[..., None]

    def _keep(self, kept: deque[Tensor], values: Tensor) -> None:
        kept.append(values[:, -self._history :].clone())
        while sum(part.shape[1] for part in kept) - kept[0].shape[1] >= self._history:
            kept.popleft()

    def trace(self, name: str) -> Tensor | None:
        """Every statistic at the last `history` tokens of a sequence [3, n, K]; None where nothing is kept."""
        kept = self.kept[self.slots[name]] if name in self.slots else None
        return torch.cat(list(kept), 1)[:, -self._history :] if kept else None
