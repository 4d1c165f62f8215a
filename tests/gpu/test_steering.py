"""Steering by the GPU's kernels: against float64 in every mode, rows left alone to the bit; compiled ahead of time."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emocore import ops
from emocore import reference_steering as exact
from emocore.directions import Directions
from emocore.errors import ShapeError
from emocore.kernels import steer_sets, steering
from emocore.reference import steer_add_ref, steer_set_ref
from emocore.steering import steer

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 3), (1, 1), (31, 3), (33, 17), (5, 65), (2, 384), (3, 2049)]
WORDS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty gives is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).to(device)


def directions(r: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A basis of unit rows and its dual."""
    basis = randn(r, dim, seed=1, dtype=torch.float64)
    basis = basis / basis.norm(dim=1, keepdim=True)
    return basis.float().to(device), torch.linalg.pinv(basis).T.float().to(device)


def sets(s: int, r: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """basis, dual [R, D], target, gate [S, R]: half of the gates open, one of them half."""
    gate = (torch.arange(s * r).view(s, r) % 2).float()
    gate[-1, -1] = 0.5
    return *directions(r, dim, device), randn(s, r, seed=2, device=device), gate.to(device)


def slots_of(n: int, s: int, device: torch.device) -> Tensor:
    """Slots -1 .. S of which -1, 0 and S are nothing."""
    return torch.randint(-1, s + 1, (n,), generator=torch.Generator().manual_seed(3)).int().to(device)


def agree(found: Tensor, wanted: Tensor, scale: float = 4.0) -> None:
    """To one rounding to the dtype of sums in float32; the interpreter truncates to bfloat16."""
    ulp = 2**-7 if found.dtype == torch.bfloat16 else torch.finfo(found.dtype).eps
    rounding = 1e-14 if found.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=ulp, atol=rounding * scale)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(WORDS[t.dtype])


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits; of float64, which the reference serves, the same sums: their order depends on strides."""
    if a.dtype == torch.float64:
        return torch.allclose(a, b, rtol=1e-14, atol=1e-13, equal_nan=True)
    return torch.equal(bits(a), bits(b))


def in_place(op: Callable[..., None], x: Tensor, *args: Any) -> Tensor:
    """What an op makes of x, in the middle of memory that must not change."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), 7.0, dtype=x.dtype, device=x.device)
    inner = wide[:, 2:-3]
    inner.copy_(x)
    op(inner, *args)
    assert bool((wide[:, :2] == 7).all() and (wide[:, -3:] == 7).all())
    across = x.T.contiguous().T
    op(across, *args)
    if x.dtype == torch.float64:  # by the reference, whose sums depend on strides
        torch.testing.assert_close(across, inner, equal_nan=True)
    else:
        assert torch.equal(bits(across), bits(inner))
    return inner.clone()


# --- every mode against float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, delta = randn(*shape, dtype=dtype, device=device), randn(shape[1], seed=1, device=device)
    found = ops.steer_add(x, delta)
    agree(found, steer_add_ref(x, delta))
    assert same(in_place(ops.steer_add_, x, delta), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "shared"), [((0, 3), False), ((0, 3), True), ((33, 17), False), ((33, 17), True), ((257, 100), False)]
)
def test_add_by_slot(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], shared: bool) -> None:
    x, deltas = randn(*shape, dtype=dtype, device=device), randn(4, shape[1], seed=1, device=device)
    n = shape[0]
    slots = torch.tensor([2], device=device).int() if shared else slots_of(n, 4, device)
    found = ops.steer_rows(x, slots, deltas)
    agree(found, exact.steer_rows_ref(x, slots, deltas))
    assert same(in_place(ops.steer_rows_, x, slots, deltas), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "r"), [((0, 3), 1), ((1, 33), 3), ((33, 100), 8), ((33, 17), 9), ((3, 384), 20)]
)  # past 8 by tensor cores
def test_set(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], r: int) -> None:
    x, target = randn(*shape, dtype=dtype, device=device), randn(r, seed=2, device=device)
    basis, dual = directions(r, shape[1], device)
    found = ops.steer_set(x, basis, dual, target)
    agree(found, steer_set_ref(x, basis, dual, target), scale=20)
    assert same(in_place(ops.steer_set_, x, basis, dual, target), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "r"), [((0, 3), 9), ((31, 1), 1), ((33, 100), 3), ((33, 65), 9), ((3, 2049), 1)])
