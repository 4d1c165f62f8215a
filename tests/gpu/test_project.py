"""Scores by the GPU's kernels: against float64, in every form, in hostile shapes; compiled for every architecture."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emocore import ops, packing, reference_steering
from emocore.kernels import project as kernel
from emocore.reference import project_ref

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(0, 8, 3), (1, 1, 1), (31, 3, 9), (33, 17, 8), (5, 65, 171), (33, 100, 12), (3, 2048, 2)]
# Of |x| |v|: 16-bit products are exact and sums are float32, of at most 2,048 terms here; the interpreter's alike.
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What torch.empty gives is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def unit(k: int, dim: int, seed: int = 1, device: object = None) -> Tensor:
    v = randn(k, dim, seed=seed)
    return (v / v.norm(dim=1, keepdim=True)).to(device)


def close(found: Tensor, exact: Tensor, x: Tensor, centre: Tensor | None = None) -> None:
    """Scores of unit readers agree to TOLERANCE of the rows' lengths."""
    length = x.double().norm(dim=-1, keepdim=True) + (0 if centre is None else centre.norm())
    assert found.shape == exact.shape
    assert not found.isnan().any()
    assert bool(((found.double() - exact.double()).abs() <= TOLERANCE * length + 1e-30).all())


# --- one hook point


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centred", [False, True])
def test_scores_are_those_of_the_rounded_readers(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], centred: bool
) -> None:
    n, dim, k = shape
    x, v = randn(n, dim, dtype=dtype, device=device), unit(k, dim, device=device)
    centre = randn(dim, seed=2, device=device).double() if centred else None
    few = k <= 8
    rounded = packing.split(v, torch.float32 if few else dtype).double().sum(0)
    found = ops.project(x, v, centre, False)
    assert found.dtype == torch.float32
    close(found, project_ref(x, rounded, centre, False), x, centre)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[2:5])
@pytest.mark.parametrize("centred", [False, True])
def test_cosines(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], centred: bool) -> None:
    n, dim, k = shape
    x, v = randn(n, dim, dtype=dtype, device=device), unit(k, dim, device=device)
    x[1] = 0
    centre = x[2].double() if centred else None
    found = ops.project(x, v, centre, True)
    exact = project_ref(x, v.double(), centre, True)
    # two 16-bit parts are v to 2^-17
    torch.testing.assert_close(found.double(), exact.double(), rtol=0, atol=2e-5)
    assert not found[2 if centred else 1].any()  # what is no longer than 0 scores 0


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [3, 40])
def test_packed_readers(device: torch.device, dtype: torch.dtype, parts: int, k: int) -> None:
    x, v = randn(33, 70, dtype=dtype, device=device), unit(k, 70, device=device)
    packed, offset = packing.pack(v, randn(70, seed=3).double().to(device), dtype, parts)
    exact = reference_steering.project_packed_ref(x, packed, offset, False)
    close(ops.project_packed(x, packed, offset, False), exact, x, offset)
    found = ops.project_packed(x, packed, torch.zeros_like(offset), True)
    exact = reference_steering.project_packed_ref(x, packed, torch.zeros_like(offset), True)
    torch.testing.assert_close(found, exact, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["short", "low", "tall", "wide"])
@pytest.mark.parametrize(("dim", "normalise"), [(65, True), (128, False)])
def test_every_form_of_the_table(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, form: str, dim: int, normalise: bool
) -> None:
    if torch.cuda.is_available() and form == "wide" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("sm_80 has no such form")
    monkeypatch.setattr(kernel, "form_of", lambda x, plain: form)
    x, v = randn(35, dim, dtype=torch.bfloat16, device=device), unit(171, dim, device=device)
    packed, offset = packing.pack(v, None, torch.bfloat16)
    exact = reference_steering.project_packed_ref(x, packed, offset, normalise)
    close(ops.project_packed(x, packed, offset, normalise), exact, x)


