"""Steering hooks: where they go, what they leave alone, and that they are gone afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emocore.directions import Directions
from emocore.errors import ArgumentError, HookPointError, LabelError, ShapeError
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


# --- nobody else's memory


ADD = {"a": 0.5}


class Kept(nn.Module):
    """A block that gives out what it was given, or what it holds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.held = nn.Parameter(randn(1, 3, D, seed=7), requires_grad=False)
        self.register_buffer("table", randn(4, 3, D, seed=8))
        self.plain = randn(4, 3, D, seed=9)

    def forward(self, x: Tensor) -> Any:
        table = self.get_buffer("table")
        return {
            "input": lambda: x,
            "view": lambda: x[:, 1:],
            "flat": lambda: x.view(-1, D),
            "parameter": lambda: self.held,
            "parameter's data": lambda: self.held.detach(),
            "buffer": lambda: table,
            "part of a buffer": lambda: table[:1],
            "part of what it keeps": lambda: self.plain[:1],
            "expanded": lambda: x[:, :1].expand(-1, 3, -1),
        }[self.how]()


@pytest.mark.parametrize(
    "how",
    [
        "input",
        "view",
        "flat",
        "parameter",
        "parameter's data",
        "buffer",
        "part of a buffer",
        "part of what it keeps",
        "expanded",
    ],
)
def test_the_caller_s_tensor_and_the_weights_are_never_written_to(how: str) -> None:
    block = Kept(how)
    x, vectors = randn(1, 3, D, seed=4), vectors_of(randn(2, D))
    before, plain = {name: t.clone() for name, t in block.state_dict().items()}, block.plain.clone()
    expected = block(x).clone() + 2.0 * vectors.unit[0]
    x_before = x.clone()
    found = run(vectors, x, Stack(block), add=ADD)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(x, x_before)
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items())
    assert torch.equal(block.plain, plain)


def test_an_input_given_by_keyword_or_in_a_container_is_not_written_to() -> None:
    class Named(nn.Module):
        def forward(self, *, states: dict[str, Tensor]) -> Tensor:
            return states["x"]

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Named()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(states={"x": x})

    x, vectors = randn(1, 3, D), vectors_of(randn(2, D), "block")
    found = run(vectors, x, Root(), add=ADD)
    assert torch.equal(x, randn(1, 3, D))
    assert not torch.equal(found, x)


def test_what_else_a_module_returns_is_not_written_to() -> None:
    block = Same(lambda t: {"last_hidden_state": t, "first": t[:, 0], "again": t})
    out = run(vectors_of(randn(2, D)), x := randn(2, 3, D, seed=4), Stack(block), add=ADD)
    assert torch.equal(out["first"], x[:, 0])
    assert torch.equal(out["again"], x)
    assert not torch.equal(out["last_hidden_state"], x)


def test_a_fresh_output_is_steered_in_place() -> None:
    made: list[Tensor] = []
    block = Same(lambda t: made.append(t) or t)
    found = run(vectors_of(randn(2, D)), randn(2, 3, D), Stack(block), add=ADD)
    assert found is made[0]
    assert found._version == 1


def test_what_autograd_has_saved_is_not_written_to() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, 1).double()
            self.loss = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            hidden = x.clone()
            self.loss = self.head(hidden).sum()  # saves the hidden state for the head's gradient
            return hidden

    block, x = Branching(), randn(1, 3, D)
    with steer(Stack(block), vectors_of(randn(2, D)), add=ADD) as open_one:
        open_one.model(x)
        block.loss.backward()
    assert block.head.weight.grad is not None
    torch.testing.assert_close(block.head.weight.grad, x.sum((0, 1))[None])


def test_a_result_of_inference_mode_is_steered_outside_of_it() -> None:
    class Frozen(nn.Module):
        @torch.inference_mode()
        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    vectors, x = vectors_of(randn(2, D)), randn(2, 3, D)
    torch.testing.assert_close(run(vectors, x, Stack(Frozen()), add=ADD), x + 2.0 * vectors.unit[0])


def test_in_place_and_out_of_place_agree_bit_for_bit() -> None:
    vectors, x = vectors_of(randn(2, D)), randn(2, 3, D, dtype=torch.float32)
    plain = run(vectors, x, add=ADD)
    with steer(model := Stack(), vectors, add=ADD):
        tracked = model(x.clone().requires_grad_())
    assert torch.equal(plain, tracked.detach())


# --- hooks


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_gone_after_the_block_and_after_an_exception() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    model, vectors = Stack(Same(), Broken()), vectors_of(randn(2, D))
    with pytest.raises(RuntimeError, match="broken"):
        run(vectors, randn(1, 2, D), model, add=ADD)
    assert count_hooks(model) == 0
    with pytest.raises(KeyboardInterrupt), steer(model, vectors, ablate="a"):
        raise KeyboardInterrupt
    assert count_hooks(model) == 0


