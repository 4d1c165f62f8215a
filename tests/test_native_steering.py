"""Steering by emocore._C against float64: every instruction set and dtype, hostile shapes, memory not to be touched."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from emocore import _C, reference_steering

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int32: "int32",
}
WIDTHS = (1, 3, 15, 17, 65, 100, 2880, 8191)
ROWS = (0, 1, 3, 5, 31, 33)

# A score's chain of roundings wanders by its square root, and so do the chains; see tests/test_native.py.
UNITS = _C.CHAIN**0.5 + _C.BLOCK_CHAINS**0.5 + 4

each_dtype = pytest.mark.parametrize("dtype", [d for d in DTYPES if d.is_floating_point], ids=DTYPES.get)


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


def view(t: Tensor | None) -> tuple[int, str, int, int, int] | None:
    if t is None:
        return None
    rows, stride = (1, t.shape[0]) if t.dim() == 1 else (t.shape[0], t.stride(0))
    return t.data_ptr(), DTYPES[t.dtype], rows, t.shape[-1], stride


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def normals(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Edit:
    """Tables of S slots for rows of D columns: what is added, R scores that are set, W scores that are asked for."""

    def __init__(self, D: int, dtype: torch.dtype, S: int = 4, R: int = 2, W: int = 0, add: bool = True) -> None:
        of = wide(dtype)
        self.deltas = normals(S, D, 1).to(of) if add or R == 0 else None
        self.basis, self.dual = (normals(R, D, seed).div(D**0.5).to(of) for seed in (2, 3))
        self.target, self.gate = normals(S, R, 4).to(of), normals(S, R, 5).to(of)
        self.gate[:, 1::2] *= torch.tensor([0.0, 1.0]).repeat(S)[:S, None].to(of)
        self.readers = normals(W, D, 6).div(D**0.5).to(of)
        self.levels = normals(S, W, 7).sub(0.5).to(of)
        if R == 0:
            self.basis = self.dual = self.target = self.gate = None

    def tables(self) -> tuple[Tensor | None, ...]:
        return self.deltas, self.basis, self.dual, self.target, self.gate

    def __call__(self, x: Tensor, slots: Tensor, threads: int = 1) -> Tensor:
        out = torch.full(x.shape, torch.nan, dtype=x.dtype)
        self.write(x, slots, out, threads)
        return out

    def in_place(self, x: Tensor, slots: Tensor, threads: int = 1) -> Tensor:
        x = x.clone()
        self.write(x, slots, x, threads)
        return x

    def write(self, x: Tensor, slots: Tensor, out: Tensor, threads: int) -> None:
        asked = (self.readers, self.levels) if len(self.readers) else (None, None)
        _C.steer_edit(view(x), view(slots), *map(view, (*asked, *self.tables())), view(out), threads)

    def slots_of(self, x: Tensor, slots: Tensor, threads: int = 1) -> Tensor:
        found = torch.full((len(x),), -7, dtype=torch.int32)
        _C.steer_slots(view(x), view(slots), view(self.readers), view(self.levels), view(found), threads)
        return found

    def bound(self, x: Tensor, found: Tensor, expected: Tensor) -> Tensor:
        """Roundings of the scores, of the sums that follow, and of the result."""
        unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
        y, size, last = x.double().abs(), x.double().norm(dim=1, keepdim=True), torch.finfo(x.dtype)
        parts, scores = y + (0 if self.deltas is None else self.deltas.double().abs().amax(0)), 0
        if self.basis is not None:
            gate, dual = self.gate.double().abs().amax(0), self.dual.double().abs()
            scores = UNITS * size * ((self.basis.double().norm(dim=1) * gate) @ dual)
            moves = (self.target.double().abs().amax(0) + size * self.basis.double().norm(dim=1)) * gate
            parts = parts + moves @ dual
            parts = (len(dual) + 3) * parts
        return unit * (scores + 2 * parts) + last.eps / 2 * expected.double().abs() + last.smallest_normal * last.eps


def slots_for(n: int, S: int = 4) -> Tensor:
    """Of one row each: nothing, every slot, below the tables, past them."""
    return torch.tensor([1, 0, 2, 3, S, -1, 1, 2], dtype=torch.int32).repeat(n // 8 + 1)[:n].clone()


def exact(edit: Edit, x: Tensor, slots: Tensor) -> Tensor:
    """In float64, before the last rounding; slots as the extension found them, for a score at its level."""
    tables = [None if t is None else t.double() for t in edit.tables()]
    if tables[0] is None:
        tables[0] = torch.zeros(len(edit.target), x.shape[1], dtype=torch.float64)
    return reference_steering.steer_rows_ref(x.double(), slots, *tables)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.dtype.itemsize])


# --- worked by hand


@each_dtype
def test_by_hand(isa: str, dtype: torch.dtype) -> None:
    edit = Edit(2, dtype, S=3)
    of = wide(dtype)
    edit.deltas = torch.tensor([[9, 9], [0, 0], [1, -1]], dtype=of)
    edit.basis = torch.tensor([[1, 0], [1, 1]], dtype=of)
    edit.dual = torch.tensor([[0, 2], [1, 0]], dtype=of)
    edit.target = torch.tensor([[9, 9], [5, 0], [0, 1]], dtype=of)
    edit.gate = torch.tensor([[9, 9], [1, 0], [0.5, 1]], dtype=of)
    x = torch.tensor([[3, 4], [3, 4], [3, 4], [-2, 1]], dtype=dtype)
    # slot 1: (5 - 3) (0, 2); slot 2: (1, -1) + (0 - 3) / 2 (0, 2) + (1 - 7) (1, 0), then the same from (-2, 1)
    found = edit(x, torch.tensor([0, 1, 2, 2], dtype=torch.int32))
    assert found.tolist() == [[3, 4], [3, 8], [-2, 0], [1, 2]]


def test_a_score_at_its_level_is_not_above_it(isa: str) -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.5], [2.0, 2.0]])
    edit = Edit(2, x.dtype, S=3, R=0, W=2)
    edit.readers, edit.levels = torch.eye(2), torch.tensor([[0.0, 0], [0, 2], [-torch.inf, -torch.inf]])
    one = torch.ones(1, dtype=torch.int32)
    assert edit.slots_of(x, one).tolist() == [0, 1, 0]
    assert edit.slots_of(x, 2 * one).tolist() == [2, 2, 2]
    assert edit.slots_of(x, 0 * one).tolist() == [0, 0, 0]
    assert torch.equal(edit(x, one)[1], x[1] + edit.deltas[1])
    assert torch.equal(edit(x, one)[::2], x[::2])


def test_rows_are_rounded_once(isa: str) -> None:
    """256 + 1 is a tie of bfloat16 and goes down; a quarter more, from a score, and it goes up."""
    x = torch.tensor([[256.0, 0.25]], dtype=torch.bfloat16)
    edit = Edit(2, x.dtype, S=2, R=1)
    edit.deltas = torch.tensor([[0.0, 0], [1, 0]])
    edit.basis, edit.dual, edit.gate = torch.tensor([[0.0, -1]]), torch.tensor([[1.0, 0]]), torch.ones(2, 1)
    edit.target = torch.tensor([[0.0], [0.0]])
    one = torch.ones(1, dtype=torch.int32)
    assert edit(x, one).tolist() == [[258, 0.25]]
    edit.target -= 0.25
    assert edit(x, one).tolist() == [[256, 0.25]]


# --- hostile shapes


@each_dtype
@pytest.mark.parametrize("D", WIDTHS)
def test_edits(isa: str, dtype: torch.dtype, D: int) -> None:
    for n in (*ROWS, 4097) if D in (17, 100) else ROWS[1:5]:
        x, slots = normals(n, D, n).to(dtype), slots_for(n)
        for R, W in ((0, 0), (1, 0), (2, 1), (3, 0), (6, 2)):
            edit = Edit(D, dtype, R=R, W=W)
            found = edit(x, slots, threads=2)
            chosen = edit.slots_of(x, slots) if W else slots
            expected = exact(edit, x, chosen)
            assert ((found.double() - expected).abs() <= edit.bound(x, found, expected)).all(), (n, R, W)
            assert torch.equal(edit.in_place(x, slots, threads=2), found)


@each_dtype
@pytest.mark.parametrize("D", [17, 2880])
def test_scores_decide(isa: str, dtype: torch.dtype, D: int) -> None:
    """Away from its level by more than its error, a score is on the side where float64 has it."""
    x, slots, edit = normals(33, D, 0).to(dtype), slots_for(33), Edit(D, dtype, W=2)
    found = edit.slots_of(x, slots, threads=2)
    expected = reference_steering.steer_slots_ref(x, slots, edit.readers, edit.levels)
    scores = x.double() @ edit.readers.double().T
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    error = UNITS * unit * x.double().norm(dim=1, keepdim=True) * edit.readers.double().norm(dim=1)
    inside = torch.where((slots > 0) & (slots < 4), slots, 0).long()
    clear = ((scores - edit.levels.double()[inside]).abs() > error).all(1)
    assert clear.sum() >= 30
    assert torch.equal(found[clear], expected[clear])
    assert 0 < (found > 0).sum() < 33


@each_dtype
def test_one_set_for_all_rows(isa: str, dtype: torch.dtype) -> None:
    x, edit = normals(33, 65, 0).to(dtype), Edit(65, dtype, S=1, R=3, add=False)
    edit.gate = None
    out = torch.full_like(x, torch.nan)
    _C.steer_edit(view(x), None, None, None, *map(view, edit.tables()), view(out), 1)
    edit.gate = torch.ones_like(edit.target)
    same = Edit(65, dtype, S=2, R=3)
    same.deltas, same.target, same.gate = torch.zeros_like(same.deltas), edit.target.repeat(2, 1), None
    assert torch.equal(out, same(x, torch.ones(1, dtype=torch.int32)))
    expected = x.double() + (edit.target.double() - x.double() @ edit.basis.double().T) @ edit.dual.double()
    assert ((out.double() - expected).abs() <= edit.bound(x, out, expected)).all()


@each_dtype
def test_rows_share_slots(isa: str, dtype: torch.dtype) -> None:
    x, edit = normals(24, 17, 0).to(dtype), Edit(17, dtype, W=1)
    few = torch.tensor([1, 0, 3], dtype=torch.int32)
    assert torch.equal(edit(x, few), edit(x, few.repeat_interleave(8)))
    assert torch.equal(edit.slots_of(x, few), edit.slots_of(x, few.repeat_interleave(8)))


# --- memory: strides, what may not be touched


@each_dtype
@pytest.mark.parametrize("D", [1, 17, 100])
def test_strided_rows_equal_contiguous_ones(isa: str, dtype: torch.dtype, D: int) -> None:
    base, slots, edit = normals(80, 210, 9).to(dtype), slots_for(33), Edit(D, dtype, R=3, W=1)
    every, narrow = base[3:69:2, 5 : 5 + D], base.flatten()[7 : 7 + 33 * D].view(33, D)
    expanded = base[:1, :D].expand(33, D)
    for x in (every, narrow, expanded):
        assert torch.equal(edit(x, slots, threads=2), edit(x.contiguous(), slots))
    expected, untouched = edit(every, slots), base.clone()
    edit.write(every, slots, every, 2)
    assert torch.equal(every, expected)
    untouched[3:69:2, 5 : 5 + D] = expected
    assert torch.equal(base, untouched)


@each_dtype
@pytest.mark.parametrize("D", [1, 17, 100])
def test_other_rows_keep_their_bits(isa: str, dtype: torch.dtype, D: int) -> None:
    """Any bits: signalling NaNs, subnormals, the zeros' signs."""
    g = torch.Generator().manual_seed(D)
    x = torch.randint(-(2**62), 2**62, (66, D), generator=g).view(dtype)[:, :D].contiguous()
    slots, edit = slots_for(66), Edit(D, dtype, R=3)
    left = (slots <= 0) | (slots >= 4)
    for found in (edit(x, slots, threads=2), edit.in_place(x, slots)):
        assert torch.equal(bits(found)[left], bits(x)[left])


