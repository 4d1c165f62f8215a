"""The gram for Hopper without a GPU: its index arithmetic emulated against plain products, its pipeline, its cubin."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emocore.linalg import pack_tiles, tile_count
from emocore.precision import DEVICE_BLOCK_ROWS, device_chain

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"

EMULATE = """
import ctypes, pathlib, sys
import numpy as np
library, file = sys.argv[1:]
call = np.load(file)
arrays = [np.ascontiguousarray(call[name]) for name in ("y", "exponent", "cursor", "tiles")]
pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in arrays]
ctypes.CDLL(library).emulate(*pointers, ctypes.c_int64(arrays[3].size), *arrays[0].shape, int(call["of"]))
np.save(pathlib.Path(file).with_name("tiles.npy"), arrays[3])
"""


class Map(ctypes.Structure):
    _fields_ = [
        *(("sizes", ctypes.c_uint64 * 3), ("strides", ctypes.c_uint64 * 2)),
        *(("box", ctypes.c_uint32 * 3), ("steps", ctypes.c_uint32 * 3)),
    ]


class Work(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("hook", "panel", "column")]


class Box(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int) for name in ("column", "row", "slice", "offset")), ("both", ctypes.c_bool)]


RESULTS = {"map_of": Map, "work_of": Work, "box_of": Box, "state_offset": ctypes.c_int64}
RESULTS |= {"is_lower": ctypes.c_bool, "loads": ctypes.c_bool, "descriptor": ctypes.c_uint64}


class Gram:
    """gram_cuda.h: every constant and function under its own name; the kernel as `emulate`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __getattr__(self, name: str) -> Any:
        if name.isupper():
            return ctypes.c_int.in_dll(self.library, f"constant_{name}").value
        function = getattr(self.library, f"function_{name}")
        function.restype = RESULTS.get(name, ctypes.c_int)
        return function

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column [threads, sums] for which a thread of a warpgroup takes each of its sums."""
        each = [[(self.sum_row(t, s), self.sum_column(t, s)) for s in range(self.SUMS)] for t in range(128)]
        return np.array(each)[..., 0], np.array(each)[..., 1]

    def ring(self, stages: int, steps: int) -> tuple[int, int, int]:
        """Stage, parity, and the stage before, after some steps."""
        out = (ctypes.c_int * 3)()
        self.library.ring(stages, steps, out)
        return out[0], out[1], out[2]

    def emulate(self, y: np.ndarray, exponent: np.ndarray, cursor: tuple[int, int], tiles: np.ndarray, of: int) -> None:
        """fold_gram on `of` multiprocessors.    y: [hooks, parts, block, D] float16, tiles: [hooks, T, 128, 128]."""
        file = Path(self.library._name).with_name("call.npz")
        np.savez(file, y=y, exponent=exponent, cursor=np.array(cursor, np.int64), tiles=tiles, of=of)
        # another process: an error there ends it, as no thread can call back the others
        done = subprocess.run(
            [sys.executable, "-c", EMULATE, self.library._name, file], capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
        tiles[:] = np.load(file.with_name("tiles.npy"))


@pytest.fixture(scope="module")
def gram(tmp_path_factory: pytest.TempPathFactory) -> Gram:
    folder = tmp_path_factory.mktemp("emulated")
    for path in (ROOT / "csrc" / "gram_cuda.h", ROOT / "csrc" / "gram_cuda.cu", DATA / "emulated_gram.cpp"):
        shutil.copy(path, folder)
    shutil.copy(DATA / "emulated_ptx.h", folder / "gram_ptx.h")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, "emulated_gram.cpp", "-o", "emulated.so"], cwd=folder, check=True)
    return Gram(ctypes.CDLL(str(folder / "emulated.so")))


# --- the work


@pytest.mark.parametrize(("D", "items"), [(8, 1), (128, 1), (384, 3), (768, 9), (1000, 15), (4096, 187), (8192, 715)])
def test_work_covers_every_lower_tile_once(gram: Gram, D: int, items: int) -> None:
    panels, hooks, found = -(-D // 128), 2, []
    for item in range(hooks * gram.items_of(D)):
        works = [gram.work_of(item, rank, D) for rank in range(gram.CLUSTER)]
        assert works[0].column == works[1].column  # the blocks share their right operand
        for work in works:
            for group in range(work.column * gram.RIGHT, (work.column + 1) * gram.RIGHT):
                if work.panel < panels and gram.is_lower(work.panel, group):
                    found.append((work.hook, work.panel, group))
    assert sorted(found) == [(h, i, g) for h in range(hooks) for i in range(panels) for g in range(2 * i + 2)]
    assert gram.items_of(D) == items


def test_grid_is_whole_clusters(gram: Gram) -> None:
    assert gram.grid(1, 384, 132) == 6
    assert gram.grid(44, 384, 132) == 132
    assert gram.grid(1, 8192, 131) == 130


def test_state_offset_passes_32_bits(gram: Gram) -> None:
    assert gram.state_offset(0, 2, 5, 384) == 5 * 16384 + 64
    assert gram.state_offset(70, 63, 127, 8192) == (70 * 2080 + 2079) * 16384 + 64


def test_chains_are_those_of_the_contract(gram: Gram) -> None:
    assert device_chain(torch.bfloat16) == gram.CHAIN
    assert device_chain(torch.float32) == gram.CHAIN // 2
    assert gram.slabs_of(DEVICE_BLOCK_ROWS) * gram.DEPTH == DEVICE_BLOCK_ROWS
    assert [gram.slabs_of(n) for n in (1, 64, 65)] == [1, 1, 2]


# --- accumulators


def test_sums_are_where_wgmma_leaves_them(gram: Gram) -> None:
    """PTX, register fragment of D: warp w has rows 16 w .., lane l of it row l / 4, columns 2 (l % 4), and 8 on."""
    rows, columns = gram.sums()
    assert list(zip(rows[0][:6], columns[0][:6], strict=True)) == [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9)]
    first = [(rows[t, 0], columns[t, 0]) for t in (1, 3, 4, 31, 32, 127)]
    assert first == [(0, 2), (0, 6), (1, 0), (7, 6), (16, 0), (55, 6)]
    assert sorted((rows * gram.WIDTH + columns).ravel()) == list(range(64 * gram.WIDTH))
    for s in range(gram.SUMS):  # how the fold counts them: groups of 64 columns, 8 columns, rows 8 apart, pairs
        group, eight, half, odd = s // 32, s // 4 % 8, s // 2 % 2, s % 2
        assert (rows[:, s] == rows[:, 0] + 8 * half).all()
        assert (columns[:, s] == columns[:, 0] + 64 * group + 8 * eight + odd).all()


# --- shared memory: what TMA writes is what wgmma reads

BASE = 3 * 1024  # of the stage; not 0, so that no offset passes for an address


def copy_box(image: np.ndarray, memory: np.ndarray, form: Map, box: Box) -> None:
    """A box as TMA writes it: zeros out of bounds, chunk c of row r at c ^ (r % 8).  image, memory: 16-bit words."""
    (width, height, _), sizes = form.box, form.sizes
    r, c = np.arange(height)[:, None], np.arange(width)[None, :]
    inside = (box.column + c < sizes[0]) & (box.row + r < sizes[1]) & (0 <= box.slice < sizes[2])
    at = 2 * (box.column + c) + (box.row + r) * form.strides[0] + box.slice * form.strides[1]
    words = np.where(inside, memory[np.where(inside, at // 2, 0)], 0)
    start = BASE + box.offset
    assert start % 1024 == 0
    image[(start + r * 128 + (c // 8 ^ r % 8) * 16 + c % 8 * 2) // 2] = words


def operand(image: np.ndarray, descriptor: int, across: int) -> np.ndarray:
    """[16, across] as wgmma reads an operand whose columns lie side by side, under the 128-byte swizzle of PTX."""
    start, leading, stride = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
    assert descriptor >> 62 == 1  # 128-byte swizzle
    assert (descriptor >> 49) & 7 == 0  # no base offset
    k, n = np.arange(16)[:, None], np.arange(across)[None, :]
    address = start + n // 64 * leading + k // 8 * stride + k % 8 * 128 + n % 64 * 2
    return image[(address ^ (address >> 7 & 7) << 4) // 2]


def staged(gram: Gram, memory: np.ndarray, form: Map, works: list[Work]) -> np.ndarray:
    """Shared memory [blocks of the cluster, words] when all copies of the first slab have come."""
    images = np.full((gram.CLUSTER, (BASE + gram.STAGE_BYTES) // 2), 0x7E00, np.uint16)  # NaN
    came = np.zeros((gram.CLUSTER, gram.BOXES), int)
    for rank, work in enumerate(works):
        for b in filter(lambda b: gram.loads(rank, 0, b), range(gram.BOXES)):
            box = gram.box_of(work, 1, 0, 0, b)
            for to in range(gram.CLUSTER) if box.both else [rank]:
                copy_box(images[to], memory, form, box)
                came[to, b] += 1
    assert (came == 1).all()
    assert gram.BOXES * gram.BOX_BYTES == gram.STAGE_BYTES  # what the barrier expects
    return images


def test_descriptor_is_the_one_that_triton_builds(gram: Gram) -> None:
    """For transposed fp16 operands of 64 rows: stride offset 1024, leading offset 8192, swizzle 1."""
    assert gram.descriptor(0x2400) == 0x4000004002000240
    assert gram.descriptor(0x38000) == 0x4000004002003800  # 18 bits of address are kept


def test_every_element_is_read_where_it_was_written(gram: Gram) -> None:
    D, rows = 576, 64
    y = np.zeros((rows, 1024), np.uint16)
    y[:, :D] = np.arange(D * rows, dtype=np.uint16).reshape(rows, D) + 1  # each another
    form = gram.map_of(1, 1, rows, D)
    for item in range(gram.items_of(D)):
        works = [gram.work_of(item, rank, D) for rank in range(2)]
        images = staged(gram, y[:, :D].ravel(), form, works)
        for rank, warpgroup, step in itertools.product(range(2), range(2), range(4)):
            want, column = y[16 * step : 16 * step + 16], works[rank].column * 192
            got = operand(images[rank], gram.descriptor(BASE + gram.right_offset(step)), 192)
            assert (got == want[:, column : column + 192]).all()
            column = works[rank].panel * 128 + 64 * warpgroup
            got = operand(images[rank], gram.descriptor(BASE + gram.left_offset(warpgroup, step)), 64)
            assert (got == want[:, column : column + 64]).all()


# --- the kernel


@pytest.mark.parametrize(
    ("hooks", "parts", "block", "D", "multiprocessors"),
    [
        *((1, 1, 40, 8, 132), (2, 1, 64, 72, 2), (1, 1, 600, 200, 2), (1, 1, 576, 384, 4), (1, 1, 130, 456, 3)),
        *((2, 2, 90, 136, 2), (1, 2, 640, 64, 132)),
    ],
)
def test_kernel_is_the_gram(gram: Gram, hooks: int, parts: int, block: int, D: int, multiprocessors: int) -> None:
    """Small integers: every sum is exact, and so must be the state."""
    rng = np.random.default_rng(D)
    y = rng.integers(-2, 3, (hooks, parts, block, D)).astype(np.float16)
    exponent = rng.integers(-5, 6, (hooks, D)).astype(np.int32)
    before = rng.integers(-9, 10, (hooks, tile_count(D), 128, 128)).astype(np.float64)
    tiles = before.copy()
    gram.emulate(y, exponent, (block + 5, 5), tiles, multiprocessors)
    for h in range(hooks):
        high, low = y[h, 0].astype(np.float64), y[h, -1].astype(np.float64) / 2048
        product = high.T @ high + (high.T @ low + low.T @ high if parts == 2 else 0)
        want = pack_tiles(torch.from_numpy(np.ldexp(product, exponent[h][:, None] + exponent[h][None, :])))
        np.testing.assert_array_equal(tiles[h], before[h] + want.numpy())


def test_kernel_waits_for_a_whole_block(gram: Gram) -> None:
    tiles = np.zeros((1, 1, 128, 128))
    gram.emulate(np.ones((1, 1, 64, 8), np.float16), np.zeros((1, 8), np.int32), (163, 100), tiles, 132)
    assert not tiles.any()


def test_kernel_promotes_every_512_rows(gram: Gram) -> None:
    """Ones after 2^24 are lost to fp32, which those of the next chain are not: they come as one 512."""
    y = np.ones((1, 1, 1024, 8), np.float16)
    y[:, :, :256] = 256
    tiles = np.zeros((1, 1, 128, 128))
    gram.emulate(y, np.zeros((1, 8), np.int32), (1024, 0), tiles, 132)
    assert (tiles[0, 0, :8, :8] == 2**24 + 512).all()


# --- the pipeline


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def step(self, arrivals: int, expected: int) -> None:
        self.missing -= arrivals
        self.bytes += expected
        assert self.missing >= 0
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def passes(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Pipeline:
    """Producers and consumers of a cluster, taken in random order; `counts` are slabs between promotions."""

    def __init__(
        self, gram: Gram, stages: int, counts: list[int], arrivals: int = 16, both: bool = True, flip: int = 1
    ):
        self.gram, self.stages, self.counts, self.both, self.flip = gram, stages, counts, both, flip
        self.full = [[Barrier(1) for _ in range(stages)] for _ in range(2)]
        self.empty = [[Barrier(arrivals) for _ in range(stages)] for _ in range(2)]
        self.held = [[[-1] * gram.BOXES for _ in range(stages)] for _ in range(2)]  # the slab of every box
        self.flying: list[tuple[int, int, int, int]] = []

    def produce(self, rank: int) -> Iterator[bool]:
        for slab in range(sum(self.counts)):
            stage, parity, _ = self.gram.ring(self.stages, slab)
            while not self.empty[rank][stage].passes(parity ^ self.flip):
                yield False
            self.full[rank][stage].step(1, self.gram.STAGE_BYTES)
            for b in filter(lambda b: self.gram.loads(rank, slab, b), range(self.gram.BOXES)):
                both = self.gram.box_of(Work(0, 0, 0), 1, 0, slab, b).both
                self.flying += [(to, stage, b, slab) for to in (range(2) if both else [rank])]
                yield True

    def land(self) -> None:
        if not self.flying:
            return
        to, stage, b, slab = self.flying.pop(random.randrange(len(self.flying)))
        self.held[to][stage][b] = slab
        self.full[to][stage].step(0, -self.gram.BOX_BYTES)

    def consume(self, rank: int) -> Iterator[bool]:
        slab = 0
        for count in self.counts:
            for i in range(count):
                stage, parity, before = self.gram.ring(self.stages, slab)
                while not self.full[rank][stage].passes(parity):
                    yield False
                assert self.held[rank][stage] == [slab] * self.gram.BOXES, "read before it has come"
                slab += 1
                yield True
                if i:
                    self.release(rank, before, slab - 2)
            self.release(rank, stage, slab - 1)

    def release(self, rank: int, stage: int, slab: int) -> None:
        assert self.held[rank][stage] == [slab] * self.gram.BOXES, "written while it was read"
        for to in range(2) if self.both else [rank]:
            self.empty[to][stage].step(1, 0)

    def run(self, seed: int) -> None:
        random.seed(seed)
        actors = [self.produce(r) for r in range(2)] + [self.consume(r) for r in range(2) for _ in range(8)]
        pace = {actor: random.random() ** 2 for actor in actors}  # some lag far behind
        while actors:
            moved = sum(self.move(actors, actor) for actor in actors[:] if random.random() < pace[actor])
            moved = moved or any(self.move(actors, actor) for actor in actors[:])
            assert moved or self.flying, "deadlock"
            for _ in range(random.randrange(1, 9)):
                self.land()

    @staticmethod
    def move(actors: list[Iterator[bool]], actor: Iterator[bool]) -> bool:
        moved = next(actor, None)
        if moved is None:
            actors.remove(actor)
        return moved is not False


@pytest.mark.parametrize("stages", [3, 4, 5])
def test_pipeline_neither_stops_nor_overwrites(gram: Gram, stages: int) -> None:
    assert [gram.ring(stages, n) for n in range(20)] == [
        (n % stages, n // stages % 2, (n - 1) % stages) for n in range(20)
    ]
    for seed, counts in enumerate([[1], [1, 2], [8, 8, 3], [8, 16, 5, 10], [7, 7, 7], [stages, 1, stages + 1]] * 2):
        Pipeline(gram, stages, counts).run(seed)


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"both": False}, "deadlock"),  # a consumer releases its own block's stage only
        ({"both": False, "arrivals": 8}, "written while|has come"),  # and the producer waits for no other
        ({"flip": 0}, "deadlock"),  # a producer waits for the parity of consumers
    ],
)
def test_pipeline_test_can_fail(gram: Gram, wrong: dict[str, Any], seen: str) -> None:
    with pytest.raises(AssertionError, match=seen):
        Pipeline(gram, 3, [8] * 20, **wrong).run(0)


# --- the cubin

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc to compile csrc/gram_cuda.cu")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / ".ci" / "cubins"), str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "EMOCORE_CUDA": "", **environment}
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The cubin and what ptxas said."""
    folder = tmp_path_factory.mktemp("cubins")
    done = build(folder, EMOCORE_CUDA="1", NVCC_APPEND_FLAGS="-Xptxas -v,-warn-spills,-warn-lmem-usage")
    assert done.returncode == 0, done.stderr
    return folder / "gram_sm90a.cubin", done.stdout + done.stderr


