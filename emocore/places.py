"""Places: whose every stored row is: its request, sequence, position, token and label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

COLUMNS = ("sequence", "request", "position", "token", "label")  # of int64 tables while they grow
NONE = -1


def table(n: int, **columns: Tensor | None) -> Tensor:
    """Columns [n] as one table [n, 5] int64; -1 stands for what is not known."""
    rows = torch.full((n, len(COLUMNS)), NONE, dtype=torch.int64)
    for name, column in columns.items():
        if column is not None:
            rows[:, COLUMNS.index(name)] = column
    return rows


class Growing:
    """The places of the rows of one or many open shards; those of the same rows share one."""

    def __init__(self, start: Tensor | None = None) -> None:
        self._rows = torch.empty(0, len(COLUMNS), dtype=torch.int64)
        self._used = 0
        if start is not None:
            self.extend(0, start)

    def extend(self, at: int, rows: Tensor) -> bool:
        """Put rows [n, 5] at `at`, where they may stand already; False, and nothing done, where others stand there."""
        end = at + len(rows)
        if end <= self._used:
            return torch.equal(self._rows[at:end], rows)
        if at != self._used:
            return False
        if end > len(self._rows):
            grown = torch.empty(max(end, 2 * len(self._rows)), len(COLUMNS), dtype=torch.int64)
            grown[:at] = self._rows[:at]
            self._rows = grown
        self._rows[at:end] = rows
        self._used = end
        return True

    def first(self, n: int) -> Tensor:
        """The first n rows [n, 5]."""
        return self._rows[:n]


def packed(rows: Tensor, requests: Sequence[str]) -> dict[str, Tensor]:
    """A table [n, 5] as the tensors of an index shard; its requests are those of `requests` that occur."""
    columns = dict(zip(COLUMNS, rows.T, strict=True))
    counts = (columns["request"] + 1).bincount(minlength=len(requests) + 1)
    counts[0] = 0  # of rows without a request
    place = (counts > 0).cumsum(0) - 1
    columns["request"] = place[columns["request"] + 1]
    names = [requests[i].encode() for i in (counts[1:] > 0).nonzero().squeeze(1).tolist()]
    return {
        "sequence": columns.pop("sequence").contiguous(),
        "request_ends": torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
        **{name: columns[name].int() for name in ("request", "position", "token", "label")},
        "request_names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8) if any(names) else _no_text(),
    }


def _no_text() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def request_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of an index shard's requests; raises ValueError where its text and its bounds do not fit."""
    text, ends = tensors["request_names"].numpy().tobytes(), tensors["request_ends"].tolist()
    starts = [0, *ends[:-1]] if ends else []
    if sorted(ends) != ends or (ends or [0])[-1] != len(text) or (ends and ends[0] < 0):
        raise ValueError("the bounds of its request names do not fit their text")
    return [text[a:b].decode() for a, b in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Places:
    """Whose the rows of a hook point are, a column [N] each; -1 is unknown, and `names` are those of the requests."""

    sequence: Tensor
    request: Tensor
    position: Tensor
    token: Tensor
    label: Tensor
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.sequence)

    def at(self, index: Tensor) -> Places:
        """Those of some rows, by number [n]."""
        return replace(self, **{name: getattr(self, name)[index] for name in COLUMNS})

    @classmethod
    def joined(cls, shards: Sequence[Mapping[str, Tensor]]) -> Places:
        """Of consecutive index shards."""
        ids: dict[str, int] = {}
        request = []
        for tensors in shards:
            mine = torch.tensor([ids.setdefault(n, len(ids)) for n in request_names(tensors)] + [NONE])
            request.append(mine[tensors["request"].long()])  # -1 is the last
        none = torch.empty(0, dtype=torch.int64)
        parts = {name: [t[name] for t in shards] for name in ("sequence", "position", "token", "label")}
        columns = {name: torch.cat(given) if given else none for name, given in parts.items()}
        return cls(request=torch.cat(request) if request else none, names=tuple(ids), **columns)
