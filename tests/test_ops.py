"""The op table: schemas, fakes, gradients, and the choice of implementation."""

import pytest
import torch

import emocore
from emocore import ops
from emocore.errors import ArgumentError
from emocore.linalg import tile_count, unpack_tiles

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def samples(dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    x = randn(5, 7).to(dtype)
    labels = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32)
    weights = torch.rand(5, generator=g).double()
    shift = randn(7).double()
    f64 = torch.float64
    wide = f64 if dtype == f64 else torch.float32
    packed = torch.stack([randn(3, 7), randn(3, 7) / 256]).to(dtype)
    offset, deltas = randn(3).to(wide), randn(4, 7).to(wide)
    slots = torch.tensor([2, 0, 3, 1, 9], dtype=torch.int32)  # the last is none of the four
    sets = (randn(2, 7), randn(2, 7), randn(4, 2), torch.tensor([[0.0, 0], [1, 1], [0, 1], [0.5, 0]]))
    return {
        "stage": (
            x,
            torch.tensor([3, 1]),
            torch.full((2, 7), torch.nan, dtype=dtype),
            torch.full((2,), torch.nan, dtype=f64),
            torch.zeros(2, dtype=torch.bool),
        ),
        "label_sums": (x, labels, weights, shift, torch.zeros(2, 7, dtype=f64), torch.zeros(2, 7, dtype=f64)),
        "gram": (x, weights, shift, torch.zeros(tile_count(7), 128, 128, dtype=f64)),
        "project": (x, randn(3, 7), shift, False),
        "steer_add": (x, randn(7)),
        "steer_add_": (x, randn(7)),
        "steer_set": (x, randn(2, 7).double(), randn(2, 7).double(), randn(2).double()),
        "steer_set_": (x, randn(2, 7).double(), randn(2, 7).double(), randn(2).double()),
        "project_packed": (x, packed, offset, False),
        "project_rows": (
            torch.stack([x, -x]),
            torch.stack([packed, 2 * packed]),
            torch.stack([offset, -offset]),
            torch.tensor([4]),
            torch.full((2, 5, 3), 7.0, dtype=wide),
        ),
        "project_steer": (x, packed, offset, slots, deltas),
        "project_steer_": (x, packed, offset, slots, deltas),
        "pool_scores": (randn(5, 3), torch.tensor([0, 2, 5], dtype=torch.int32)),
        "steer_rows": (x, slots, deltas, *sets),
        "steer_rows_": (x, slots[:1], deltas, *sets),
        "steer_when": (x, slots, randn(1, 7), torch.zeros(4, 1), deltas, *sets),
        "steer_when_": (x, slots, randn(1, 7), torch.zeros(4, 1), deltas),
        "steer_slots": (x, slots, randn(2, 7), torch.full((4, 2), -0.5)),
    }


@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.emocore, name).default, samples()[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(ops.SCHEMAS))
def test_every_implementation_agrees_with_the_reference(name: str, dtype: torch.dtype) -> None:
    """Outputs and mutated arguments alike, to the input's precision: float32 sums of 7 products, one rounding to
    dtype.
    """
    tolerance = {torch.float64: 1e-14}.get(dtype, 1e-5)
    rounding = torch.finfo(dtype).eps if "steer" in name else 0.0
    call = getattr(ops, name)
    found, expected = samples(dtype)[name], samples(dtype)[name]
    result = call(*found)
    with ops.use("reference"):
        wanted = call(*expected)
    pairs = list(zip(found, expected, strict=True))
    if result is not None:
        several = isinstance(result, tuple)
        pairs += zip(result, wanted, strict=True) if several else [(result, wanted)]
    for a, b in pairs:
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            if name == "gram" and a.dim() == 3:  # of a diagonal tile only the lower half is contract
                a, b = unpack_tiles(a, 7), unpack_tiles(b, 7)
            torch.testing.assert_close(a, b, rtol=max(tolerance, rounding), atol=tolerance)