@pytest.fixture(scope="module")
def sass(compiled: tuple[Path, str]) -> dict[str, str]:
    """Machine code by entry, as the disassembler that ships with Triton reads it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", compiled[0]], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\w+)", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@needs_nvcc
def test_cubin_has_no_spill_and_no_warning(compiled: tuple[Path, str], gram: Gram) -> None:
    said = compiled[1]
    assert not re.search(r"warning|C75\d\d", said), said
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert used == [("0", "0", "0")] * 2
    # at entry all of a block's threads share the registers; setmaxnreg then deals them out anew
    assert re.findall(r"Used (\d+) registers", said) == [str(65536 // gram.THREADS // 8 * 8)] * 2
    assert gram.SHARED_BYTES <= 227 * 1024


@needs_nvcc
@pytest.mark.parametrize("entry", ["emocore_gram_sm90", "emocore_gram2_sm90"])
def test_machine_code_uses_the_copy_engine_and_wgmma(sass: dict[str, str], entry: str) -> None:
    code = sass[entry]
    consumer, producer = code[: code.rindex("EXIT")].split("USETMAXREG.DEALLOC")  # after it: what rarely runs
    assert len(re.findall(r"HGMMA\.64x192x16\.F32 \w+, gdesc\[\w+\]\.tnspA\.tnspB", consumer)) == 4
    assert "UTMALDG.3D [" in producer
    assert "UTMALDG.3D.MULTICAST [" in producer
    assert "SYNCS.PHASECHK" in consumer
    assert "SYNCS.PHASECHK" in producer
    assert not re.search(r"\b(LDL|STL)\b", code)
    for part, most in ((consumer, 232), (producer, 40)):
        assert max(int(n) for n in re.findall(r"\bR(\d+)\b", part)) < most
    slab = consumer[consumer.index("HGMMA") : consumer.rindex("HGMMA")]
    assert not re.search(r"WARPGROUP\.DEPBAR|FADD|FFMA|BAR", slab), "something waits between the products of a slab"


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A PATH without nvcc."""
    for name in ("bash", "env", "dirname", "rm", "mkdir", "mv"):
        os.symlink(str(shutil.which(name)), tmp_path / name)
    return str(tmp_path)


