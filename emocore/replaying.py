"""Replaying: what an activation store has committed, by hook point: rows in place, whose they are, queries, data sets.

A reader keeps the generation that it opened: a writer only ever adds files to it.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, HookPointError, LabelError, ShapeError, StoreError, near, said
from .generations import newest
from .ledger import Ledger
from .manifest import check_files
from .places import Places
from .publishing import shut
from .recorded import Recorded
from .shards import Layout, checksum, mapped
from .tokens import Tokens

Wanted: TypeAlias = int | str | range | slice | Collection[Any] | Tensor
At: TypeAlias = int | slice | Sequence[int] | Tensor


def activations(path: str | os.PathLike[str], generation: int | None = None) -> Activations:
    """The activations that a store in `path` has committed, by hook point: the newest generation, or the one given.

    Raises StoreError for a folder without a store, and for manifests or shards that are missing, damaged or foreign.
    """
    return Activations(Path(path), generation)


class Activations(Mapping[str, "View"]):
    """{hook point: View of all its rows}; made by `activations`. `damaged` says which newer manifests are not whole."""

    def __init__(self, path: Path, generation: int | None = None) -> None:
        found = newest(path, generation)
        if found is None:
            raise StoreError(
                f"{path}: no activation store", way_out="Ranks are joined by `emocore.store.join(path)` first."
            )
        self.path, self.manifest, self.damaged = path, found.manifest, found.damaged
        try:
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{path}: could not be read", got=said(error)) from error
        weakref.finalize(self, shut, self._folder)
        check_files(self._folder, self.manifest)
        every = (Recorded(self.manifest, place, self.tensors) for place in range(len(self.manifest.points)))
        self._views = {recorded.point.hook_point: View(self, recorded) for recorded in every}

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Their names, in the order in which they were first seen."""
        return tuple(self._views)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the label ids."""
        return tuple(self.manifest.labels)

    @property
    def ledger(self) -> dict[str, Ledger]:
        """Ledger by hook point."""
        return {point.hook_point: Ledger.from_dict(point.ledger) for point in self.manifest.points}

    def tensors(self, file: str, layout: Layout) -> dict[str, Tensor]:
        """The tensors of one shard, in place."""
        return mapped(self._folder, file, layout)

    def checksum(self, file: str, layout: Layout) -> int:
        """CRC32C of one shard's data."""
        return checksum(self._folder, file, layout)

    def __getitem__(self, hook_point: str) -> View:
        if hook_point not in self._views:
            raise HookPointError(
                "hook point: not in this store", got=repr(hook_point), way_out=near(hook_point, self._views)
            )
        return self._views[hook_point]

    def __contains__(self, hook_point: object) -> bool:
        return hook_point in self._views

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        rows = sum(shard.rows for shard in self.manifest.rows)
        return f"<Activations {self.path} {self.manifest.generation}: {len(self)} hook points, {rows:,} rows>"


