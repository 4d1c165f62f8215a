"""Steering: the algebra of add, ablate and clamp, in every dtype, shape and container, with gradients."""

import dataclasses
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from emocore.directions import Directions
from emocore.errors import ArgumentError, HookPointError
from emocore.steering import steer

D = 8


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Same(nn.Module):
    """A block that returns a copy of its input, in whatever container `wrap` makes."""

    def __init__(self, wrap: Any = None) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return x.clone() if self.wrap is None else self.wrap(x.clone())


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks or [Same(), Same()])

    def forward(self, x: Tensor) -> Any:
        for block in self.layers:
            x = block(x)
        return x


def vectors_of(patterns: Tensor, hook_point: str | None = "layers.0", **changes: Any) -> Directions:
    k, d = patterns.shape
    return Directions(
        names=tuple("abcdefgh"[:k]),
        patterns=patterns,
        readers=(patterns / patterns.norm(dim=1, keepdim=True)).float(),
        centre=changes.pop("centre", torch.zeros(d, dtype=torch.float64)),
        mean_norm=changes.pop("mean_norm", 4.0),
        residual=torch.ones(k, dtype=torch.float64),
        hook_point=hook_point,
        **changes,
    )


PAIR = torch.tensor([[0.0, 5.0], [3.0, 4.0]], dtype=torch.float64)  # units (0, 1) and (.6, .8)
X = torch.tensor([[[1.0, 2.0], [-1.0, 0.5]]], dtype=torch.float64)


def scores(x: Tensor, vectors: Directions) -> Tensor:
    return x.double() @ vectors.unit.T


def run(vectors: Any, x: Tensor = X, model: nn.Module | None = None, **how: Any) -> Any:
    model = model or Stack()
    with torch.no_grad(), steer(model, vectors, **how):
        return model(x)


# --- by hand


def test_add_by_hand() -> None:
    # 0.5 x mean norm 4 along (.6, .8)
    assert run(vectors_of(PAIR), add={"b": 0.5})[0].tolist() == [pytest.approx([2.2, 3.6]), pytest.approx([0.2, 2.1])]


def test_absolute_strength_leaves_the_norm_out() -> None:
    assert run(vectors_of(PAIR), add={"a": 0.5}, unit="absolute")[0].tolist() == [[1.0, 2.5], [-1.0, 1.0]]


def test_ablate_by_hand() -> None:
    # x less its part along (.6, .8): (1, 2) has 2.2 of it, (-1, .5) has -.2
    expected = [pytest.approx([1 - 1.32, 2 - 1.76]), pytest.approx([-1 + 0.12, 0.5 + 0.16])]
    assert run(vectors_of(PAIR), ablate=["b"])[0].tolist() == expected


def test_clamp_by_hand() -> None:
    assert run(vectors_of(PAIR), clamp={"a": 0.75})[0].tolist() == [[1.0, 3.0], [-1.0, 3.0]]


def test_strengths_add_up() -> None:
    both = run(vectors_of(PAIR), add={"a": 0.25, "b": -0.5})
    # (0, 1) - 2 (.6, .8)
    assert (both - X)[0].tolist() == [pytest.approx([-1.2, -0.6])] * 2


def test_order_is_ablate_clamp_add() -> None:
    vectors = vectors_of(torch.eye(3, dtype=torch.float64)[[0, 1]] + torch.tensor([[0.0, 0, 0], [1, 0, 0]]).double())
    # units a = (1, 0, 0), b = (1, 1, 0) / sqrt 2
    x = torch.tensor([[[5.0, 1.0, 7.0]]], dtype=torch.float64)
    found = run(vectors, x, ablate=["a"], clamp={"b": 2**0.5}, add={"a": 10.0}, unit="absolute")
    # ablated (0, 1, 7); its b score 1 / sqrt 2 is short of sqrt 2 by half a (1, 1): (.5, 1.5, 7); then + 10 a
    assert found[0, 0].tolist() == pytest.approx([10.5, 1.5, 7.0])


def test_the_input_of_other_tokens_and_columns_is_left_alone() -> None:
    found = run(vectors_of(torch.eye(2, D, dtype=torch.float64)), randn(2, 3, D), ablate=["a", "b"])
    assert torch.equal(found[..., 2:], randn(2, 3, D)[..., 2:])


# --- directions that are not orthogonal


def synonyms(angle: float) -> Tensor:
    """Two unit vectors `angle` apart."""
    a, b = torch.linalg.qr(randn(D, 2, seed=3))[0].T
    return torch.stack([a, a * torch.cos(torch.tensor(angle)) + b * torch.sin(torch.tensor(angle))])


@pytest.mark.parametrize("angle", [1.0, 0.1, 1e-3])
def test_synonyms_are_both_ablated(angle: float) -> None:
    vectors = vectors_of(synonyms(angle))
    found = run(vectors, randn(3, 5, D, seed=4), ablate=["a", "b"])
    # the span is found to eps / angle
    assert float(scores(found, vectors).abs().max()) < 1e-14 / angle


