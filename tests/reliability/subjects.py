"""What is killed, cut off and starved here: commits 1, 2, 3, ... in each format, their content made of their number."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from emocore import ActivationStore, Moments, activations, load, save, store
from emocore.generations import KEPT, generations, path_of

ROWS, DIM = 50, 64  # of a commit to an activation store


def rows(number: int) -> Tensor:
    """Rows [ROWS, DIM] of one commit, no two alike."""
    first = number * ROWS
    return torch.arange(first, first + ROWS, dtype=torch.float32).unsqueeze(1).expand(ROWS, DIM)


def add(kept: ActivationStore, number: int) -> None:
    """Hand over the rows of one commit at two hook points."""
    x = rows(number)
    kept.at("a").update(x, requests=[str(int(i)) for i in x[:, 0]])
    kept.at("b").update(-x)


class Activations:
    """An activation store: what was committed stays beside what comes."""

    name = "activations"

    def commits(self, path: Path, first: int) -> Iterator[int]:
        """One writer's life: each commit from the first on, once it is acknowledged."""
        with ActivationStore(path) as kept:
            for number in itertools.count(first):
                add(kept, number)
                kept.commit()
                yield number

    def seen(self, path: Path, generation: int | None = None) -> tuple[int, ...]:
        """The commits of one generation, the newest; fails unless their rows are exactly what was given."""
        return self._content(path, generation) if any(path.glob("manifest-*.json")) else ()

    def _content(self, path: Path, generation: int | None = None) -> tuple[int, ...]:
        kept = activations(path, generation)
        assert not kept.damaged
        if not len(kept):
            return ()
        numbers = [int(first) // ROWS for first in kept["a"].rows[::ROWS, 0]]
        whole = torch.cat([rows(number) for number in numbers])
        assert torch.equal(kept["a"].rows, whole)
        assert torch.equal(kept["b"].rows, -whole)
        places = kept["a"].places
        assert [int(places.names[i]) for i in places.request] == whole[:, 0].tolist()
        return tuple(numbers)

    def found(self, path: Path) -> tuple[int, ...]:
        """The commits that are there; fails unless they are whole, and all counts and checksums fit."""
        return self.read(path) if any(path.glob("manifest-*.json")) else ()

    def read(self, path: Path) -> tuple[int, ...]:
        """The same of a folder that holds a generation."""
        numbers = self._content(path)
        if numbers:
            assert store.verify(path).rows == 2 * ROWS * len(numbers)
        return numbers

    def before(self, path: Path) -> tuple[int, ...]:
        """The commits of the generation before the newest; fails unless they are whole."""
        older = generations(path)[1:]
        return self.seen(path, older[0]) if older else ()

    def expected(self, acknowledged: Sequence[int]) -> tuple[int, ...]:
        """What is there after these commits."""
        return tuple(acknowledged)

    def strays(self, path: Path) -> set[str]:
        """Names beside those that the two newest generations need."""
        kept = {path_of(path, number).name for number in generations(path)[:KEPT]}
        return {p.name for p in path.iterdir()} - kept - set(activations(path).manifest.layouts()) - {"lock"}


class Saved:
    """One file, in which every commit takes the place of the one before, which stays beside it."""

    def __init__(self, suffix: str) -> None:
        self.name = suffix
        self.whole: dict[bytes, tuple[int, ...]] = {}  # commits by the checksums of their files

    def moments(self, number: int) -> Moments:
        """The state of one commit."""
        found = Moments(["calm", "sad"], covariance=True)
        found.update(number + torch.arange(64.0).reshape(4, 16) / 4, torch.arange(4) % 2)
        return found

    def commits(self, path: Path, first: int) -> Iterator[int]:
        """One writer's life: each commit from the first on, once it is acknowledged."""
        with contextlib.suppress(OSError):  # it is there
            path.mkdir()
        for number in itertools.count(first):
            save(self.moments(number), path / f"x.{self.name}")
            yield number

    def seen(self, path: Path, name: str = "x") -> tuple[int, ...]:
        """The commit that is there; fails unless it is whole, ledger included."""
        file = path / f"{name}.{self.name}"
        if not file.exists():
            return ()
        data = sha256(file.read_bytes()).digest()
        if data in self.whole:  # the same bytes were loaded before
            return self.whole[data]
        numbers = self.read(path, name)
        if sha256(file.read_bytes()).digest() == data:
            self.whole[data] = numbers
        return numbers

    def read(self, path: Path, name: str = "x") -> tuple[int, ...]:
        """The same of a folder that holds a commit, loaded in any case."""
        back = load(path / f"{name}.{self.name}")
        number = int(back.mean[0] - 6)
        state, expected = back.state_dict(), self.moments(number).state_dict()
        assert state.pop("settings") == expected.pop("settings")
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
        back.ledger.check()
        return (number,)

    def before(self, path: Path) -> tuple[int, ...]:
        """The commit that is kept from before; fails unless it is whole."""
        return self.seen(path, "x.previous")

    def found(self, path: Path) -> tuple[int, ...]:
        """The commit that is there; fails unless it and the one before are whole, that being at most two before."""
        numbers = self.seen(path)
        for number in numbers:
            assert number - 2 <= max(self.before(path), default=0) <= number
        return numbers

    def expected(self, acknowledged: Sequence[int]) -> tuple[int, ...]:
        """What is there after these commits."""
        return tuple(acknowledged[-1:])

    def strays(self, path: Path) -> set[str]:
        """Names beside those of the file and the one before."""
        return {p.name for p in path.iterdir()} - {f"x.{self.name}", f"x.previous.{self.name}"}


SUBJECTS = {subject.name: subject for subject in (Activations(), Saved("safetensors"), Saved("h5"))}