READONLY = """
import ctypes, mmap, numpy as np, torch
from emocore import _C
page = mmap.PAGESIZE
D, n = page // 4, 8
memory = mmap.mmap(-1, n * page)
x = np.frombuffer(memory, np.float32).reshape(n, D)
x[:] = np.random.default_rng(0).standard_normal((n, D))
slots = np.array([1, 0, 0, 1, 1, 0, 1, 1], np.int32)
protect = ctypes.CDLL(None).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
for row in np.flatnonzero(slots == 0):
    assert protect(x.ctypes.data + int(row) * page, page, 1) == 0
ones = np.ones((2, D), np.float32)
for isa in _C.isas():
    _C.use_isa(isa)
    for readers in (None, ones[:1] * 0):
        levels = None if readers is None else np.full((2, 1), -1, np.float32)
        before = x.copy()
        _C.steer_edit(x, slots, readers, levels, ones, ones[:1], ones[:1], ones[:, :1], None, x, 1)
        assert (x[slots == 0] == before[slots == 0]).all() and (x[slots == 1] != before[slots == 1]).all()
"""


def test_other_rows_are_not_written() -> None:
    """They lie in read-only pages: a write would end the process."""
    done = subprocess.run([sys.executable, "-c", READONLY], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


# --- values that do not behave


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_are_those_of_the_reference(isa: str, dtype: torch.dtype, value: float) -> None:
    x, edit = normals(6, 37, 0).to(dtype), Edit(37, dtype)
    x[2, 36] = value
    slots = torch.tensor([1, 1, 3, 0, 1, 3], dtype=torch.int32)
    found, clean = edit(x, slots), edit(x.nan_to_num(1.0, 1.0, 1.0), slots)
    assert torch.equal(found.isfinite(), exact(edit, x, slots).isfinite())
    assert torch.equal(found[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
    asked = Edit(37, dtype, W=1)
    assert asked.slots_of(x, slots)[2] == reference_steering.steer_slots_ref(x, slots, asked.readers, asked.levels)[2]


@each_dtype
def test_a_closed_gate_lets_nothing_through(isa: str, dtype: torch.dtype) -> None:
    x, edit = normals(5, 37, 0).to(dtype), Edit(37, dtype)
    edit.gate[:] = 0
    edit.target[:] = torch.inf
    plain = Edit(37, dtype, R=0)
    assert torch.equal(edit(x, slots_for(5)), plain(x, slots_for(5)))


# --- the same bits


@each_dtype
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(isa: str, dtype: torch.dtype, threads: int) -> None:
    x, slots, edit = normals(1500, 100, 0).to(dtype), slots_for(1500), Edit(100, dtype, R=3, W=1)
    assert torch.equal(edit(x, slots), edit(x, slots, threads))
    assert torch.equal(edit.slots_of(x, slots), edit.slots_of(x, slots, threads))


@each_dtype
@pytest.mark.parametrize("R", [0, 1, 4, 5])
def test_a_row_does_not_know_its_neighbours(isa: str, dtype: torch.dtype, R: int) -> None:
    x, slots, edit = normals(23, 300, 0).to(dtype), slots_for(23), Edit(300, dtype, R=R, W=1)
    whole = edit(x, slots)
    for r in range(23):
        assert torch.equal(edit(x[r : r + 1], slots[r : r + 1]), whole[r : r + 1])


# --- refusals come before any writing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": torch.ones(3, dtype=torch.int32)}, "slots must divide the 8 rows, got 3"),
        ({"slots": torch.ones(0, dtype=torch.int32)}, "slots must divide the 8 rows, got 0"),
        ({"deltas": torch.zeros(4, 6)}, r"deltas must be float32 \[4, 5\], got float32 \[4, 6\]"),
        ({"deltas": torch.zeros(4, 5).double()}, r"deltas must be float32 \[4, 5\], got float64 \[4, 5\]"),
        ({"deltas": None}, "deltas must be a NumPy array or"),
        ({"dual": torch.zeros(3, 5)}, r"dual must be float32 \[2, 5\], got float32 \[3, 5\]"),
        ({"dual": None}, "dual must be a NumPy array or"),
        ({"target": torch.zeros(3, 2)}, r"target must be float32 \[4, 2\], got float32 \[3, 2\]"),
        ({"gate": torch.zeros(4, 3)}, r"gate must be float32 \[4, 2\], got float32 \[4, 3\]"),
        ({"levels": None}, "levels must be a NumPy array or"),
        ({"levels": torch.zeros(4, 2)}, r"levels must be float32 \[4, 1\], got float32 \[4, 2\]"),
        ({"out": torch.zeros(8, 5).half()}, r"out must be float32 \[8, 5\], got float16 \[8, 5\]"),
        ({"out": torch.zeros(5).expand(8, 5)}, "out must be of separate rows"),
        ({"threads": 0}, r"threads must be in \[1, 1024\], got 0"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    edit, out = Edit(5, torch.float32, W=1), torch.full((8, 5), torch.nan)
    names = ("deltas", "basis", "dual", "target", "gate")
    arguments = {"rows": torch.zeros(8, 5), "slots": slots_for(8), "readers": edit.readers, "levels": edit.levels}
    arguments |= {**dict(zip(names, edit.tables(), strict=True)), "out": out, "threads": 1, **changes}
    with pytest.raises(ValueError, match=message):
        _C.steer_edit(**{k: view(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})
    assert out.isnan().all()