def test_the_output_is_pristine_before_and_after() -> None:
    model, x = Stack(), randn(2, 3, D, dtype=torch.float32)
    steering = steer(model, vectors_of(randn(2, D)), add=ADD)
    assert torch.equal(model(x), x)
    with steering:
        assert not torch.equal(model(x), x)
    assert torch.equal(model(x), x)
    with steering:  # and again
        assert not torch.equal(model(x), x)


def test_foreign_hooks_are_kept_and_see_their_turn() -> None:
    model, vectors, seen = Stack(), vectors_of(randn(2, D)), []
    before = model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    with steer(model, vectors, add=ADD):
        inner = model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out.clone()))
        model(x := randn(1, 2, D))
    assert count_hooks(model) == 2
    assert torch.equal(seen[0], x)
    torch.testing.assert_close(seen[1], x + 2.0 * vectors.unit[0])
    before.remove()
    inner.remove()


def test_steering_nests_and_adds_up() -> None:
    model, vectors = Stack(), vectors_of(randn(2, D))
    x = randn(1, 2, D)
    with torch.no_grad(), steer(model, vectors, add=ADD), steer(model, vectors, add={"b": -0.25}):
        found = model(x)
    torch.testing.assert_close(found, x + 2.0 * vectors.unit[0] - 1.0 * vectors.unit[1])


def test_one_steering_is_not_opened_twice() -> None:
    with (
        steer(Stack(), vectors_of(randn(2, D)), add=ADD) as open_one,
        pytest.raises(ArgumentError, match="open already"),
    ):
        open_one.__enter__()


# --- which modules


def test_several_hook_points_are_steered_each_with_its_own() -> None:
    a, b = vectors_of(randn(2, D), None), vectors_of(randn(2, D, seed=1), None, mean_norm=2.0)
    x = randn(2, 3, D, seed=4)
    found = run({"layers.0": a, "layers.1": b}, x, add={"a": 0.5})
    torch.testing.assert_close(found, x + 2.0 * a.unit[0] + 1.0 * b.unit[0])


def test_a_glob_or_a_number_places_one_set_of_vectors() -> None:
    v, x = vectors_of(randn(2, D), None), randn(2, 3, D, seed=4)
    torch.testing.assert_close(run({"layers.*": v}, x, add={"a": 0.5}), x + 4.0 * v.unit[0])
    assert torch.equal(run({-1: v}, x, add={"a": 0.5}), run({"layers.1": v}, x, add={"a": 0.5}))  # type: ignore[dict-item]


class Configured(Stack):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = type("Config", (), {"hidden_size": size, "num_hidden_layers": 2, "vocab_size": 10})()


def test_vectors_of_another_model_are_refused() -> None:
    made_for = {"model": "Other(hidden_size=9, num_hidden_layers=2, vocab_size=10)"}
    with pytest.raises(ArgumentError, match="another model"):
        steer(Configured(D), vectors_of(randn(2, D), provenance=made_for), add={"a": 1.0})
    steer(Configured(9), vectors_of(randn(2, D), provenance=made_for), add={"a": 1.0})  # a head of the same base


@pytest.mark.parametrize(
    ("vectors", "how", "error", "said"),
    [
        ({}, {}, ArgumentError, "nothing to do"),
        ({}, {"add": {"zz": 1.0}}, LabelError, "direction 'zz': unknown"),
        ({}, {"add": {"a": float("nan")}}, ArgumentError, "finite"),
        ({}, {"clamp": {"a": float("inf")}}, ArgumentError, "finite"),
        ({}, {"add": {"a": 1.0}, "unit": "norm"}, ArgumentError, "'residual_norm' or 'absolute'"),
        ({}, {"ablate": "a", "to": "mean"}, ArgumentError, "'zero' or 'baseline'"),
        ({}, {"ablate": "a", "clamp": {"a": 1.0}}, ArgumentError, r"in both; got \['a'\]"),
        ({"hook_point": None}, {"ablate": "a"}, ArgumentError, "name no hook point"),
        ({"hook_point": "layers.7"}, {"ablate": "a"}, HookPointError, "Did you mean 'layers.1'"),
    ],
)
def test_requests_without_a_meaning_are_refused(
    vectors: dict[str, Any], how: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        steer(Stack(), vectors_of(randn(2, D), **vectors), **how)


def test_a_module_named_twice_and_an_empty_mapping_are_refused() -> None:
    v = vectors_of(randn(2, D), None)
    with pytest.raises(ArgumentError, match=r"two sets for 'layers\.1'"):
        steer(Stack(), {"layers.1": v, "layers.*": v}, ablate="a")
    with pytest.raises(ArgumentError, match="empty mapping"):
        steer(Stack(), {}, ablate="a")


def test_another_width_is_an_error_of_the_forward() -> None:
    with pytest.raises(ShapeError, match="expected 8; got 9"):
        run(vectors_of(randn(2, D)), randn(1, 2, 9), add={"a": 0.5})