def test_a_doubled_direction_is_ablated_once() -> None:
    a = randn(1, D)
    x = randn(3, 5, D, seed=4)
    doubled = run(vectors_of(torch.cat([a, 2 * a])), x, ablate=["a", "b"])
    torch.testing.assert_close(doubled, run(vectors_of(a), x, ablate=["a"]), rtol=0, atol=1e-14)


def test_ablating_twice_changes_nothing_more() -> None:
    vectors, x = vectors_of(randn(4, D)), randn(3, 5, D, seed=4)
    once = run(vectors, x, ablate=["a", "b", "c"])
    torch.testing.assert_close(run(vectors, once, ablate=["a", "b", "c"]), once, rtol=0, atol=1e-14)


def test_ablating_all_of_a_space_leaves_nothing() -> None:
    found = run(vectors_of(randn(D, D)), randn(3, 5, D, seed=4), ablate=list("abcdefgh"))
    assert float(found.abs().max()) < 1e-13


def test_ablating_to_the_baseline_leaves_the_centre_s_scores() -> None:
    vectors = vectors_of(randn(3, D), centre=randn(D, seed=5))
    found = run(vectors, randn(3, 5, D, seed=4), ablate=["a", "c"], to="baseline")
    expected = scores(vectors.centre, vectors)[[0, 2]].expand(3, 5, 2)
    torch.testing.assert_close(scores(found, vectors)[..., [0, 2]], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("to", ["zero", "baseline"])
def test_several_directions_are_clamped_at_once(to: str) -> None:
    vectors = vectors_of(randn(4, D) + 2.0, centre=randn(D, seed=5))  # far from orthogonal
    clamp = {"a": 0.5, "b": -1.0, "d": 0.0}
    found = scores(run(vectors, randn(3, 5, D, seed=4), clamp=clamp, to=to), vectors)[..., [0, 1, 3]]
    expected = 4.0 * torch.tensor(list(clamp.values()), dtype=torch.float64)
    if to == "baseline":
        expected = expected + scores(vectors.centre, vectors)[[0, 1, 3]]
    torch.testing.assert_close(found, expected.expand(3, 5, 3), rtol=0, atol=1e-12)


def test_a_clamp_moves_no_further_than_it_must() -> None:
    vectors, x = vectors_of(randn(3, D)), randn(1, 5, D, seed=4)
    move = run(vectors, x, clamp={"a": 1.0, "b": 1.0}) - x
    span = torch.linalg.qr(vectors.unit[:2].T)[0]
    torch.testing.assert_close(move @ span @ span.T, move, rtol=0, atol=1e-13)


def test_a_doubled_direction_is_clamped_to_one_value_only() -> None:
    a = randn(1, D)
    vectors, x = vectors_of(torch.cat([a, 2 * a])), randn(3, 5, D, seed=4)
    found = run(vectors, x, clamp={"a": 0.5, "b": 0.5})
    torch.testing.assert_close(scores(found, vectors), torch.full((3, 5, 2), 2.0).double(), rtol=0, atol=1e-13)
    with pytest.raises(ArgumentError, match="several scores"):
        steer(Stack(), vectors, clamp={"a": 0.5, "b": 0.6})


# --- bit-exact nothing


AWKWARD = torch.tensor([[[-0.0, 0.0, 1e-45, torch.nan], [torch.inf, -torch.inf, 3.0, -0.0]]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strengths", [{"a": 0.0}, {"a": 0.0, "b": -0.0}])
def test_strength_zero_is_bit_exact_and_the_very_tensor(dtype: torch.dtype, strengths: dict[str, float]) -> None:
    kept: list[Tensor] = []
    model = Stack(Same(lambda x: kept.append(x) or x), nn.Identity())
    x = AWKWARD.to(dtype)
    found = run(vectors_of(torch.eye(2, 4, dtype=torch.float64)), x, model, add=strengths)
    assert found is kept[0]
    assert found.view(torch.uint8).tolist() == x.view(torch.uint8).tolist()


def test_a_zero_beside_another_strength_adds_nothing() -> None:
    vectors, x = vectors_of(randn(2, D)), randn(2, 3, D, seed=4)
    assert torch.equal(run(vectors, x, add={"a": 0.3, "b": 0.0}), run(vectors, x, add={"a": 0.3}))


def test_a_bad_row_stays_with_itself() -> None:
    x = randn(1, 4, D)
    x[0, 1] = torch.nan
    for how in ({"add": {"a": 0.5}}, {"ablate": "a"}, {"clamp": {"a": 0.5}}):
        found = run(vectors_of(randn(2, D, seed=1)), x, **how)
        assert found[0, [0, 2, 3]].isfinite().all()
        assert found[0, 1].isnan().all()


# --- dtypes and shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [{"add": {"a": 0.5, "c": -0.1}}, {"ablate": "ab"}, {"clamp": {"a": 0.5, "c": 0.1}}])
def test_narrow_models_are_steered_to_one_rounding(dtype: torch.dtype, how: dict[str, Any]) -> None:
    vectors, x = vectors_of(randn(3, D)), randn(2, 3, D, seed=4, dtype=dtype)
    found = run(vectors, x, **{k: list(v) if isinstance(v, str) else v for k, v in how.items()})
    exact = run(vectors, x.double(), **{k: list(v) if isinstance(v, str) else v for k, v in how.items()})
    assert found.dtype == dtype
    # half a unit in the last place of the result, and of the float32 delta that is added
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, D), (2, 0, D), (0, 3, D), (2, 3, 4, D)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    vectors, x = vectors_of(randn(2, D)), randn(*shape, seed=4)
    for how in ({"add": {"a": 0.5}}, {"ablate": "a"}):
        found = run(vectors, x, **how)
        assert found.shape == shape
        flat = run(vectors, x.reshape(1, -1, D), **how)
        assert torch.equal(found.reshape(1, -1, D), flat)


def test_strided_outputs() -> None:
    vectors, x = vectors_of(randn(2, D)), randn(3, 5, D, seed=4)
    across = Stack(Same(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)), nn.Identity())
    wide = Stack(Same(lambda t: torch.cat([t, t], -1)[..., :D]), nn.Identity())
    for how in ({"add": {"a": 0.5}}, {"clamp": {"a": 0.5}}):
        expected = run(vectors, x, **how)
        assert torch.equal(run(vectors, x, across, **how), expected)
        assert torch.equal(run(vectors, x, wide, **how), expected)


# --- gradients


@pytest.mark.parametrize(
    "how",
    [
        {"add": {"a": 0.5}},
        {"ablate": ["a", "b"]},
        {"clamp": {"a": 0.5, "b": -0.2}},
        {"ablate": "a", "clamp": {"b": 1.0}, "add": {"a": 0.1}},
    ],
)
def test_gradients_are_those_of_the_algebra(how: dict[str, Any]) -> None:
    model, vectors = Stack(nn.Linear(D, D).double(), nn.Linear(D, D).double()), vectors_of(randn(2, D))
    x = randn(1, 3, D, seed=4).requires_grad_()
    with steer(model, vectors, **how):
        assert torch.autograd.gradcheck(model, (x,))


def test_training_goes_on_under_steering() -> None:
    torch.manual_seed(0)
    model, vectors = Stack(nn.Linear(D, D), nn.Linear(D, D)), vectors_of(randn(2, D))
    with steer(model, vectors, add={"a": 0.5}, ablate="b"):
        model(randn(2, 3, D, dtype=torch.float32)).square().sum().backward()
    weight = model.layers[0].weight
    assert isinstance(weight, nn.Parameter)
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta: a device that the vectors must be moved to
def test_inference_first_and_training_after(device: str) -> None:
    model, vectors = Stack(nn.Linear(D, D, device=device), nn.Identity()), vectors_of(randn(2, D))
    x = randn(1, 2, D, dtype=torch.float32).to(device)
    with steer(model, vectors, add={"a": 0.5}, ablate="b"):
        with torch.inference_mode():
            model(x)
        model(x).sum().backward()


# --- containers


@dataclasses.dataclass
class Boxed:
    note: str
    last_hidden_state: Tensor


class Pair(NamedTuple):
    hidden: Tensor
    extra: int


class Out(OrderedDict[str, Any]):
    """A mapping of its own kind."""


@pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (lambda x: (x, "cache"), lambda out: (out[0], out[1] == "cache" and type(out) is tuple)),
        (lambda x: [x, None], lambda out: (out[0], type(out) is list)),
        (lambda x: {"hidden_states": x, "n": 3}, lambda out: (out["hidden_states"], out["n"] == 3)),
        (lambda x: Boxed("kept", x), lambda out: (out.last_hidden_state, out.note == "kept")),
        (lambda x: Pair(x, 7), lambda out: (out.hidden, out.extra == 7)),
        (lambda x: Out(hidden=x, n=3), lambda out: (out["hidden"], type(out) is Out and out["n"] == 3)),
    ],
    ids=["tuple", "list", "dict", "dataclass", "namedtuple", "own mapping"],
)
@pytest.mark.parametrize("grad", [False, True])
def test_containers_keep_their_kind_and_the_rest(wrap: Any, read: Any, grad: bool) -> None:
    vectors, x = vectors_of(randn(2, D), hook_point="layers.1"), randn(2, 3, D, seed=4)
    model = Stack(Same(), Same(wrap))
    for how in ({"add": {"a": 0.5}}, {"ablate": "a"}):
        plain = run(vectors_of(randn(2, D)), x, **how)
        with torch.set_grad_enabled(grad), steer(model, vectors, **how):
            found, rest = read(model(x.clone().requires_grad_(grad)))
        assert rest
        assert torch.equal(found.detach(), plain)


def test_an_output_without_a_hidden_state_is_refused() -> None:
    model = Stack(Same(lambda x: {"n": 3}))
    with pytest.raises(HookPointError, match="no hidden state"):
        run(vectors_of(randn(2, D)), randn(1, 2, D), model, add={"a": 0.5})