@pytest.mark.parametrize("wanted", ["", "0"])
def test_build_without_nvcc_is_silent(tmp_path: Path, tools: str, wanted: str) -> None:
    (tmp_path / "gram_sm90a.cubin").write_bytes(b"old")
    done = build(tmp_path, PATH=tools, EMOCORE_CUDA=wanted)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "gram_sm90a.cubin").exists()


def test_build_that_must_have_nvcc_says_so(tmp_path: Path, tools: str) -> None:
    done = build(tmp_path, PATH=tools, EMOCORE_CUDA="1")
    assert done.returncode == 1
    assert "nvcc" in done.stderr
    assert "unset EMOCORE_CUDA" in done.stderr


@pytest.mark.parametrize(("wanted", "code"), [("", 0), ("1", 1)])
def test_build_without_a_fit_nvcc(tmp_path: Path, tools: str, wanted: str, code: int) -> None:
    (tmp_path / "nvcc").write_text("#!/usr/bin/env bash\necho no sm_90a >&2; exit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    done = build(tmp_path, PATH=tools, EMOCORE_CUDA=wanted)
    assert done.returncode == code
    assert "no sm_90a" in done.stderr
    assert not list(tmp_path.glob("*.cubin*"))


@needs_nvcc
def test_build_can_be_told_to_skip(tmp_path: Path) -> None:
    assert build(tmp_path, EMOCORE_CUDA="0").returncode == 0
    assert not list(tmp_path.iterdir())
