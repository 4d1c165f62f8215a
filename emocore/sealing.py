"""Sealing: the open shards of many hook points and the indexes of their rows, finished, synced and named."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from torch import Tensor

from .feeds import Feed
from .manifest import Index, Rows
from .places import packed
from .shards import Draft

SYNCS = 8  # at a time: a journal takes those that come together for the price of one


class Sealing:
    """Shards on their way into the next manifest; `new(kind, place)` begins one. `abandon` undoes it at any point."""

    def __init__(self, feeds: Sequence[Feed], requests: Sequence[str], new: Callable[[str, int], Draft]) -> None:
        self.rows: list[Rows] = []
        self.indexes: dict[tuple[int, int], Index] = {}  # by table and number of rows
        self._feeds, self._requests, self._new = feeds, requests, new
        self._drafts: list[Draft] = []

    def finish(self) -> None:
        """Write and sync all that is pending, with one index for all hook points that hold the same rows."""
        for place, feed in enumerate(self._feeds):
            if feed.draft is None or not feed.pending:
                continue
            key = (id(feed.growing), feed.pending)
            if key not in self.indexes:
                self.indexes[key] = self._index(feed.growing.first(feed.pending))
            shard = Rows(feed.draft.file, place, feed.pending, 0, self.indexes[key].file)
            self._drafts.append(feed.draft)
            self.rows.append(replace(shard, crc32c=feed.draft.finish(shard.layout(feed.point()))))
        self._sync()

    def _sync(self) -> None:
        # where no thread can be started, as when the interpreter ends, one after the other
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(SYNCS) as pool:
            list(pool.map(Draft.sync, self._drafts))
            return
        for draft in self._drafts:
            draft.sync()

    def name(self) -> None:
        """Give every shard the name that the manifest will list."""
        for draft in self._drafts:
            draft.seal()

    def abandon(self) -> None:
        """Remove what was written, whatever its name is."""
        for draft in self._drafts:
            draft.abandon()

    def _index(self, where: Tensor) -> Index:
        tensors = packed(where, self._requests)
        draft = self._new("index", len(self.indexes))
        self._drafts.append(draft)
        for t in tensors.values():
            draft.append(t)
        index = Index(draft.file, len(where), len(tensors["request_ends"]), len(tensors["request_names"]), 0)
        return replace(index, crc32c=draft.finish(index.layout))
