"""What a disk may hold after a power cut: the calls that faults.c wrote down, less what no sync had made certain.

Pessimistic as POSIX allows: bytes of a file are certain once the file is synced, names once their folder is. Until then
every sector of a write, every change of a size and every name may have reached the disk or not, in any order.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512

Chooses = Callable[[], bool]


@dataclass(frozen=True)
class Call:
    """One line of a record: a file is known by its number, a name by its path."""

    name: str
    file: int
    path: Path
    to: Path
    offset: int
    data: bytes


def recorded(path: Path) -> Iterator[Call]:
    """The calls of a record, in their order."""
    with open(path, "rb") as record:
        while line := record.readline():
            name, file, at, to, offset, size = line.decode().rstrip("\n").split("\t")
            yield Call(name, int(file), Path(at), Path(to), int(offset), record.read(int(size)))


FOLDER = -1  # instead of a file


@dataclass
class Disk:
    """Names and bytes that are certain, and the changes to them that are not."""

    root: Path  # a folder that is certain
    names: dict[Path, int] = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)
    loose_names: list[tuple[Path, dict[Path, int | None]]] = field(default_factory=list)  # by folder
    loose_bytes: list[tuple[int, int, bytes | None]] = field(default_factory=list)  # None: the size changes
    now: dict[Path, int] = field(default_factory=dict)  # names as processes see them
    numbers: dict[int, int] = field(default_factory=dict)  # a file's number on the volume to ours, never used again
    acknowledged: int = 0

    @classmethod
    def of(cls, root: Path, acknowledged: int) -> "Disk":
        """A folder that is wholly on the disk."""
        disk = cls(root, acknowledged=acknowledged)
        for path in root.rglob("*"):
            disk.now[path] = FOLDER if path.is_dir() else disk._file(path.stat().st_ino)
            if path.is_file():
                disk.content[disk.now[path]] = path.read_bytes()
        disk.names |= disk.now
        return disk

    def call(self, call: Call) -> None:
        """One more call has returned."""
        getattr(self, f"_{call.name}")(call)

    def image(self, name: Chooses, sector: Chooses) -> dict[Path, bytes]:
        """Files by path, where each loose change has reached the disk as the two choose."""
        names, found = dict(self.names), dict(self.content)
        for _, change in self.loose_names:
            if name():
                _rename(names, change)
        for file, offset, data in self.loose_bytes:
            for at, part in _sectors(offset, data):
                if sector():
                    found[file] = _written(found[file], at, part)
        reached = {path for path in names if path.parent == self.root or path.parent in names}
        return {path: found[names[path]] for path in sorted(reached) if names[path] != FOLDER}

    def _file(self, number: int, new: bool = False) -> int:
        if new or number not in self.numbers:
            self.numbers[number] = len(self.content)
            self.content[self.numbers[number]] = b""
        return self.numbers[number]

    def _mark(self, call: Call) -> None:
        self.acknowledged = call.file

    def _mkdir(self, call: Call) -> None:
        self._named({call.path: FOLDER})

    def _create(self, call: Call) -> None:
        self._named({call.path: self._file(call.file, new=True)})

    def _rename(self, call: Call) -> None:
        if self.now[call.path] != self.now.get(call.to):  # of two names of one file, both stay
            self._named({call.path: None, call.to: self.now[call.path]})

    def _link(self, call: Call) -> None:
        self._named({call.to: self.now[call.path]})

    def _unlink(self, call: Call) -> None:
        self._named({call.path: None})

    def _named(self, change: dict[Path, int | None]) -> None:
        self.loose_names.append((next(iter(change)).parent, change))
        _rename(self.now, change)

    def _write(self, call: Call) -> None:
        self.loose_bytes.append((self._file(call.file), call.offset, call.data))

    def _truncate(self, call: Call) -> None:
        self.loose_bytes.append((self._file(call.file), call.offset, None))

    def _sync(self, call: Call) -> None:
        if call.path == self.root or self.now.get(call.path) == FOLDER:
            for folder, change in self.loose_names:
                if folder == call.path:
                    _rename(self.names, change)
            self.loose_names = [one for one in self.loose_names if one[0] != call.path]
            return
        mine = self._file(call.file)
        for file, offset, data in self.loose_bytes:
            if file == mine:
                self.content[mine] = _written(self.content[mine], offset, data)
        self.loose_bytes = [one for one in self.loose_bytes if one[0] != mine]


def _rename(names: dict[Path, int], change: dict[Path, int | None]) -> None:
    for path, file in change.items():
        names.pop(path, None)
        if file is not None:
            names[path] = file


def _sectors(offset: int, data: bytes | None) -> Iterator[tuple[int, bytes | None]]:
    if data is None:
        yield offset, None
        return
    done = 0
    while done < len(data):
        count = min(SECTOR - (offset + done) % SECTOR, len(data) - done)
        yield offset + done, data[done : done + count]
        done += count


def _written(found: bytes, offset: int, data: bytes | None) -> bytes:
    before = found[:offset].ljust(offset, b"\0")
    return before if data is None else before + data + found[offset + len(data) :]


def images(start: Disk, calls: Sequence[Call], rng: random.Random) -> Iterator[tuple[int, dict[Path, bytes]]]:
    """What the disk may hold after a cut at any call, no two alike, with the last commit that was acknowledged."""
    disks = [start]
    for call in calls:
        disks.append(copy.deepcopy(disks[-1]))
        disks[-1].call(call)
    chances = [lambda p=p: rng.random() < p for p in (0.0, 1.0, 0.5, 0.9, 0.1)]
    every = [*itertools.product(disks, chances, chances)]
    seen = set()
    for fruitless in itertools.count():
        for disk, name, sector in rng.sample(every, len(every)):
            found = disk.image(name, sector)
            key = (disk.acknowledged, hash(tuple(found.items())))
            if key not in seen:
                seen.add(key)
                fruitless = 0
                yield disk.acknowledged, found
        if fruitless:
            return