def test_readers_are_padded_to_few_columns_more() -> None:
    assert [(t.head, t.tail, t.groups) for t in (kernel.tile_of("tall", 171, 2, torch.bfloat16),)] == [(128, 64, 1)]
    for form in ("short", "low", "tall", "wide"):
        for k in range(1, 513):
            tile = kernel.tile_of(form, k, 1, torch.bfloat16)
            columns = tile.groups * (tile.head + tile.tail)
            assert columns >= k
            assert k <= 64 or columns <= 1.5 * k or columns - k < 64


VIEWS = {
    "strided": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view_as(x),
    "transposed": lambda x: x.T.contiguous().T,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "backwards": lambda x: x.flip(0),
}


@pytest.mark.parametrize("view", list(VIEWS))
@pytest.mark.parametrize("k", [2, 12])
def test_views_score_like_their_copies(device: torch.device, view: str, k: int) -> None:
    x = VIEWS[view](randn(9, 48, dtype=torch.bfloat16, device=device))
    packed, offset = packing.pack(unit(k, 48, device=device), None, torch.bfloat16)
    found = ops.project_packed(x, packed, offset, False)
    assert torch.equal(found, ops.project_packed(x.contiguous(), packed, offset, False))
    close(found, reference_steering.project_packed_ref(x, packed, offset, False), x)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("k", [2, 12])
@pytest.mark.parametrize("normalise", [False, True])
def test_a_bad_row_stays_with_itself(device: torch.device, k: int, normalise: bool) -> None:
    x = randn(9, 48, dtype=torch.bfloat16, device=device)
    packed, offset = packing.pack(unit(k, 48, device=device), None, torch.bfloat16)
    whole = ops.project_packed(x, packed, offset, normalise)
    x[2, 5], x[4] = torch.nan, torch.inf
    found = ops.project_packed(x, packed, offset, normalise)
    good = [0, 1, 3, 5, 6, 7, 8]
    assert torch.equal(found[good], whole[good])
    assert found[2].isnan().all()
    assert not found[4].isfinite().any()


def test_by_hand(device: torch.device) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=device)
    v = torch.tensor([[1.0, 0.0], [0.0, 2.0]], device=device)
    assert ops.project(x, v, None, False).tolist() == [[3, 8], [0, 0]]
    centre = torch.tensor([1.0, 1.0], device=device).double()
    assert ops.project(x, v, centre, False).tolist() == [[2, 6], [-1, -2]]
    assert ops.project(x, v, None, True).tolist() == [pytest.approx([0.6, 1.6]), [0, 0]]
    many = v.repeat(6, 1)  # by tensor cores
    assert ops.project(x.half(), many, centre, False).tolist() == [[2, 6] * 6, [-1, -2] * 6]