class View:
    """Rows of one hook point in the order in which they were captured: all of them, or those that `where` has chosen.

    `view[100:132]` is a tensor [32, D], `view[7]` one row [D], `view[[3, 1]]` rows by number. Consecutive rows of one
    shard are not copied; the memory is the reader's own, and writing to it changes no file.
    """

    def __init__(self, store: Activations, recorded: Recorded, chosen: Tensor | None = None) -> None:
        self._store, self._recorded, self._chosen = store, recorded, chosen

    @property
    def hook_point(self) -> str:
        """Its name."""
        return self._recorded.point.hook_point

    @property
    def dim(self) -> int:
        """Width D."""
        return self._recorded.point.dim

    @property
    def dtype(self) -> torch.dtype:
        """What rows are stored as."""
        return self._recorded.dtype

    @property
    def tokens(self) -> Tokens | None:
        """The token rule that rows were taken under."""
        rule = self._recorded.point.tokens
        return None if rule is None else Tokens(**rule)

    @functools.cached_property
    def places(self) -> Places:
        """Whose the rows are: columns [N] of sequences, requests, positions, token ids and label ids."""
        every = self._recorded.places
        return every if self._chosen is None else every.at(self._chosen)

    def __len__(self) -> int:
        return self._recorded.starts[-1] if self._chosen is None else len(self._chosen)

    def __getitem__(self, at: At) -> Tensor:
        n = self._recorded.starts[-1] if self._chosen is None else len(self._chosen)
        if isinstance(at, slice):
            start, stop, step = at.indices(n)
            if step == 1 and self._chosen is None:
                return self._recorded.between(start, stop)
            return self._gather(torch.arange(len(range(n)[at])) * step + start)
        if isinstance(at, int):
            if not -n <= at < n:
                raise IndexError(f"row {at} of {n}")
            return self._gather(torch.tensor([at % n]))[0]
        index = torch.as_tensor(at)
        if index.dtype == torch.bool and index.shape == (n,):
            index = index.nonzero().squeeze(1)
        if index.dim() != 1 or (index.numel() and (index.is_floating_point() or index.dtype == torch.bool)):
            got = f"{index.dtype} {list(index.shape)}"
            raise ShapeError("rows", expected=f"row numbers [n], or a mask [{n}]", got=got)
        index = index.long()
        if index.numel() and not (-n <= int(index.min()) and int(index.max()) < n):
            raise IndexError(f"rows {int(index.min())} .. {int(index.max())} of {n}")
        return self._gather(torch.where(index < 0, index + n, index))

    def _gather(self, index: Tensor) -> Tensor:
        return self._recorded.gather(index if self._chosen is None else self._chosen[index])

    @property
    def rows(self) -> Tensor:
        """All rows [N, D]."""
        return self[:]

    def numpy(self) -> np.ndarray[Any, Any]:
        """All rows [N, D]; bfloat16, which NumPy lacks, as float32 of the same values."""
        rows = self.rows
        found: np.ndarray[Any, Any] = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()
        return found

    def where(
        self,
        *,
        label: Wanted | None = None,
        request: Wanted | None = None,
        sequence: Wanted | None = None,
        position: Wanted | None = None,
        token: Wanted | None = None,
    ) -> View:
        """The rows that meet every condition: a value, a range or slice, or a collection of values.

        Labels are names or ids, -1 for unlabelled rows; requests are names. Raises LabelError, ArgumentError.
        """
        places, keep = self.places, torch.ones(len(self), dtype=torch.bool)
        if label is not None:
            keep &= _meets(places.label, _ids(label, self._store.labels, LabelError, "label"))
        if request is not None:
            keep &= _meets(places.request, _ids(request, places.names, ArgumentError, "request"))
        for column, wanted in ((places.sequence, sequence), (places.position, position), (places.token, token)):
            if wanted is not None:
                keep &= _meets(column, wanted)
        index = keep.nonzero().squeeze(1)
        return View(self._store, self._recorded, index if self._chosen is None else self._chosen[index])

    def dataset(self) -> RowDataset:
        """The rows as a torch data set, which worker processes may open anew."""
        return RowDataset(self)

    def __reduce__(self) -> tuple[Any, ...]:
        store = self._store
        return _reopened, (store.path.absolute(), store.manifest.generation, self.hook_point, self._chosen)

    def __repr__(self) -> str:
        return f"<View {self.hook_point}: {len(self):,} rows [{self.dim}] {self.dtype}>"


def _reopened(path: Path, generation: int, hook_point: str, chosen: Tensor | None) -> View:
    store = activations(path, generation)
    return View(store, store[hook_point]._recorded, chosen)


class RowDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Items {"row": [D], "label", "sequence", "position", "token": ids}; a batch is read in one go."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, index: Sequence[int]) -> list[dict[str, Any]]:
        """The items at `index`, as a DataLoader asks for them."""
        rows, places = self.view[index], self.view.places.at(torch.as_tensor(index))
        columns = {name: getattr(places, name).tolist() for name in ("label", "sequence", "position", "token")}
        return [{"row": row, **{name: ids[i] for name, ids in columns.items()}} for i, row in enumerate(rows)]


def _ids(wanted: Wanted, names: Sequence[str], error: Any, what: str) -> Wanted:
    """Names among what is wanted as their ids."""
    place = {name: i for i, name in enumerate(names)}

    def one(value: Any) -> Any:
        if isinstance(value, str) and value not in place:
            raise error(f"{what}: not in this store", got=repr(value), way_out=near(value, names))
        return place[value] if isinstance(value, str) else value

    if isinstance(wanted, (str, int)):
        return int(one(wanted))
    return wanted if isinstance(wanted, (range, slice, Tensor)) else [one(value) for value in wanted]


def _meets(column: Tensor, wanted: Wanted) -> Tensor:
    """Where a column [N] has a wanted value."""
    if isinstance(wanted, slice):
        wanted = range(*wanted.indices(int(column.max()) + 1 if len(column) else 0))
    if isinstance(wanted, range) and wanted.step == 1:
        return (column >= wanted.start) & (column < wanted.stop)
    if isinstance(wanted, int):
        return column == wanted
    values = torch.as_tensor(list(wanted) if not isinstance(wanted, Tensor) else wanted)
    return torch.isin(column.long(), values.long())