def test_literal_stage() -> None:
    x = torch.tensor([[3.0, 4.0], [torch.nan, 1.0], [0.0, -2.0]])
    rows, norms, finite = torch.full((3, 2), 9.0), torch.zeros(3).double(), torch.zeros(3, dtype=torch.bool)
    ops.stage(x, None, rows, norms, finite)
    assert rows.tolist() == [[3, 4], [0, 0], [0, -2]]
    assert norms.tolist() == [5, 0, 2]
    assert finite.tolist() == [True, False, True]


def test_literal_gram() -> None:
    tiles = torch.zeros(1, 128, 128, dtype=torch.float64)
    ops.gram(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), None, torch.tensor([1.0, 1.0]).double(), tiles)
    assert tiles[0, 0, 0] == 4  # 0*0 + 2*2
    assert tiles[0, 1, 0] == 8  # 1*0 + 4*2
    assert tiles[0, 1, 1] == 17  # 1*1 + 4*4


def test_literal_project_and_steer() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    v = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert ops.project(x, v, None, False).tolist() == [[3, 8], [0, 0]]
    assert ops.project(x, v, torch.tensor([1.0, 1.0]).double(), False).tolist() == [[2, 6], [-1, -2]]
    torch.testing.assert_close(ops.project(x, v, None, True), torch.tensor([[0.6, 1.6], [0.0, 0.0]]))
    assert ops.steer_add(x, torch.tensor([1.0, -1.0])).tolist() == [[4, 3], [1, -1]]


@pytest.mark.parametrize(
    "name",
    ["project", "project_packed", "project_steer", "steer_add", "steer_set", "steer_rows", "steer_when"],
)
def test_gradients_with_respect_to_the_rows(name: str) -> None:
    x, *rest = samples(torch.float64)[name]
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: getattr(ops, name)(t, *rest), (x,))


def test_cosine_scores_refuse_a_gradient() -> None:
    for name in ("project", "project_packed"):
        x, readers, third, _ = samples()[name]
        with pytest.raises(ArgumentError, match="no gradient"):
            getattr(ops, name)(x.requires_grad_(), readers, third, True)


def test_ops_compile_without_graph_breaks() -> None:
    x, delta = samples()["steer_add"]
    step = torch.compile(lambda t: ops.steer_add(t * 2, delta) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(x), x * 2 + delta + 1)


def test_implementations_are_named_and_can_be_forced() -> None:
    assert emocore.ops.implementations()["gram"]["cpu"].startswith("native")
    with ops.use("reference"):
        assert {d for row in ops.implementations().values() for d in row.values()} == {"reference"}
    for isa in ops.native.extension().isas():
        with ops.use(isa):
            assert ops.implementations()["gram"]["cpu"] == f"native ({isa})"
    with pytest.raises(ArgumentError, match="avx2"):
        ops.use("avx3")


def test_use_restores_what_was_forced_before() -> None:
    with ops.use("reference"):
        with ops.use("auto"):
            assert ops.implementations()["gram"]["cpu"] != "reference"
        assert ops.implementations()["gram"]["cpu"] == "reference"
    assert ops.implementations()["gram"]["cpu"] != "reference"


@pytest.mark.parametrize("view", ["transposed", "strided", "offset", "expanded"])
@pytest.mark.parametrize("name", ["stage", "gram", "project", "steer_add", "label_sums", "steer_rows", "steer_when"])
def test_views_are_bitwise_their_contiguous_copies(name: str, view: str) -> None:
    base = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    x = {
        "transposed": base[:7, :5].T,
        "strided": base[:10:2, :7],
        "offset": base.flatten()[3:38].view(5, 7),
        "expanded": base[0, :7].expand(5, 7),
    }[view]
    results = []
    for rows in (x, x.contiguous()):
        args = list(samples()[name])
        args[0] = rows
        out = getattr(ops, name)(*args)
        results.append([t for t in args[1:] if isinstance(t, torch.Tensor)] if out is None else [out])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
