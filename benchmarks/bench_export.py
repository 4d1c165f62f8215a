"""A store to HDF5 files, plain and compressed, and back: what a smaller file costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emocore import ActivationStore, activations, capture
from emocore.errors import StoreError
from emocore.exporting import FILTERS, to_hdf5
from emocore.importing import from_hdf5

from .bench_model import minilm
from .bench_store import Volume
from .harness import Absent, Contender
from .machine import Machine
from .ours import OURS
from .results import Case, Work

FORWARDS = 8


class Files(Volume):
    """The HDF5 files of a store, in a folder of its own for every call."""

    def __init__(self, root: Path, compression: str | None) -> None:
        super().__init__(root)
        self._compression, self._share = compression, 0.0

    def write(self, path: Path) -> None:
        """To files, and of what size beside the rows."""
        files = to_hdf5(path, self.folder / "files", self._compression)
        rows = sum(view.rows.nbytes for view in activations(path).values())
        self._share = sum(file.stat().st_size for file in files) / rows

    def both(self, path: Path) -> Tensor:
        """There and back."""
        with self.fresh():
            self.write(path)
            from_hdf5(self.folder / "files", self.folder / "store")
            return torch.cat([view.rows for view in activations(self.folder / "store").values()])

    def figures(self) -> Mapping[str, float]:
        """The size of the files beside that of the rows."""
        return {"size": self._share}


@pytest.mark.cpu
def test_export(race: Callable[..., object], machine: Machine, seed: int, tmp_path: Path) -> None:
    """Rows of an encoder's middle layer, in bfloat16, synced."""
    subject = minilm(machine, False, seed)
    if isinstance(subject, Absent):
        race(Case(op="export", name="to HDF5", dtype="bfloat16", rows=0, dim=0, bound=0.0), [subject], [None], None)
        return
    forwards, path = 1 if machine.scale.tiny else FORWARDS, tmp_path / "store"
    with ActivationStore(path, dtype=torch.bfloat16) as store, capture(subject.model, {subject.names[3]: store}):
        for _ in range(forwards):
            subject.forward()
    rows = activations(path)[subject.names[3]].rows
    case = Case(
        op="export",
        name=f"to HDF5 bfloat16 D={rows.shape[1]}",
        dtype="bfloat16",
        rows=len(rows),
        dim=rows.shape[1],
        bound=0.0,
        work=Work(read=rows.nbytes),
        hides_launch=False,
    )
    plain = Files(tmp_path, None)
    contenders: list[Contender | Absent] = [Contender(OURS, plain.write, plain.both, plain.fresh, plain.figures)]
    for name in FILTERS:
        files = Files(tmp_path, name)
        try:
            files.both(path)
        except StoreError as error:
            contenders.append(Absent(f"{OURS}, {name}", f"skipped: {error}"[:100]))
        else:
            contenders.append(Contender(f"{OURS}, {name}", files.write, files.both, files.fresh, files.figures))
    race(case, contenders, [path], lambda _: rows.double())
