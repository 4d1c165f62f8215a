"""Steering of some rows and not of others: by request, above a level, in fixed memory, and under a compiler."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from emocore.directions import Directions
from emocore.errors import ArgumentError, CaptureError, LabelError, ShapeError
from emocore.moments import Moments
from emocore.steering import Steering, steer

D = 6
CALM, STEADY = {"add": {"a": 0.5}}, {"ablate": ["b", "c"], "clamp": {"a": 0.25}, "add": {"c": -0.1}}
REQUESTS = {"calm": CALM, "steady": STEADY}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vectors_of(k: int = 3, seed: int = 1, **changes: Any) -> Directions:
    patterns = randn(k, D, seed=seed)
    return Directions(
        names=tuple("abcdefgh"[:k]),
        patterns=patterns,
        readers=(patterns / patterns.norm(dim=1, keepdim=True)).float(),
        centre=randn(D, seed=seed + 1),
        mean_norm=4.0,
        residual=torch.ones(k, dtype=torch.float64),
        hook_point="0",
        **changes,
    )


def model_of(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Identity()).to(dtype)


def batch(steering: Steering, asked: Sequence[str | None] | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if asked is None else steering.batch(requests=asked)


def run(model: nn.Module, x: Tensor, vectors: Any, asked: Sequence[str | None] | None = None, **how: Any) -> Tensor:
    with torch.no_grad(), steer(model, vectors, **how) as steering, batch(steering, asked):
        return model(x)


# --- by request


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_sequence_is_steered_as_its_request_says(dtype: torch.dtype) -> None:
    model, vectors, x = model_of(dtype), vectors_of(), randn(4, 3, D, seed=5, dtype=dtype)
    found = run(model, x, vectors, ["steady", None, "calm", "steady"], requests=REQUESTS)
    with torch.no_grad():
        plain = model(x)
    assert torch.equal(found[1], plain[1])
    for i, how in ((0, STEADY), (2, CALM), (3, STEADY)):
        alone = run(model, x, vectors, **how)[i]
        torch.testing.assert_close(found[i], alone, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert not torch.equal(found[i], plain[i])


def test_who_else_is_in_the_batch_changes_nothing() -> None:
    model, vectors, x = nn.Sequential(nn.Identity()), vectors_of(), randn(3, 2, D, seed=5, dtype=torch.float32)
    x[1, 0] = torch.nan
    x[2] = 1e30
    found = run(model, x, vectors, ["calm", "steady", None], requests=REQUESTS)
    assert torch.equal(found[2], x[2])
    assert torch.equal(found[0], run(model, x[:1], vectors, ["calm"], requests=REQUESTS)[0])
    assert found[1, 0].isnan().all()
    assert found[1, 1].isfinite().all()


def test_a_packed_batch() -> None:
    model, vectors, x = model_of(), vectors_of(), randn(1, 7, D, seed=5)
    bounds = torch.tensor([0, 2, 2, 6, 7])
    with torch.no_grad(), steer(model, vectors, requests=REQUESTS) as steering:
        plain = model.get_submodule("1")(nn.functional.linear(x, *model[0].parameters()))
        with steering.batch(requests=["calm", "steady", None, "calm"], cu_seqlens=bounds):
            found = model(x)
    steered = run(model, x, vectors, **CALM)
    assert torch.equal(found[0, 2:6], plain[0, 2:6])
    torch.testing.assert_close(found[0, [0, 1, 6]], steered[0, [0, 1, 6]])


def test_generation_goes_on_with_the_requests_of_its_batch(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("llama")
    block = "model.layers.1"
    patterns = randn(2, 16, seed=3)
    vectors = Directions(
        names=("a", "b"),
        patterns=patterns,
        readers=patterns.float(),
        centre=torch.zeros(16, dtype=torch.float64),
        mean_norm=1.0,
        residual=torch.ones(2, dtype=torch.float64),
        hook_point=block,
    )
    ids = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(1))
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}

    def last(asked: list[str | None]) -> list[list[int]]:
        with steer(model, vectors, requests={"push": {"add": {"a": 30.0}}}) as steering, batch(steering, asked):
            return model.generate(ids, **given).tolist()

    none, first, every = last([None] * 3), last(["push", None, None]), last(["push"] * 3)
    assert first[0] == every[0] != none[0]
    assert first[1:] == none[1:]


def test_several_hook_points_have_each_their_own() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    a, b = vectors_of(), vectors_of(seed=7)
    x = randn(2, 1, D, seed=5)
    found = run(model, x, {"0": a, "1": b}, [None, "calm"], requests={"calm": CALM})
    torch.testing.assert_close(found[1], x[1] + 2.0 * a.unit[0] + 2.0 * b.unit[0])
    assert torch.equal(found[0], x[0])


# --- above a level


def test_only_tokens_above_their_level_are_steered() -> None:
    vectors, x = vectors_of(), randn(5, 4, D, seed=5)
    score = vectors.score(x, "centered")
    found = run(nn.Sequential(nn.Identity()), x, vectors, add={"a": 0.5}, when={"b": 0.3, "c": -0.5})
    above = (score[..., 1] > 0.3) & (score[..., 2] > -0.5)
    assert 0 < int(above.sum()) < 20
    assert torch.equal(found[~above], x[~above])
    torch.testing.assert_close(found[above], x[above] + 2.0 * vectors.unit[0])


def test_levels_are_z_scores_where_there_is_a_calibration() -> None:
    reference = Moments(covariance=True)
    reference.update(randn(600, D, seed=9) * 3 + 1)
    vectors, x = vectors_of().calibrate(reference), randn(5, 4, D, seed=5)
    score = vectors.score(x, "z")[..., 1]
    level = float(score.median()) + 1e-6
    above = score > level
    found = run(nn.Sequential(nn.Identity()), x, vectors, ablate="a", when={"b": level})
    assert 0 < int(above.sum()) < 20
    assert torch.equal((found != x).any(-1), above)


def test_each_request_has_its_own_levels() -> None:
    vectors, x = vectors_of(), randn(3, 8, D, seed=5)
    requests = {
        "high": {"add": {"a": 1.0}, "when": {"b": 0.5}},
        "low": {"add": {"a": 1.0}, "when": {"c": -0.5}},
        "any": {"add": {"a": 1.0}},
    }
    found = run(nn.Sequential(nn.Identity()), x, vectors, ["high", "low", "any"], requests=requests)
    score = vectors.score(x, "centered")
    moved = (found != x).any(-1)
    assert torch.equal(moved[0], score[0, :, 1] > 0.5)
    assert torch.equal(moved[1], score[1, :, 2] > -0.5)
    assert moved[2].all()


def test_a_score_that_is_nan_exceeds_nothing() -> None:
    x = randn(1, 3, D, seed=5)
    x[0, 1, 2] = torch.nan
    found = run(nn.Sequential(nn.Identity()), x, vectors_of(), add={"a": 1.0}, when={"b": -1e30})
    assert torch.equal(found[0, 1].view(torch.int64), x[0, 1].view(torch.int64))
    assert (found[0, [0, 2]] != x[0, [0, 2]]).all()


@pytest.mark.parametrize("how", [{"requests": REQUESTS}, {"ablate": ["a", "b"], "when": {"c": 0.0}}])
def test_gradients_are_those_of_the_algebra(how: dict[str, Any]) -> None:
    model, x = model_of(), randn(2, 3, D, seed=5).requires_grad_()
    asked = ["steady", "calm"] if "requests" in how else None
    with steer(model, vectors_of(), **how) as steering, batch(steering, asked):
        assert torch.autograd.gradcheck(model, (x,))


def test_what_nobody_else_reads_is_edited_in_place() -> None:
    for how in ({"ablate": "a"}, {"ablate": "a", "add": {"b": 1.0}}, {"clamp": {"a": 1.0}, "when": {"b": 0.0}}):
        made: list[Tensor] = []

        class Kept(nn.Module):
            def forward(self, x: Tensor, made: list[Tensor] = made) -> Tensor:
                made.append(x.clone())
                return made[0]

        found = run(nn.Sequential(Kept()), x := randn(2, 3, D, seed=5), vectors_of(), **how)
        assert found is not x
        assert found._version > 0
        assert torch.equal(found, run(nn.Sequential(nn.Identity()), x, vectors_of(), **how))


# --- fixed memory


def test_slots_and_tables_stay_where_they_are() -> None:
    model, vectors = model_of(), vectors_of()
    with torch.no_grad(), steer(model, vectors, requests=REQUESTS) as steering:
        edits = steering.edits["0"]

        def places() -> list[int]:
            with steering.batch(requests=["calm", None]):
                model(randn(2, 3, D))
                slots = edits._now
                assert slots is not None
                assert slots.tolist() == [1, 0]
                held = edits._held
                assert held is not None
                return [slots.data_ptr(), *(t.data_ptr() for t in vars(held).values())]

        before = places()
        with steering.batch(requests=["steady"] * 5):
            model(randn(5, 1, D))
        steering.change(requests={"calm": {"add": {"b": 2.0}}})
        assert places() == before


def test_memory_outside_of_a_batch_says_nothing() -> None:
    with steer(model_of(), vectors_of(), requests=REQUESTS) as steering:
        memory = steering._slots.on(torch.device("cpu"))
        with steering.batch(requests=["calm", "calm", "steady"]):
            memory = steering._slots._memory[torch.device("cpu")]
            assert memory[:4].tolist() == [1, 1, 2, 0]
        assert not memory.any()


def test_a_change_is_what_a_new_steering_would_do() -> None:
    model, other, vectors, x = model_of(), model_of(), vectors_of(), randn(2, 3, D, seed=5)
    changes: list[dict[str, Any]] = [
        {"add": {"a": 0.5}},
        {"add": {"a": -0.25, "b": 0.5}},
        {"ablate": "a"},
        {"clamp": {"c": 0.5}, "when": {"b": 0.0}},
        {"add": {"a": 0.0}},
        {"add": {"a": 1.0}},
    ]
    with torch.no_grad(), steer(model, vectors, **STEADY) as steering:
        for how in changes:
            steering.change(**how)
            assert torch.equal(model(x), run(other, x, vectors, **how)), how


# --- compiled


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


HOWS: list[dict[str, Any]] = [
    {"add": {"a": 0.5}},
    {"ablate": ["a", "b"]},
    STEADY,
    {"add": {"a": 0.5}, "when": {"b": 0.1}},
    {"requests": REQUESTS},
    {"requests": {"calm": {**CALM, "when": {"c": 0.0}}, "steady": STEADY}},
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", HOWS)
def test_a_compiled_model_is_steered_alike_and_never_compiled_again(backend: str, how: dict[str, Any]) -> None:
    model, x = model_of(torch.float32), randn(3, 4, D, seed=5, dtype=torch.float32)
    counted = torch._dynamo.testing.CompileCounterWithBackend(backend)

    def both(steering: Steering, *asked: str | None) -> Tensor:
        with batch(steering, asked if "requests" in how else None):
            found = compiled(x)
            torch.testing.assert_close(found, model(x))
        return found

    with torch.no_grad(), steer(model, vectors_of(), **how) as steering:
        compiled = torch.compile(model, fullgraph=True, backend=counted)
        before = both(steering, "calm", None, "steady")
        if "requests" in how:
            assert not torch.equal(both(steering, "steady", "calm", "calm"), before)
            steering.change(requests={"calm": {**how["requests"]["calm"], "add": {"b": 0.7}}})
        else:
            steering.change(**{key: _other(value) for key, value in how.items()})
        after = both(steering, "calm", None, "steady")
        assert not torch.equal(after, before)
    assert counted.frame_count == 1


def _other(value: Any) -> Any:
    return {name: 2 * s for name, s in value.items()} if isinstance(value, dict) else ["b", "c"]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_language_model(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("llama")
    patterns = randn(2, 16, seed=3)
    vectors = Directions(
        names=("a", "b"),
        patterns=patterns,
        readers=patterns.float(),
        centre=torch.zeros(16, dtype=torch.float64),
        mean_norm=1.0,
        residual=torch.ones(2, dtype=torch.float64),
        hook_point="model.layers.1",
    )
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), steer(model, vectors, requests={"x": {"add": {"a": 3.0}, "when": {"b": 0.0}}}) as steering:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with steering.batch(requests=["x", None]):
            found = compiled(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits)
    assert not torch.equal(found, model(input_ids=ids, use_cache=False).logits)


@pytest.mark.usefixtures("fresh_compiler")
def test_gradients_go_through_a_compiled_edit() -> None:
    model, x = model_of(), randn(2, 3, D, seed=5).requires_grad_()
    with steer(model, vectors_of(), ablate="a", when={"b": 0.0}):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
        found, x.grad = x.grad, None
        model(x).square().sum().backward()
    assert found is not None
    torch.testing.assert_close(found, x.grad)


# --- refused


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"requests": {}}, ArgumentError, "an empty mapping"),
        ({"requests": {"x": {}}}, ArgumentError, "nothing to do"),
        ({"requests": {"x": CALM}, "add": {"a": 1.0}}, ArgumentError, "beside an edit of every row"),
        ({"requests": {"x": {"adds": {}}}}, ArgumentError, "Did you mean 'add'"),
        ({"requests": {"x": {"add": {"z": 1.0}}}}, LabelError, "direction 'z'"),
        ({"when": {"a": 1.0}}, ArgumentError, "nothing to do"),
        ({"add": {"a": 1.0}, "when": {"z": 1.0}}, LabelError, "direction 'z'"),
        ({"add": {"a": 1.0}, "when": {"b": float("nan")}}, ArgumentError, "finite"),
    ],
)
def test_requests_without_a_meaning_are_refused(how: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        steer(model_of(), vectors_of(), **how)


def test_a_batch_that_does_not_say_whose_rows_are_whose_is_refused() -> None:
    model, x = model_of(), randn(3, 2, D)
    with steer(model, vectors_of(), requests=REQUESTS, max_rows=4) as steering:
        with pytest.raises(ArgumentError, match=r"with steering\.batch"):
            model(x)
        with pytest.raises(LabelError, match="request 'clam': unknown"), steering.batch(requests=["clam"]):
            pass
        with pytest.raises(ShapeError, match="expected 3, one a sequence; got 2"), steering.batch(["calm", "calm"]):
            model(x)
        with pytest.raises(ArgumentError, match="at most 4"), steering.batch(["calm"] * 5):
            pass
        two = torch.tensor([0, 1, 2])
        with pytest.raises(ShapeError, match="packed batch"), steering.batch(["calm"], cu_seqlens=two):
            pass
        with (
            steering.batch(["calm"] * 3),
            pytest.raises(ArgumentError, match="open already"),
            steering.batch(["calm"] * 3),
        ):
            pass
        with steering.batch(["calm"] * 3):  # and none of this has left anything behind
            model(x)
        with pytest.raises(ArgumentError, match="no such request"):
            steering.change(requests={"other": CALM})
        with pytest.raises(ArgumentError, match="no such request"):
            steering.change(add={"a": 1.0})
    alike = steer(model, vectors_of(), **CALM)
    with pytest.raises(ArgumentError, match="steered alike"), alike.batch(["calm"]):
        pass


def test_a_model_compiled_before_is_refused() -> None:
    """torch would ignore the hook and steer nothing, without a word."""
    model = nn.Sequential(nn.Linear(4, 4))
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    up = torch.eye(4, dtype=torch.float64)[:1]
    vectors = Directions(("up",), up, up.float(), centre=zero, mean_norm=1.0, residual=one, hook_point="0")
    steering = steer(model, vectors, add={"up": 1.0})
    model.compile(backend="eager")
    with pytest.raises(CaptureError, match="compiled already"):
        steering.__enter__()