def test_set_and_add_by_slot(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], r: int) -> None:
    x, deltas = randn(*shape, dtype=dtype, device=device), randn(4, shape[1], seed=4, device=device)
    slots, some = slots_of(shape[0], 4, device), sets(4, r, shape[1], device)
    found = ops.steer_rows(x, slots, deltas, *some)
    agree(found, exact.steer_rows_ref(x, slots, deltas, *some), scale=20)
    assert same(in_place(ops.steer_rows_, x, slots, deltas, *some), found)


def above(x: Tensor, slots: Tensor, w: int, s: int) -> tuple[Tensor, Tensor]:
    """Readers, and levels in gaps between the lower scores; one is none."""
    readers = randn(w, x.shape[1], seed=5, device=x.device)
    seen = (x.double() @ readers.double().T).sort(0).values[: len(x) // 2 + 1]
    levels = torch.zeros(s, w, device=x.device)
    for j in range(w if len(seen) > 1 else 0):
        gap, at = seen[:, j].diff().max(0)
        levels[:, j] = seen[at, j] + gap / 2
    levels[1, 0] = -torch.inf
    return readers, levels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "r", "w"), [((0, 3), 2, 1), ((33, 17), 0, 1), ((31, 100), 2, 1), ((4, 2049), 2, 3), ((9, 20), 0, 9)]
)
def test_conditional(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], r: int, w: int) -> None:
    x, deltas = randn(*shape, dtype=dtype, device=device), randn(4, shape[1], seed=4, device=device)
    slots, some = slots_of(shape[0], 4, device), sets(4, r, shape[1], device) if r else ()
    readers, levels = above(x, slots, w, 4)
    wanted = exact.steer_slots_ref(x, slots, readers, levels)
    assert torch.equal(ops.steer_slots(x, slots, readers, levels), wanted)
    found = ops.steer_when(x, slots, readers, levels, deltas, *some)
    agree(found, exact.steer_rows_ref(x, wanted, deltas, *some), scale=20)
    assert same(in_place(ops.steer_when_, x, slots, readers, levels, deltas, *some), found)


@pytest.mark.parametrize("r", [0, 3])
def test_small_and_large_conditional_edits_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch, r: int) -> None:
    x, deltas = randn(33, 100, device=device), randn(4, 100, seed=4, device=device)
    slots, some = slots_of(33, 4, device), sets(4, r, 100, device) if r else ()
    readers, levels = above(x, slots, 2, 4)
    at_once = ops.steer_when(x, slots, readers, levels, deltas, *some)
    monkeypatch.setattr(steer_sets, "EDIT_COLUMNS", 0)  # score, select, apply
    apart = ops.steer_when(x, slots, readers, levels, deltas, *some)
    torch.testing.assert_close(apart, at_once, rtol=1e-5, atol=1e-4)
    left = exact.steer_slots_ref(x, slots, readers, levels) == 0
    assert 0 < int(left.sum()) < 33
    assert torch.equal(apart[left], x[left])
    assert same(in_place(ops.steer_when_, x, slots, readers, levels, deltas, *some), apart)


def test_rows_wider_than_registers(device: torch.device) -> None:
    x, target = randn(3, 8200, dtype=torch.bfloat16, device=device), randn(2, seed=2, device=device)
    basis, dual = directions(2, 8200, device)
    agree(ops.steer_set(x, basis, dual, target), steer_set_ref(x, basis, dual, target), scale=20)


