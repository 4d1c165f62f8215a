"""Sums by label: sorting, the drain's fold and the op, against float64."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from emocore import ops
from emocore.kernels import folding, label_sums, sorting
from emocore.reference import label_sums_ref
from emocore.reference_drain import fold_labels_ref, sort_labels_ref

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32, torch.float64]
PATTERNS = ["shuffled", "runs", "one", "none", "skewed", "last", "out of range"]
INT_MAX = 2**31 - 1


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces so short that blocks of the size of a test have many."""
    monkeypatch.setattr(folding, "FOLD_PIECE", 32)
    monkeypatch.setattr(folding, "FOLD_ROWS", 4)
    monkeypatch.setattr(sorting, "SORT_TILE", 64)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def pattern(name: str, k: int, n: int, g: torch.Generator) -> Tensor:
    """Labels [n] int32."""
    shuffled = torch.randint(-1, max(k, 1), (n,), generator=g)
    odd = torch.tensor([k, k + 7, -5, INT_MAX, -INT_MAX - 1])[torch.randint(0, 5, (n,), generator=g)]
    labels = {
        "shuffled": shuffled,
        "runs": shuffled.sort().values,
        "one": torch.zeros(n),
        "none": torch.full((n,), -1),
        "skewed": shuffled.where(torch.rand(n, generator=g) < 0.1, 0),
        "last": torch.full((n,), k - 1),
        "out of range": shuffled.where(torch.rand(n, generator=g) < 0.5, odd),
    }
    return labels[name].int()


def ring(
    device: torch.device,
    labels: str = "shuffled",
    k: int = 3,
    dim: int = 17,
    dtype: torch.dtype = torch.bfloat16,
    points: int = 2,
    block: int = 160,
    waiting: int | None = None,
) -> SimpleNamespace:
    """A group whose block is the ring's second half; what is not of the block is NaN, marked, and labelled."""
    g = torch.Generator().manual_seed(k * dim + block)
    rows = torch.full((points, 2 * block, dim), torch.nan, dtype=dtype)
    rows[:, block:] = (torch.randn(points, block, dim, generator=g).double() * 3 + 5).to(dtype)
    marks = torch.full((points, 2 * block), 2, dtype=torch.int8)
    marks[:, block:] = torch.randint(0, 3, (points, block), generator=g)
    ids = torch.zeros(2 * block, dtype=torch.int32)
    ids[block:] = pattern(labels, k, block, g)
    f64 = {"dtype": torch.float64}
    group = {
        "rows": rows,
        "marks": marks,
        "labels": ids,
        "cursor": torch.tensor([3 * block + (block + 5 if waiting is None else waiting), 3 * block]),
        "order": torch.full((block,), -77, dtype=torch.int32),
        "starts": torch.full((k + 2,), -77, dtype=torch.int32),
        "shift": torch.randn(points, dim, generator=g, **f64),
        "totals": torch.randn(points, k + 1, dim, generator=g, **f64),
        "squares": torch.rand(points, k + 1, dim, generator=g, **f64),
        "counts": torch.randint(0, 9, (points, k + 1), generator=g),
    }
    return SimpleNamespace(block=block, **{name: t.to(device) for name, t in group.items()})


def drain(group: SimpleNamespace, reference: bool = False) -> tuple[Tensor, ...]:
    """Sort and fold; returns what they wrote."""
    sort, fold = (sort_labels_ref, fold_labels_ref) if reference else (sorting.sort_labels, folding.fold_labels)
    sort(group.labels, group.cursor, group.block, group.order, group.starts)
    state = [t.clone() for t in (group.totals, group.squares, group.counts)]
    args = (group.rows, group.marks, group.cursor, group.block, group.order, group.starts, group.shift)
    with contextlib.nullcontext() if reference else poisoned():
        fold(*args, *state)
    return group.order.clone(), group.starts.clone(), *state


def agree(group: SimpleNamespace) -> None:
    found, wanted = drain(group), drain(group, reference=True)
    for a, b, name in zip(found, wanted, ["order", "starts", "totals", "squares", "counts"], strict=True):
        if a.is_floating_point():
            size = float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13 * size, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("labels", PATTERNS)
def test_drain_equals_float64(device: torch.device, labels: str) -> None:
    agree(ring(device, labels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "block"), [(1, 33), (100, 64), (384, 31)])
