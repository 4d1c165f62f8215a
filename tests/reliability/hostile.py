"""A process that reads files made to do harm, one after the other, for so many seconds or inputs.

Half of them are damaged bytes; half are sound to every checksum and lie: in the JSON, in tensors, in indexes. What is
neither a typed error nor exactly what was written ends the process, and so does a read that hangs.
"""

import copy
import faulthandler
import itertools
import json
import random
import resource
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emocore import ActivationStore, Directions, Moments, activations, load, save, store
from emocore.calibration import StreamReference
from emocore.errors import EmocoreError
from emocore.formats import FORMATS

HANG = 20  # seconds of a clock that other processes share

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 7, 1 << 31, (1 << 48) - 1, 1 << 63, 1 << 64, 10**40, 0.5, 1e308, float("nan")),
    *("", "a", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "float16", "rows", [], {}, [[]] * 9, {"a": 1}),
)

Attack = Callable[[random.Random], None]


# --- changes


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few changes of any kind."""
    found = bytearray(data)
    for _ in range(1 + int(rng.expovariate(0.7))):
        at = rng.randrange(len(found) + 1) if rng.random() < 0.5 else rng.randrange(min(len(found), 400) + 1)
        count = 1 + int(rng.expovariate(0.1))
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + count] = rng.randbytes(count)
        elif kind == 2:
            del found[at : at + count]
        elif kind == 3:
            found[at:at] = found[rng.randrange(len(found) + 1) :][:count]
        elif kind == 4:
            number = rng.choice((0, 1, 255, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1))
            found[at : at + 8] = number.to_bytes(8, "little")
        else:
            del found[at:]
    return bytes(found)


def lying(value: Any, rng: random.Random) -> Any:
    """JSON with a few of its values others."""
    value = copy.deepcopy(value)
    for _ in range(1 + int(rng.expovariate(1))):
        nodes = [*_nodes(value)]
        if not nodes:
            return value
        parent, key = rng.choice(nodes)
        kind = rng.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif kind == 1:
            parent[rng.choice([str(one) for one in VALUES[-12:]])] = copy.deepcopy(parent[key])
        elif kind == 2 and type(parent[key]) is int:
            parent[key] += rng.choice((-1, 1, 1 << 16, -(1 << 16)))
        elif kind == 3:
            other, at = rng.choice(nodes)
            parent[key] = copy.deepcopy(other.get(at) if isinstance(other, dict) else (other or [None])[0])
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in [*items]:
        yield value, key
        yield from _nodes(one)


def bent(t: Tensor, rng: random.Random) -> Tensor:
    """A tensor of other numbers, shape or dtype."""
    kind = rng.randrange(5)
    if kind == 0:
        return t.to(rng.choice((torch.float64, torch.float32, torch.int64)))
    if kind == 1:
        return t.reshape(-1)[: rng.randrange(t.numel() + 1)].clone()
    if kind == 2:
        return torch.zeros(rng.choice(([0], [0, 1 << 40], [1], [2, 3, 4], [])), dtype=t.dtype)
    t = t.clone()
    if t.numel():
        numbers = (0, -1, 1 << 40, 5e-324, float("nan"), float("inf"))[: 6 if t.is_floating_point() else 3]
        t.view(-1)[rng.randrange(t.numel())] = rng.choice(numbers)
    return t


# --- what is attacked


def objects() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    patterns, one = torch.randn(2, 3, generator=g, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    plain = Directions(("calm", "sad"), patterns, patterns.float(), patterns[0], 2.0, one, "layers.0")
    moments = Moments(labels=["calm", "sad"], covariance=True)
    moments.update(torch.randn(9, 3, generator=g), torch.arange(9) % 2)
    stream = StreamReference(0.5, 4, 9, torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 4, 2))
    wide = [one.double() for one in (stream.mean, stream.std, stream.largest)]
    calibrated = plain.calibrate(moments).calibrate(StreamReference(0.5, 4, 9, *wide))
    return {"moments": moments, "directions": calibrated, "mapping": {"layers.0": plain, "layers.1": calibrated}}


def file_attacks(folder: Path, suffix: str) -> Iterator[Attack]:
    form = FORMATS[suffix]
    for name, obj in objects().items():
        path = folder / f"{name}{suffix}"
        save(obj, path)
        whole = path.read_bytes()
        text, tensors = form.unpack(whole)

        def damage(rng: random.Random, path: Path = path, whole: bytes = whole) -> None:
            data = damaged(whole, rng)
            path.write_bytes(data)
            load(path)
            kept, (said, found) = form.unpack(whole), form.unpack(data)
            assert said == kept[0]
            assert found.keys() == kept[1].keys()
            assert all(t.numpy().tobytes() == kept[1][name].numpy().tobytes() for name, t in found.items())

        def lie(rng: random.Random, path: Path = path, text: str = text, tensors: dict[str, Tensor] = tensors) -> None:
            changed = dict(tensors)
            if rng.random() < 0.5:
                name = rng.choice([*changed])
                changed[name] = bent(changed[name], rng)
            header = lying(json.loads(text), rng) if rng.random() < 0.7 else json.loads(text)
            path.write_bytes(form.pack(changed, json.dumps(header)))
            load(path)

        yield from (damage, lie)


def folder_attacks(folder: Path) -> Iterator[Attack]:
    """On the newest manifest of two, on its shards, and on what they say with checksums that fit."""
    kept, rows = folder / "kept", torch.arange(40.0).reshape(20, 2)
    with ActivationStore(kept, labels=["calm", "sad"]) as recorder:
        for part in rows.split(10):
            recorder.at("a").update(part, labels=[0, 1] * 5, requests=["r", "s"] * 5)
            recorder.at("b").update(part[:5])
            recorder.commit()
    files = {path: path.read_bytes() for path in kept.iterdir() if path.name != "lock"}
    manifest = max(path for path in files if path.name.startswith("manifest"))
    body = json.loads(files[manifest])

    def read(exact: bool) -> None:
        found = activations(kept)
        for view in found.values():
            view.rows.sum(), view[::2], len(view.where(label=["calm", -1]))
        store.verify(kept)
        if exact:
            n = len(found["a"])
            assert n in (10, 20), (n, found.damaged, found.manifest)
            assert torch.equal(found["a"].rows, rows[:n])
            assert found["a"].places.label.tolist() == [0, 1] * (n // 2)
            assert [found["a"].places.names[i] for i in found["a"].places.request] == ["r", "s"] * (n // 2)

    def attack(path: Path, data: bytes, exact: bool) -> None:
        path.write_bytes(data)
        try:
            read(exact)
        finally:
            path.write_bytes(files[path])

    def damage(rng: random.Random) -> None:
        path = rng.choice([manifest, *files])
        attack(path, damaged(files[path], rng), True)

    def lie(rng: random.Random) -> None:
        changed = lying({name: one for name, one in body.items() if name != "crc32"}, rng)
        attack(manifest, sealed(changed), False)

    def misdirect(rng: random.Random) -> None:
        """An index or rows of other bytes, under their right checksum."""
        changed = copy.deepcopy({name: one for name, one in body.items() if name != "crc32"})
        shard = rng.choice(changed["rows"] + changed["indexes"])
        path = kept / shard["file"]
        data = bytearray(files[path])
        for _ in range(1 + rng.randrange(3)):
            at = rng.randrange(4096, len(data))
            count = min(rng.choice((1, 4, 8)), len(data) - at)
            data[at : at + count] = rng.choice((rng.randbytes(count), b"\xff" * count, b"\0" * count))
        from emocore.native import extension

        shard["crc32c"] = int(extension().crc32c(torch.frombuffer(data[4096:], dtype=torch.uint8).numpy()))
        manifest.write_bytes(sealed(changed))
        try:
            attack(path, bytes(data), False)
        finally:
            manifest.write_bytes(files[manifest])

    yield from (damage, lie, misdirect)


def sealed(body: Any) -> bytes:
    crc = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    return json.dumps({"crc32": crc, **body}).encode()


# --- the process


def main(kind: str, folder: Path, seed: int, seconds: float) -> None:
    attacks = [*(folder_attacks(folder) if kind == "folder" else file_attacks(folder, kind))]
    rng, counts, slowest = random.Random(seed), {"read": 0, "refused": 0}, 0.0
    before, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + seconds
    for number in itertools.count():
        if time.monotonic() > end:
            break
        one = random.Random(rng.random())
        faulthandler.dump_traceback_later(HANG, exit=True)
        start = time.thread_time()
        try:
            attacks[number % len(attacks)](one)
            counts["read"] += 1
        except EmocoreError:
            counts["refused"] += 1
        slowest = max(slowest, time.thread_time() - start)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({**counts, "slowest": slowest, "kilobytes": growth}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