def test_more_directions_than_there_is_a_kernel_for(device: torch.device) -> None:
    x, target = randn(3, 200, device=device), randn(65, seed=2, device=device)
    basis, dual = directions(65, 200, device)
    wanted = steer_set_ref(x, basis, dual, target)
    assert torch.equal(ops.steer_set(x, basis, dual, target), wanted)
    assert same(in_place(ops.steer_set_, x, basis, dual, target), wanted)


def test_by_hand(device: torch.device) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [-0.0, 0.0]], device=device).bfloat16()
    slots = torch.tensor([1, 0, 2, 0], dtype=torch.int32, device=device)
    deltas = torch.tensor([[9.0, 9.0], [0.5, -1.0], [1.0, 0.0]], device=device)
    assert ops.steer_rows(x, slots, deltas).tolist() == [[1.5, 1], [3, 4], [6, 6], [0, 0]]
    up = torch.tensor([[0.0, 1.0]], device=device)
    target = torch.tensor([[0.0], [7.0], [0.0]], device=device)
    gate = torch.tensor([[0.0], [1.0], [0.0]], device=device)
    assert ops.steer_rows(x, slots, deltas, up, up, target, gate).tolist() == [[1.5, 6], [3, 4], [6, 6], [0, 0]]
    level = torch.tensor([[0.0], [2.0], [5.0]], device=device)  # a score at its level is not above it
    assert ops.steer_when(x, slots, up, level, deltas).tolist() == [[1, 2], [3, 4], [6, 6], [0, 0]]
    assert ops.steer_slots(x, slots, up, level).tolist() == [0, 0, 2, 0]
    assert ops.steer_set(x, up, up, target[1]).tolist() == [[1, 7], [3, 7], [5, 7], [0, 7]]


# --- rows that are left alone


AWKWARD = [-0.0, 0.0, 1e-45, torch.nan, torch.inf, -torch.inf, 3.0]


