"""Directions: what they hold, what they refuse, how they score, and what calibrates them."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from emocore.calibration import Calibration, StreamReference
from emocore.directions import Directions
from emocore.errors import ArgumentError, CalibrationError, FitError, LabelError, ShapeError
from emocore.moments import Moments
from emocore.tokens import Tokens

EPS32 = torch.finfo(torch.float32).eps


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def given(patterns: Tensor, **changes: Any) -> Directions:
    """Directions of the given patterns, read by the patterns themselves."""
    k, d = patterns.shape
    parts: dict[str, Any] = {
        "names": tuple("abcdefgh"[:k]),
        "patterns": patterns,
        "readers": (patterns / patterns.norm(dim=1, keepdim=True)).float(),
        "centre": torch.zeros(d, dtype=torch.float64),
        "mean_norm": 1.0,
        "residual": torch.ones(k, dtype=torch.float64),
    }
    return Directions(**{**parts, **changes})


def moments_of(rows: Tensor, labels: list[str] | None = None, **options: Any) -> Moments:
    m = Moments(labels=None if labels is None else sorted(set(labels)), covariance=True, **options)
    m.update(rows, labels)
    return m


PAIR = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=torch.float64)
CENTRE = torch.tensor([1.0, 1.0], dtype=torch.float64)


# --- scores, by hand


def test_scores_by_hand() -> None:
    vectors = given(PAIR, centre=CENTRE)
    x = torch.tensor([[4.0, 3.0]])
    # unit patterns (.6, .8) and (0, -1); |x| = 5
    assert vectors.score(x, "raw")[0].tolist() == pytest.approx([4.8, -3.0], rel=EPS32)
    assert vectors.score(x, "centered")[0].tolist() == pytest.approx([3.4, -2.0], rel=2 * EPS32)
    assert vectors.score(x, "cosine")[0].tolist() == pytest.approx([0.96, -0.6], rel=2 * EPS32)


def test_z_by_hand() -> None:
    scale = Calibration(torch.tensor([0.4, 0.0]).double(), torch.tensor([2.0, 0.5]).double(), 9, None)
    vectors = given(PAIR, centre=CENTRE, calibration=scale)
    # centered scores 3.4 and -2
    assert vectors.score(torch.tensor([[4.0, 3.0]]), "z")[0].tolist() == pytest.approx([1.5, -4.0], rel=4 * EPS32)


def test_centered_is_raw_less_the_centre_s_own_score() -> None:
    vectors = given(randn(5, 24), centre=randn(24, seed=1))
    x = randn(40, 24, seed=2)
    expected = vectors.score(x, "raw") - vectors.score(vectors.centre[None], "raw")
    # 24 products of order 1 in float64
    torch.testing.assert_close(vectors.score(x, "centered"), expected, rtol=0, atol=24 * 1e-15)


def test_z_is_centered_less_m_over_s() -> None:
    vectors = given(randn(5, 24), centre=randn(24, seed=1)).calibrate(moments_of(randn(100, 24, seed=3)))
    x = randn(40, 24, seed=2)
    scale = vectors.scale()
    torch.testing.assert_close(vectors.score(x, "z"), (vectors.score(x, "centered") - scale.mean) / scale.std)


def test_cosines_use_the_unit_patterns_where_readers_are_whitened() -> None:
    vectors = given(PAIR, readers=torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert vectors.score(torch.tensor([[4.0, 3.0]]), "cosine")[0].tolist() == pytest.approx([0.96, -0.6], rel=2 * EPS32)


def test_cosine_of_a_pattern_with_itself_is_one_and_of_a_zero_row_zero() -> None:
    vectors = given(randn(3, 17))
    cosines = vectors.score(torch.cat([vectors.patterns, torch.zeros(1, 17, dtype=torch.float64)]), "cosine")
    assert cosines.diagonal().tolist() == pytest.approx([1.0] * 3, abs=1e-7)  # float32 units
    assert cosines[3].tolist() == [0.0] * 3


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7), (0, 7), (2, 0, 7)])
def test_scores_keep_the_leading_shape(shape: tuple[int, ...]) -> None:
    assert given(randn(3, 7)).score(torch.zeros(shape)).shape == (*shape[:-1], 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_rows_score_in_float32(dtype: torch.dtype) -> None:
    vectors = given(randn(3, 33))
    x = randn(9, 33, seed=1, dtype=dtype)
    scores = vectors.score(x)
    assert scores.dtype == torch.float32
    exact = x.double() @ vectors.readers.double().T
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=33 * EPS32)  # 33 sums of order 1


def test_float64_rows_score_in_float64() -> None:
    vectors = given(randn(3, 33))
    x = randn(9, 33, seed=1)
    torch.testing.assert_close(vectors.score(x), x @ vectors.readers.double().T, rtol=0, atol=33e-16 * 4)


def test_scores_have_gradients() -> None:
    vectors = given(randn(3, 8), centre=randn(8, seed=4)).calibrate(moments_of(randn(50, 8, seed=3)))
    x = randn(4, 8, seed=1).requires_grad_()
    for kind in ("raw", "centered", "z"):
        assert torch.autograd.gradcheck(lambda t, kind=kind: vectors.score(t, kind), (x,))


@pytest.mark.parametrize("x", [torch.zeros(2, 6), torch.zeros(7, 1), torch.zeros(())])
def test_rows_of_another_width_are_refused(x: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"\[..., 7\]"):
        given(randn(3, 7)).score(x)


def test_unknown_kind_names_the_near_one() -> None:
    with pytest.raises(LabelError, match="Did you mean 'centered'"):
        given(PAIR).score(torch.zeros(1, 2), "centred")


# --- calibration


def test_calibration_is_the_mean_and_std_of_the_reference_s_own_scores() -> None:
    rows = randn(300, 12, seed=1) @ randn(12, 12, seed=2) + 50.0
    vectors = given(randn(4, 12, seed=3), centre=randn(12, seed=4)).calibrate(moments_of(rows))
    own = vectors.score(rows)
    torch.testing.assert_close(vectors.scale().mean, own.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(vectors.scale().std, own.std(0), rtol=1e-11, atol=0)
    assert vectors.scale().count == 300
    z = vectors.score(rows, "z")
    assert z.mean(0).abs().max() < 1e-11  # the means above, over the stds
    torch.testing.assert_close(z.std(0), torch.ones(4).double(), rtol=1e-11, atol=0)


def test_uncalibrated_z_says_what_to_call() -> None:
    with pytest.raises(CalibrationError, match="calibrate"):
        given(PAIR).score(torch.zeros(1, 2), "z")


def test_token_rows_are_refused_against_a_pooled_reference() -> None:
    reference = moments_of(randn(9, 2))
    reference.tokens = Tokens(skip=49, pool="mean")
    vectors = given(PAIR).calibrate(reference)
    assert vectors.score(torch.zeros(1, 2), "z", tokens=Tokens(skip=49, pool="mean")).shape == (1, 2)
    for other in (Tokens(), Tokens(pool="mean")):
        with pytest.raises(CalibrationError, match="another kind"):
            vectors.score(torch.zeros(1, 2), "z", tokens=other)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (torch.zeros(9, 3), {"covariance": True}, "width"),
        (torch.zeros(9, 2), {"covariance": True}, "do not vary"),
        (torch.ones(1, 2), {"covariance": True}, "do not vary"),
        (torch.ones(9, 2), {}, "only means"),
    ],
)
def test_references_that_cannot_scale_are_refused(rows: Tensor, options: dict[str, Any], said: str) -> None:
    reference = Moments(**options)
    reference.update(rows)
    with pytest.raises(CalibrationError, match=said):
        given(PAIR).calibrate(reference)


def test_an_empty_reference_is_refused() -> None:
    with pytest.raises(FitError, match="before the first row"):
        given(PAIR).calibrate(Moments(covariance=True))


def stream_of(k: int) -> StreamReference:
    return StreamReference(0.125, 16, 90, torch.zeros(3, k), torch.ones(3, k), torch.zeros(3, 5, k))


def test_a_stream_needs_a_scale_and_the_same_directions() -> None:
    with pytest.raises(CalibrationError, match="scale first"):
        given(PAIR).calibrate(stream_of(2))
    scaled = given(PAIR).calibrate(moments_of(randn(9, 2)))
    with pytest.raises(CalibrationError, match="stream: mean"):
        scaled.calibrate(stream_of(3))
    assert scaled.calibrate(stream_of(2)).scale().stream is not None


def test_a_new_scale_drops_the_stream_that_was_read_with_the_old_one() -> None:
    scaled = given(PAIR).calibrate(moments_of(randn(9, 2))).calibrate(stream_of(2))
    assert scaled.calibrate(moments_of(randn(9, 2, seed=1))).scale().stream is None


def test_calibrate_leaves_the_original_as_it_was() -> None:
    vectors = given(PAIR)
    vectors.calibrate(moments_of(randn(9, 2)))
    assert vectors.calibration is None


# --- parts


def test_named_directions_take_their_calibration_along() -> None:
    vectors = given(randn(4, 6), centre=randn(6, seed=1)).calibrate(moments_of(randn(30, 6, seed=2)))
    stream = StreamReference(
        0.125, 16, 90, randn(3, 4, seed=3), randn(3, 4, seed=4).abs(), torch.arange(60.0).reshape(3, 5, 4)
    )
    vectors = vectors.calibrate(stream)
    some = vectors[["d", "b"]]
    assert some.names == ("d", "b")
    x = randn(8, 6, seed=5)
    for kind in ("raw", "centered", "cosine", "z"):
        torch.testing.assert_close(some.score(x, kind), vectors.score(x, kind)[:, [3, 1]], rtol=1e-14, atol=1e-15)
    part = some.scale().stream
    assert part is not None
    assert part.largest[0].tolist() == [[3, 1], [7, 5], [11, 9], [15, 13], [19, 17]]
    assert torch.equal(part.mean, stream.mean[:, [3, 1]])
    assert vectors["c"].names == ("c",)
    assert vectors["c"].index("c") == [0]


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(LabelError, match="'calm'"):
        given(PAIR, names=("calm", "sad"))["clam"]


def test_norms_and_units() -> None:
    vectors = given(PAIR)
    assert vectors.norms.tolist() == [5.0, 2.0]
    assert vectors.unit.tolist() == [[0.6, 0.8], [0.0, -1.0]]


# --- what they refuse to be


NAN = torch.tensor([[3.0, 4.0], [0.0, torch.nan]], dtype=torch.float64)
ZERO = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"patterns": NAN}, FitError, "patterns holds NaN"),
        ({"readers": NAN.float()}, FitError, "readers holds NaN"),
        ({"centre": CENTRE * torch.inf}, FitError, "centre holds NaN or Inf"),
        ({"residual": CENTRE * torch.nan}, FitError, "residual holds NaN"),
        ({"patterns": ZERO}, FitError, r"patterns holds a zero vector; got \['b'\]"),
        ({"readers": ZERO.float()}, FitError, "readers holds a zero vector"),
        ({"mean_norm": 0.0}, FitError, "mean_norm"),
        ({"mean_norm": float("nan")}, FitError, "mean_norm"),
        ({"names": ("a", "a")}, LabelError, "2 distinct names"),
        ({"names": ("a",)}, LabelError, "2 distinct names"),
        ({"patterns": PAIR[0]}, ShapeError, r"patterns; expected \[K, D\]"),
        ({"readers": torch.ones(2, 3)}, ShapeError, "readers"),
        ({"centre": torch.ones(3).double()}, ShapeError, "centre"),
        ({"residual": torch.ones(3).double()}, ShapeError, "residual"),
        ({"patterns": PAIR.float()}, ArgumentError, "patterns; expected torch.float64; got torch.float32"),
        ({"calibration": Calibration(CENTRE, CENTRE * 0, 3, None)}, CalibrationError, "do not vary"),
        ({"calibration": Calibration(CENTRE, CENTRE[:1], 3, None)}, CalibrationError, "2 finite values"),
        ({"calibration": Calibration(CENTRE * torch.nan, CENTRE, 3, None)}, CalibrationError, "2 finite values"),
    ],
)
def test_broken_vectors_are_refused(changes: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        dataclasses.replace(given(PAIR, centre=CENTRE), **changes)


def test_no_direction_at_all_is_refused() -> None:
    with pytest.raises(LabelError):
        given(PAIR)[[]]


# --- mappings by hook point


def labelled(seed: int, d: int = 6) -> Moments:
    return moments_of(randn(40, d, seed=seed), ["calm", "sad"] * 20)


def test_a_mapping_is_fitted_and_calibrated_hook_point_by_hook_point() -> None:
    stories = {"layers.0": labelled(0), "layers.1": labelled(1)}
    neutral = {"layers.0": moments_of(randn(30, 6, seed=2)), "layers.1": moments_of(randn(30, 6, seed=3))}
    both = Directions.fit(stories, neutral).calibrate(neutral)
    assert list(both) == ["layers.0", "layers.1"]
    for name in both:
        alone = Directions.fit(stories[name], neutral[name], hook_point=name).calibrate(neutral[name])
        assert both[name].hook_point == name
        assert torch.equal(both[name].patterns, alone.patterns)
        assert torch.equal(both[name].scale().std, alone.scale().std)


def test_a_hook_point_missing_beside_the_stories_is_an_error_not_a_silence() -> None:
    stories = {"layers.0": labelled(0), "layers.1": labelled(1)}
    some = {"layers.0": labelled(2)}
    with pytest.raises(ArgumentError, match=r"neutral: hook points are missing; got \['layers.1'\]"):
        Directions.fit(stories, some)
    with pytest.raises(ArgumentError, match="scatter: hook points are missing"):
        Directions.fit(stories, method="whitened", scatter=some)
    with pytest.raises(ArgumentError, match="reference: hook points are missing"):
        Directions.fit(stories).calibrate(some)
    with pytest.raises(ArgumentError, match="neutral; expected a mapping"):
        Directions.fit(stories, labelled(2))  # type: ignore[call-overload]
