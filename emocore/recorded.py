"""Recorded: all rows of one hook point, over the shards that hold them."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .errors import StoreError
from .manifest import DTYPES, Manifest
from .places import Places
from .shards import Layout

RUN = 8  # rows that follow each other, on average: fewer are gathered one by one


class Recorded:
    """Rows of hook point number `place`; a shard is mapped by `tensors(file, layout)` when it is first read."""

    def __init__(self, manifest: Manifest, place: int, tensors: Callable[[str, Layout], dict[str, Tensor]]) -> None:
        self.manifest, self.point = manifest, manifest.points[place]
        self.dtype = DTYPES[self.point.dtype]
        self.shards = [shard for shard in manifest.rows if shard.point == place]
        self._tensors = tensors
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + shard.rows)
        self._maps: list[Tensor | None] = [None] * len(self.shards)

    def _rows(self, i: int) -> Tensor:
        found = self._maps[i]
        if found is None:
            shard = self.shards[i]
            found = self._maps[i] = self._tensors(shard.file, shard.layout(self.point))["rows"]
        return found

    def between(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 [stop - start, D]: in place where one shard holds them, else a copy."""
        if start >= stop:
            return torch.empty(0, self.point.dim, dtype=self.dtype)
        i = bisect_right(self.starts, start) - 1
        first = self.starts[i]
        if stop <= self.starts[i + 1]:
            return self._rows(i)[start - first : stop - first]
        return torch.cat([*self._parts(start, stop)])

    def _parts(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows start .. stop - 1 in place, shard by shard."""
        for i in range(bisect_right(self.starts, start) - 1, len(self.shards)):
            first, end = self.starts[i], self.starts[i + 1]
            if first >= stop:
                return
            yield self._rows(i)[max(start - first, 0) : min(stop, end) - first]

    def gather(self, index: Tensor) -> Tensor:
        """Rows [n, D] at index [n]: in place where they follow each other in one shard, else a copy."""
        n = len(index)
        ends = [*((index.diff() != 1).nonzero().squeeze(1) + 1).tolist(), n]
        if n and (len(ends) == 1 or len(ends) * RUN <= n):  # sequences: each is copied as it stands
            starts = [0, *ends[:-1]]
            firsts = index[starts].tolist()
            if len(ends) == 1:
                return self.between(firsts[0], firsts[0] + n)
            runs = zip(firsts, starts, ends, strict=True)
            return torch.cat([part for first, at, end in runs for part in self._parts(first, first + end - at)])
        out = torch.empty(n, self.point.dim, dtype=self.dtype)
        shard = torch.bucketize(index, torch.tensor(self.starts), right=True) - 1
        for i in shard.unique().tolist():
            at = (shard == i).nonzero().squeeze(1)
            out[at] = self._rows(i)[index[at] - self.starts[i]]
        return out

    @functools.cached_property
    def places(self) -> Places:
        """Whose the rows are."""
        indexes = {index.file: index for index in self.manifest.indexes}
        try:
            return Places.joined([self._tensors(shard.index, indexes[shard.index].layout) for shard in self.shards])
        except (ValueError, IndexError) as error:
            raise StoreError(f"{self.point.hook_point}: an index shard is damaged", got=str(error)) from error