def awkward(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of what arithmetic does not leave alone, with a payload in every NaN."""
    x = torch.tensor(AWKWARD).repeat(n, 1).to(dtype)
    return (bits(x) + torch.where(x.isnan(), 5, 0).to(WORDS[dtype])).view(dtype).to(device)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r", [0, 2, 9])
@pytest.mark.parametrize("conditional", [False, True])
def test_rows_of_slot_0_keep_their_bits_beside_any_others(
    device: torch.device, dtype: torch.dtype, r: int, conditional: bool
) -> None:
    n, dim = 33, len(AWKWARD)
    x, slots = awkward(n, dtype, device), slots_of(n, 4, device)
    steered = (slots > 0) & (slots < 4)
    x[steered] = randn(int(steered.sum()), dim, seed=6, dtype=dtype, device=device)
    slots[5], steered[5] = 2, False  # to be steered, if there were a score: NaN exceeds nothing
    x[5] = awkward(1, dtype, device)
    op, in_op, args = ops.steer_rows, ops.steer_rows_, (randn(4, dim, seed=4, device=device),)
    if conditional:
        low = torch.full((4, 1), -1e30, device=device)
        op, in_op, args = ops.steer_when, ops.steer_when_, (randn(1, dim, seed=8, device=device), low, *args)
    else:
        slots[5] = 0
    some = sets(4, r, dim, device) if r else ()
    found = op(x, slots, *args, *some)
    assert torch.equal(bits(found)[~steered], bits(x)[~steered])
    assert found[steered].isfinite().all()
    assert bool((bits(found)[steered] != bits(x)[steered]).any(1).all())
    assert same(in_place(in_op, x, slots, *args, *some), found)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_gate_that_is_shut_lets_nothing_through(device: torch.device) -> None:
    """An infinite score beside a gate of 0 is not NaN."""
    x, deltas = torch.tensor([[torch.inf, 1.0, 2.0]], device=device), torch.ones(2, 3, device=device)
    slots = torch.ones(1, dtype=torch.int32, device=device)
    for r in (2, 10):  # 10 by tensor cores
        basis, dual, target, gate = sets(2, r, 3, device)
        found = ops.steer_rows(x, slots, deltas, basis, dual, target, torch.zeros_like(gate))
        assert found.tolist() == [[torch.inf, 2.0, 3.0]]


def test_rows_that_are_left_alone_are_not_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one tile that are one in memory: writing the second as it was would undo the first."""
    monkeypatch.setattr(steering, "STEER_FEW_ROWS", 0)
    monkeypatch.setattr(steer_sets, "EDIT_PROGRAMS", 1)
    deltas, level = randn(2, 8, seed=4, device=device), torch.tensor([[0.0], [-1e30]], device=device)
    reader = randn(1, 8, seed=5, device=device)
    slots = torch.tensor([1, 0], dtype=torch.int32, device=device)
    for r, call in [(r, c) for r in (0, 2, 9) for c in ("rows", "when")]:
        some = sets(2, r, 8, device) if r else ()
        x = randn(1, 8, device=device)
        wanted = ops.steer_rows(x, slots[:1], deltas, *some)
        twice = x.expand(2, 8)
        if call == "rows":
            ops.steer_rows_(twice, slots, deltas, *some)
        else:
            ops.steer_when_(twice, slots, reader, level, deltas, *some)
        torch.testing.assert_close(x, wanted, rtol=1e-5, atol=1e-5)


def test_slots_that_do_not_divide_the_rows_are_refused(device: torch.device) -> None:
    x, deltas = randn(6, 3, device=device), randn(2, 3, device=device)
    three = torch.tensor([0, 1, 0], dtype=torch.int32, device=device)
    moved = (ops.steer_rows(x, three, deltas) != x).any(1)
    assert moved.tolist() == [False, False, True, True, False, False]
    for slots in (three.repeat(2)[:4], three[:0]):
        with pytest.raises(ShapeError, match="divisor of 6 rows"):
            ops.steer_rows(x, slots, deltas)


def test_offsets_of_rows_pass_two_to_the_31(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2^30 elements apart, of memory that is never touched between."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    x = randn(3, 16, dtype=torch.bfloat16, device=device)
    apart = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device).as_strided((3, 16), (2**30, 1))
    slots, deltas = torch.ones(1, dtype=torch.int32, device=device), randn(2, 16, seed=4, device=device)
    for r in (0, 2, 9):
        some = sets(2, r, 16, device) if r else ()
        wanted = ops.steer_rows(x, slots, deltas, *some)
        apart.copy_(x)
        assert torch.equal(ops.steer_rows(apart, slots, deltas, *some), wanted)
        ops.steer_rows_(apart, slots, deltas, *some)
        assert torch.equal(apart, wanted)


# --- gradients, promises, and a model


@pytest.mark.parametrize("r", [2, 9])
def test_gradients_are_the_reference_s(device: torch.device, r: int) -> None:
    slots, deltas, some = slots_of(7, 3, device), randn(3, 20, seed=4, device=device), sets(3, r, 20, device)
    reader, level = randn(1, 20, seed=5, device=device), torch.zeros(3, 1, device=device)
    weight = randn(7, 20, seed=9, device=device)

    def gradients() -> list[Tensor]:
        found = []
        for call in (
            lambda x: ops.steer_rows(x, slots, deltas, *some),
            lambda x: ops.steer_when(x, slots, reader, level, deltas, *some),
            lambda x: ops.steer_set(x, some[0], some[1], some[2][0]),
        ):
            x = randn(7, 20, device=device).requires_grad_()
            (call(x) * weight).sum().backward()
            assert x.grad is not None
            found.append(x.grad)
        return found

    found = gradients()
    with ops.use("reference"):
        for a, b in zip(found, gradients(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_ops_keep_what_they_promise_the_compiler(device: torch.device) -> None:
    x, slots = randn(5, 20, dtype=torch.bfloat16, device=device), slots_of(5, 3, device)
    deltas, some = randn(3, 20, seed=4, device=device), sets(3, 2, 20, device)
    when = (randn(1, 20, seed=5, device=device), torch.zeros(3, 1, device=device))
    check, names = torch.library.opcheck, torch.ops.emocore
    check(names.steer_rows.default, (x, slots, deltas, *some))
    check(names.steer_rows_.default, (x, slots, deltas))
    check(names.steer_when.default, (x, slots, *when, deltas, *some))
    check(names.steer_when_.default, (x, slots, *when, deltas))
    check(names.steer_set_.default, (x, some[0], some[1], some[2][0]))
    check(names.steer_slots.default, (x, slots, *when))


@pytest.mark.parametrize(
    "how",
    [
        {"add": {"a": 0.5}},
        {"ablate": ["a", "b"]},
        {"clamp": {"a": 1.0}, "add": {"b": 0.5}},
        {"add": {"a": 0.5}, "when": {"b": 0.0}},
        {"requests": {"x": {"add": {"a": 1.0}}, "y": {"ablate": "a", "when": {"b": 0.0}}}},
    ],
)
def test_a_model_is_steered_as_by_the_reference(device: torch.device, how: dict[str, Any]) -> None:
    patterns = randn(2, 8, seed=1, dtype=torch.float64)
    vectors = Directions(
        names=("a", "b"),
        patterns=patterns,
        readers=(patterns / patterns.norm(dim=1, keepdim=True)).float(),
        centre=randn(8, seed=2, dtype=torch.float64),
        mean_norm=4.0,
        residual=torch.ones(2, dtype=torch.float64),
        hook_point="0",
    )
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity()).to(device)
    x = randn(3, 5, 8, device=device)

    def run() -> Tensor:
        with torch.no_grad(), steer(model, vectors, **how) as steering:
            if "requests" not in how:
                return model(x)
            with steering.batch(requests=["x", None, "y"]):
                return model(x)

    found = run()
    with ops.use("reference"):
        torch.testing.assert_close(found, run(), rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, model(x))


COMPILED = """
import dataclasses, re
from emocore import aot
ROWS16 = r"ld\\.global\\S*v4\\.b32", r"st\\.global\\S*v4\\.b32"
for module in ("steering", "steer_sets", "steer_slots", "steer_wide"):
    for variant in aot.variants(module):
        for arch in aot.ARCHITECTURES:
            built = aot.obtain(variant, arch)
            assert built.spilled == 0, built.name
            assert built.shared <= 64 * 1024, built.name
            if "x_ptr" not in variant.types:
                continue
            assert "cvt.rn.bf16" in built.ptx, built.name  # one rounding, to nearest
            assert re.search(ROWS16[0] + "|cp.async.cg.shared.global[^;]*, (0x10|16)", built.ptx), built.name
            assert re.search(ROWS16[1], built.ptx), built.name
            assert re.search(r"mma|tcgen05", built.ptx) or module != "steer_wide", built.name
    if "x_stride" in variant.types:  # strides as narrow as they come are multiplied in 64 bits
        narrow = {**variant.types, "x_stride": "i32", "out_stride": "i32"}
        ptx = aot.build(dataclasses.replace(variant, types=narrow), 90).ptx
        given = [p.name for p in variant.kernel.params if p.name in narrow]
        for name in ("x_stride", "out_stride"):
            stride = re.search(r"ld\\.param\\.b32\\s+(%r\\d+), \\[\\w+_param_" + str(given.index(name)) + r"\\]", ptx)
            assert not re.search(r"(mul|mad)\\.lo\\.s32[^;]*" + stride[1] + r"\\b", ptx), variant.name
"""


def test_every_form_compiles_without_spills_and_with_wide_accesses(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