def test_drain_at_every_dtype_and_width(device: torch.device, dtype: torch.dtype, dim: int, block: int) -> None:
    agree(ring(device, "skewed", dim=dim, block=block, dtype=dtype, points=1))


@pytest.mark.parametrize(("k", "labels"), [(0, "out of range"), (1, "shuffled"), (171, "shuffled")])
def test_drain_at_every_number_of_labels(device: torch.device, k: int, labels: str) -> None:
    agree(ring(device, labels, k=k, dim=5, points=1, block=128))


def test_drain_with_pieces_as_they_ship(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with ops.use("triton"):
        agree(ring(device, "skewed", k=2, dim=3, block=600, points=1))


SORTS = [(1, 1), (3, 200)]


@pytest.mark.parametrize(
    ("k", "block", "labels"),
    [(*size, labels) for size in SORTS for labels in PATTERNS] + [(300, 64, "shuffled"), (300, 64, "out of range")],
)
def test_sorting_is_stable(device: torch.device, k: int, block: int, labels: str) -> None:
    group = ring(device, labels, k=k, block=block, dim=1)
    found = []
    for sort in (sorting.sort_labels, sort_labels_ref):
        group.order.fill_(-77)
        group.starts.fill_(-77)
        sort(group.labels, group.cursor, block, group.order, group.starts)
        found.append((group.order.clone(), group.starts.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_literal_drain(device: torch.device) -> None:
    group = ring(device, k=2, dim=2, points=1, block=5)
    group.labels[5:] = torch.tensor([1, -1, 1, 0, 1], dtype=torch.int32)
    group.rows[0, 5:] = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [9, 9]])
    group.marks[0, 5:] = torch.tensor([1, 1, 2, 2, 0], dtype=torch.int8)
    group.shift[:] = torch.tensor([1.0, 2.0])
    for state in (group.totals, group.squares, group.counts):
        state.zero_()
    order, starts, totals, squares, counts = drain(group)
    assert order.tolist() == [3, 0, 2, 4, 1]
    assert starts.tolist() == [0, 1, 4, 5]
    assert totals[0].tolist() == [[6, 6], [4, 4], [2, 2]]
    assert squares[0].tolist() == [[36, 36], [16, 16], [4, 4]]
    assert counts[0].tolist() == [1, 2, 1]


@pytest.mark.parametrize("dtype", HALVES)
def test_widening_is_exact(device: torch.device, dtype: torch.dtype) -> None:
    """Every finite number of 16 bits, a row each, comes out as it is; so do subnormals and zeros."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = bits[bits.isfinite()].view(4, -1)
    group = ring(device, k=0, dim=numbers.shape[1], points=1, block=4, dtype=dtype)
    group.rows[0, 4:], group.marks[:], group.labels[:] = numbers, 1, 0
    group.shift.zero_()
    group.totals.zero_()
    totals = drain(group)[2]
    assert torch.equal(totals[0, 0].cpu(), numbers.double().sum(0))
    group.rows[0, 5:] = 0
    assert torch.equal(drain(group)[2][0, 0].cpu(), numbers[0].double())


def test_rows_marked_0_add_nothing_whatever_they_hold(device: torch.device) -> None:
    group = ring(device)
    wanted = drain(group)
    group.rows[group.marks == 0] = 3e38
    for a, b in zip(drain(group), wanted, strict=True):
        assert torch.equal(a, b)


def test_a_second_drain_allocates_nothing(device: torch.device) -> None:
    group = ring(device, "skewed", points=1, dim=3, block=96)
    sorting.sort_labels(group.labels, group.cursor, group.block, group.order, group.starts)
    state = [torch.zeros_like(t) for t in (group.totals, group.squares, group.counts)]
    args = (group.rows, group.marks, group.cursor, group.block, group.order, group.starts, group.shift, *state)
    folding.fold_labels(*args)
    parts, once = folding._parts[state[0]], [t.clone() for t in state]
    folding.fold_labels(*args)
    assert folding._parts[state[0]] is parts
    for a, b in zip(state, once, strict=True):
        torch.testing.assert_close(a, 2 * b)
    held = len(folding._parts)
    del state, args, a
    assert len(folding._parts) == held - 1


@pytest.mark.parametrize("waiting", [0, 159])
def test_nothing_happens_before_a_block_is_full(device: torch.device, waiting: int) -> None:
    group = ring(device, waiting=waiting)
    for state in (group.totals, group.squares):
        state.fill_(torch.nan)
    order, starts, totals, squares, counts = drain(group)
    assert bool((order == -77).all())
    assert bool((starts == -77).all())
    assert bool(totals.isnan().all())
    assert bool(squares.isnan().all())
    assert torch.equal(counts, group.counts)


@pytest.mark.parametrize("labels", ["skewed", "shuffled"])
def test_bits_do_not_depend_on_the_company(device: torch.device, labels: str) -> None:
    """Again, alone, at another place of the ring, among more labels: the same bits."""
    group = ring(device, labels, points=3, dim=9, block=96)
    wanted = drain(group)
    again = drain(group)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))

    alone = SimpleNamespace(**vars(group))
    for name in ("rows", "marks", "shift", "totals", "squares", "counts"):
        setattr(alone, name, getattr(group, name)[1:2].contiguous())
    assert all(torch.equal(a, b[1:2]) for a, b in zip(drain(alone)[2:], wanted[2:], strict=True))

    moved = SimpleNamespace(**vars(group))
    for name, axis in (("rows", 1), ("marks", 1), ("labels", 0)):
        setattr(moved, name, getattr(group, name).roll(group.block, axis))
    moved.cursor = group.cursor + group.block
    assert all(torch.equal(a, b) for a, b in zip(drain(moved), wanted, strict=True))

    more = SimpleNamespace(**vars(group))
    more.labels = torch.where(group.labels < 0, -1, group.labels + 4)
    more.starts = group.starts.new_empty(9)
    at = torch.tensor([4, 5, 6, 7], device=device)  # the unlabelled are 7
    for name in ("totals", "squares", "counts"):
        wide = getattr(group, name).new_zeros(3, 8, *group.totals.shape[2 : getattr(group, name).dim()])
        wide[:, at] = getattr(group, name)
        setattr(more, name, wide)
    assert all(torch.equal(a[:, at], b) for a, b in zip(drain(more)[2:], wanted[2:], strict=True))


# --- the op


def op_arguments(
    n: int, dim: int, k: int, dtype: torch.dtype, labelled: bool, weighted: bool, squares: bool, device: torch.device
) -> tuple:
    g = torch.Generator().manual_seed(n + dim)
    rows = (torch.randn(n, dim, generator=g).double() * 2 + 3).to(dtype)
    labels = torch.randint(-1, k, (n,), generator=g).int() if labelled else None
    weights = torch.rand(n, generator=g).double() if weighted else None
    state = [torch.randn(k, dim, generator=g).double() for _ in range(1 + squares)]
    shift = torch.randn(dim, generator=g).double()
    args = (rows, labels, weights, shift, *state, *([] if squares else [None]))
    return tuple(None if a is None else a.to(device) for a in args)


def agree_op(args: tuple) -> None:
    rows, labels, weights, shift, sums, squares = args
    wanted = [None if t is None else t.clone() for t in (sums, squares)]
    known = labels if labels is None else labels.where(labels < len(sums), -1)
    label_sums_ref(rows, known, weights, shift, *wanted)
    with poisoned():
        ops.label_sums(*args)
    for a, b in zip((sums, squares), wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_op_equals_float64(device: torch.device, labelled: bool, weighted: bool, squares: bool) -> None:
    agree_op(op_arguments(130, 17, 3, torch.bfloat16, labelled, weighted, squares, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "k"), [(0, 3, 2), (1, 1, 1), (33, 65, 40), (64, 384, 2)])
def test_op_at_every_shape(device: torch.device, dtype: torch.dtype, n: int, dim: int, k: int) -> None:
    agree_op(op_arguments(n, dim, k, dtype, True, True, True, device))


def test_op_in_several_sorts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_sums, "LABEL_SUMS_ROWS", 64)
    for labelled in (True, False):
        agree_op(op_arguments(150, 5, 3, torch.float32, labelled, True, True, device))


@pytest.mark.parametrize("view", ["offset", "strided", "transposed", "expanded", "columns of the sums"])
def test_op_on_views(device: torch.device, view: str) -> None:
    rows, labels, weights, shift, sums, squares = op_arguments(40, 16, 3, torch.float16, True, True, True, device)
    wide = rows.new_full((80, 21), torch.nan)
    if view == "offset":
        wide[:40, 3:19] = rows
        rows = wide[:40, 3:19]
    elif view == "strided":
        wide[::2, :16] = rows
        rows = wide[::2, :16]
    elif view == "transposed":
        rows = rows.T.contiguous().T
    elif view == "expanded":
        rows = rows[:1].expand(40, 16)
    else:
        big = sums.new_full((2, 3, 20), 7.0)
        big[0, :, :16], big[1, :, :16] = sums, squares
        sums, squares = big[0, :, :16], big[1, :, :16]
    agree_op((rows, labels, weights, shift, sums, squares))
    if view == "columns of the sums":
        assert bool((big[..., 16:] == 7).all())


def test_op_leaves_out_labels_that_there_are_not(device: torch.device) -> None:
    args = list(op_arguments(60, 4, 3, torch.float32, True, False, True, device))
    g = torch.Generator().manual_seed(0)
    args[1] = pattern("out of range", 3, 60, g).to(device)
    args[0][(args[1] < 0) | (args[1] > 2)] = torch.nan
    agree_op(tuple(args))
    assert not args[4].isnan().any()
    empty = torch.zeros(0, 4, dtype=torch.float64, device=device)
    ops.label_sums(args[0], args[1], None, args[3], empty, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_op_keeps_nan_and_infinity_to_their_label_and_column(device: torch.device, dtype: torch.dtype) -> None:
    args = op_arguments(40, 6, 3, dtype, True, False, True, device)
    args[1][:3] = torch.tensor([0, 0, 1], dtype=torch.int32)
    args[0][0, 2], args[0][1, 3], args[0][2, 5] = torch.nan, torch.inf, -torch.inf
    agree_op(args)
    finite = args[4].isfinite()
    assert (~finite).nonzero().tolist() == [[0, 2], [0, 3], [1, 5]]


def test_literal_op(device: torch.device) -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    labels = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    weights = torch.tensor([1.0, 2.0, 0.5], device=device).double()
    shift, sums, squares = (torch.ones(*s, device=device).double() for s in ((2,), (2, 2), (2, 2)))
    ops.label_sums(rows, labels, weights, shift, sums, squares)
    assert sums.tolist() == [[5, 7], [3, 4.5]]
    assert squares.tolist() == [[9, 19], [9, 14.5]]
    ops.label_sums(rows, None, None, shift, sums, None)
    assert sums.tolist() == [[11, 16], [3, 4.5]]


def test_the_drain_asks_for_these_kernels() -> None:
    with ops.use("triton"):
        assert ops.step("sort_labels", torch.device("cpu")) is sorting.sort_labels
        assert ops.step("fold_labels", torch.device("cpu")) is folding.fold_labels
    with ops.use("reference"):
        assert ops.step("fold_labels", torch.device("cuda")) is fold_labels_ref


COMPILED = r"""
import dataclasses, pathlib, re, subprocess, sys, triton
from emocore import aot

folder = pathlib.Path(sys.argv[1])
tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
factors = "(4104|4112|8208|8224|16416|16448|32832|32896)"  # of an offset, in numbers or bytes
for module in ("folding", "label_sums", "sorting"):
    for variant in aot.variants(module):
        if variant.constants.get("D", 4096) != 4096 or "*fp16:16" in variant.types.values():
            continue
        drain = "*bf16:16" in variant.types.values() and "cursor_ptr" in variant.types
        for arch in aot.ARCHITECTURES if drain else (90,):
            built = aot.build(variant, arch)
            assert built.spilled == 0 and built.registers <= 128, built  # 16 warps to a multiprocessor
        if "rows_ptr" not in variant.types:
            continue
        (folder / "cubin").write_bytes(built.cubin)
        code = subprocess.run([tool, "-sass", folder / "cubin"], capture_output=True, text=True, check=True).stdout
        # 8 rows and the shift, 16 bytes a lane each, all on their way before the first number is added
        ahead = re.split(r"\bD(?:ADD|FMA|MUL)\b", code)[0]
        assert ahead.count("LDG.E.128") >= 8 + variant.constants["BLOCK_D"] // 64, built.name
        if not drain:
            continue
        odd = {**variant.constants, "D": 4104, "STRIDE": 4112}
        ptx = aot.build(dataclasses.replace(variant, constants=odd), 90).ptx
        assert re.search(rf"m(ul|ad)\.(wide\.[su]32|lo\.[su]64)[^;]*, {factors}\b", ptx)
        assert not re.search(rf"m(ul|ad)\.lo\.[su]32[^;]*, {factors}\b", ptx)
"""


def test_it_compiles_without_spills_and_with_wide_accesses_and_offsets(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
