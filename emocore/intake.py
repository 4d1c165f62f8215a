"""Intake: which rows a policy picks, and their way into the open shards of many feeds, off a GPU several at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .feeds import Feed
from .folders import Folder
from .ring import Offered, Policy

HANDS = 4  # copies off a GPU at a time: one thread's checksums are slower than the link


class Part(NamedTuple):
    """Rows [N, D] for a feed, and their places [N, 5]."""

    feed: Feed
    rows: Tensor
    where: Tensor


class Intake:
    """Takes rows under a policy; errors of the volume name its folder."""

    def __init__(self, policy: Policy, folder: Folder) -> None:
        self.policy, self._folder = policy, folder
        self._offers = replace(policy, p=1.0)  # to rows that are picked already
        self._hands: ThreadPoolExecutor | None = None

    def pick(self, feed: Feed, rows: Tensor, good: Tensor | None, where: Tensor) -> Part:
        """The rows that the policy picks; `good` says which are left of those that were formed, at places `where`."""
        n = len(where)
        where = where if good is None else where[good]
        if self.policy.p < 1:
            picked = self.policy.picks(feed.ledger.rows.formed - n, n)
            picked = picked if good is None else picked[good]
            feed.ledger.rows.add(sampled_out=len(rows) - int(picked.sum()))
            rows, where = rows[picked.to(rows.device)], where[picked]
        return Part(feed, rows, where)

    def offer(self, parts: Sequence[Part]) -> list[Offered | BaseException]:
        """What became of the rows of each, or its error."""
        if len(parts) < 2 or not parts[0].rows.is_cuda:
            return [self._offer(part) for part in parts]
        self._hands = self._hands or ThreadPoolExecutor(HANDS, "emocore copies", native.extension().driver_relax)
        stream = torch.cuda.current_stream(parts[0].rows.device)  # another thread has another
        return list(self._hands.map(lambda part: self._offer(part, stream), parts))

    def _offer(self, part: Part, stream: torch.cuda.Stream | None = None) -> Offered | BaseException:
        assert part.feed.draft is not None
        try:
            with self._folder.said(), contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                if stream is not None:
                    stream.query()  # gives the thread its context
                return part.feed.draft.offer(part.rows, self._offers)
        except BaseException as error:
            return error

    def close(self) -> None:
        """End its threads."""
        if self._hands is not None:
            self._hands.shutdown()