@pytest.mark.parametrize("k", [2, 12])
def test_offsets_of_rows_pass_two_to_the_31(device: torch.device, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """Rows 2^30 elements apart, of memory that is never touched between."""
    x = randn(3, 16, dtype=torch.bfloat16, device=device)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
    apart = far.as_strided((3, 16), (2**30, 1))
    apart.copy_(x)
    packed, offset = packing.pack(unit(k, 16, device=device), None, torch.bfloat16)
    assert torch.equal(ops.project_packed(apart, packed, offset, False), ops.project_packed(x, packed, offset, False))


# --- a group of hook points


@pytest.mark.parametrize("k", [2, 12])
@pytest.mark.parametrize("count", [None, 0, 1, 17, 99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_group_is_scored_at_once(device: torch.device, dtype: torch.dtype, count: int | None, k: int) -> None:
    ring = randn(3, 40, 50, dtype=dtype, device=device)
    rows = ring[:, 7:40]  # [3, 33, 50]
    packs = [packing.pack(unit(k, 50, seed=s, device=device), rows[s, 0].double(), dtype) for s in range(3)]
    packed, offset = torch.stack([p.readers for p in packs]), torch.stack([p.offset for p in packs])
    out = torch.full((3, 40, k), torch.nan, device=device)
    held = None if count is None else torch.tensor([count], device=device)
    ops.project_rows(rows, packed, offset, held, out[:, :33])
    n = 33 if count is None else min(count, 33)
    for s in range(3):
        exact = reference_steering.project_packed_ref(rows[s, :n], packed[s], offset[s], False)
        close(out[s, :n], exact, rows[s, :n], offset[s])
    assert out[:, n:].isnan().all()


def test_scores_of_a_group_go_into_any_memory(device: torch.device) -> None:
    rows = randn(2, 5, 20, dtype=torch.bfloat16, device=device)
    packed = torch.stack([packing.split(unit(12, 20, device=device), torch.bfloat16)] * 2)
    straight, across = torch.zeros(2, 5, 12, device=device), torch.zeros(2, 12, 5, device=device)
    ops.project_rows(rows, packed, packed.new_zeros(2, 12).float(), None, straight)
    ops.project_rows(rows, packed, packed.new_zeros(2, 12).float(), None, across.mT)
    assert straight.any()
    assert torch.equal(straight, across.mT)


# --- pooled


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("starts", [[0, 3], [0, 0, 1, 1, 64, 65, 200, 200], [5, 5, 70, 134, 333], [0]])
@pytest.mark.parametrize("k", [1, 70])
def test_pools_of_sequences(device: torch.device, starts: list[int], k: int) -> None:
    scores = randn(starts[-1] + 7, k + 3, device=device)[:, 3:]
    edges = torch.tensor(starts, dtype=torch.int32, device=device)
    if len(starts) > 5:
        scores[100, 0] = torch.nan
    largest, mean = ops.pool_scores(scores, edges)
    for found, exact in zip((largest, mean), reference_steering.pool_scores_ref(scores, edges), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_sequence_pools_alike_wherever_it_stands(device: torch.device) -> None:
    scores = randn(1000, 3, device=device)

    def pooled(first: int) -> list[Tensor]:
        moved = torch.cat([randn(first, 3, seed=9, device=device), scores])
        edges = torch.tensor([0, first, first + 1000], dtype=torch.int32, device=device)
        return [t[1] for t in ops.pool_scores(moved, edges)]

    for a, b in zip(pooled(0), pooled(37), strict=True):
        assert torch.equal(a, b)


# --- scored and steered in one read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "k"), [(0, 8, 3), (33, 17, 12), (5, 65, 171), (70, 64, 3)])
@pytest.mark.parametrize("shared", [False, True])
def test_scores_are_of_the_rows_before_they_are_steered(
    device: torch.device, dtype: torch.dtype, n: int, dim: int, k: int, shared: bool
) -> None:
    x, deltas = randn(n, dim, dtype=dtype, device=device), randn(3, dim, seed=4, device=device)
    packed, offset = packing.pack(unit(k, dim, device=device), None, dtype)
    slots = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(5)).int().to(device)  # 3 is none
    slots = torch.tensor([2], dtype=torch.int32, device=device) if shared else slots
    exact = reference_steering.project_packed_ref(x, packed, offset, False)
    steered = ops.steer_rows(x, slots, deltas)
    scores, y = ops.project_steer(x, packed, offset, slots, deltas)
    close(scores, exact, x)
    assert torch.equal(y, steered)
    scores = ops.project_steer_(x, packed, offset, slots, deltas)
    close(scores, exact, y)
    assert torch.equal(x, steered)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_rows_that_are_only_scored_keep_their_bits(device: torch.device, dtype: torch.dtype, shared: bool) -> None:
    x = torch.tensor([[-0.0, 1.0, torch.nan, 1e-45], [1.0, -0.0, torch.inf, 2.0]], device=device).to(dtype)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    x.view(word)[0, 2] += 5  # a payload
    before = x.clone()
    packed, offset = packing.pack(unit(9, 4, device=device), None, dtype)
    slots = torch.tensor([0] if shared else [0, 7], dtype=torch.int32, device=device)
    _, y = ops.project_steer(x, packed, offset, slots, torch.ones(2, 4, device=device))
    ops.project_steer_(x, packed, offset, slots, torch.ones(2, 4, device=device))
    assert torch.equal(y.view(word), before.view(word))
    assert torch.equal(x.view(word), before.view(word))


# --- gradients, fakes, and what asks for these kernels


def test_gradients_are_the_reference_s(device: torch.device) -> None:
    x = randn(5, 20, dtype=torch.float32, device=device).requires_grad_()
    packed, offset = packing.pack(unit(12, 20, device=device), None, torch.float32)
    slots, deltas = torch.ones(1, dtype=torch.int32, device=device), randn(2, 20, seed=7, device=device)
    ops.project_packed(x, packed, offset, False).square().sum().backward()
    exact = 2 * (x.detach() @ packed[0].T) @ packed[0]
    torch.testing.assert_close(x.grad, exact, rtol=1e-5, atol=1e-5)
    x.grad = None
    scores, y = ops.project_steer(x, packed, offset, slots, deltas)
    (scores.square().sum() + 3 * y.sum()).backward()
    torch.testing.assert_close(x.grad, exact + 3, rtol=1e-5, atol=1e-5)


def test_ops_keep_what_they_promise_the_compiler(device: torch.device) -> None:
    x, slots = randn(5, 20, dtype=torch.bfloat16, device=device), torch.ones(5, dtype=torch.int32, device=device)
    packed, offset = packing.pack(unit(12, 20, device=device), None, torch.bfloat16)
    deltas, out = randn(2, 20, device=device), torch.zeros(1, 5, 12, device=device)
    namespace = torch.ops.emocore
    torch.library.opcheck(namespace.project_packed.default, (x, packed, offset, True))
    torch.library.opcheck(namespace.project_rows.default, (x[None], packed[None], offset[None], None, out))
    torch.library.opcheck(namespace.project_steer.default, (x, packed, offset, slots, deltas))
    torch.library.opcheck(namespace.project_steer_.default, (x, packed, offset, slots, deltas))
    torch.library.opcheck(namespace.pool_scores.default, (out[0], torch.tensor([0, 2, 5]).int().to(device)))


def test_float64_rows_and_readers_go_to_the_reference(device: torch.device) -> None:
    x, v = randn(5, 20, device=device).double(), unit(12, 20, device=device)
    assert torch.equal(ops.project(x, v, None, False), project_ref(x, v, None, False))
    found = ops.project(x.bfloat16(), v.double(), None, False)
    assert torch.equal(found, project_ref(x.bfloat16(), v.double(), None, False))
    assert found.dtype == torch.float64


COMPILED = """
import re
from emocore import aot
from emocore.kernels import project
TENSOR_CORES = {80: r"mma\\.sync\\S*(bf16|f16|tf32)", 90: r"(wgmma\\.mma_async|mma\\.sync)\\S*(bf16|f16|tf32)",
                100: r"tcgen05\\.mma|mma\\.sync\\S*(bf16|f16|tf32)"}
LARGE = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
forms = [(v, aot.ARCHITECTURES) for v in project.variants()]
forms += [(project.variant("bf16", "wide", 171, parts), (90, 100)) for parts in (1, 2, 3)]
for variant, architectures in forms:
    for arch in architectures:
        built = aot.obtain(variant, arch)
        assert built.spilled == 0, built.name
        assert built.shared <= (163 if arch == 80 else 227) * 1024, built.name
        assert re.search(TENSOR_CORES[arch], built.ptx), built.name
        if variant.constants["ROWS"] >= 64:
            assert LARGE[arch] in built.ptx, built.name
        copies = re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global[^;]*, (0x[0-9a-f]+|\\d+)", built.ptx)
        assert copies and {int(size, 0) for size in copies} == {16}, built.name
        if variant.types["x_ptr"] == "*fp32:16":  # three products for one
            assert len(re.findall(r"(?:mma|tcgen05)\\S*tf32", built.ptx)) % 3 == 0, built.name
for variant in [*aot.variants("project_few"), *aot.variants("pool_scores")]:
    built = aot.obtain(variant, 90)
    assert built.spilled == 0 and built.registers <= 168, built.name
    if "x_ptr" in variant.types:
        assert re.search(r"ld\\.global\\S*v4\\.b32", built.ptx), built.name
"""


def test_every_form_compiles_to_tensor_cores_without_spills(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
