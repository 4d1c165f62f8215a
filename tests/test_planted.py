"""Fits on planted data, where the truth is known: means, shared covariance, nuisance directions, massive dimensions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from emocore.directions import Directions
from emocore.errors import FitError
from emocore.moments import Moments

EXACT = 1e-10  # float64 sums of a few hundred rows of order 1, through one decomposition


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d: int, seed: int = 0) -> Tensor:
    """A random covariance [D, D] of eigenvalues 1/4 .. 4."""
    q = torch.linalg.qr(randn(d, d, seed=seed))[0]
    return (q * torch.logspace(-1, 1, d, base=4, dtype=torch.float64)) @ q.T


def cloud(mean: Tensor, spread: Tensor) -> Tensor:
    """2 D rows mean +- sqrt(D) L_j, whose mean and covariance (ddof=0) are exactly those asked for."""
    steps = math.sqrt(len(mean)) * torch.linalg.cholesky(spread).T
    return torch.cat([mean + steps, mean - steps])


def stories_of(means: Tensor, spread: Tensor, repeats: Any = None, **options: Any) -> Moments:
    """Label k gets `repeats[k]` copies of a cloud about means[k]."""
    m = Moments(labels=len(means), covariance=True, **options)
    for k, mean in enumerate(means):
        rows = cloud(mean, spread).repeat(1 if repeats is None else repeats[k], 1)
        m.update(rows, torch.full((len(rows),), k))
    return m


def neutral_of(spread: Tensor, mean: Tensor | None = None) -> Moments:
    m = Moments(covariance=True)
    m.update(cloud(torch.zeros(len(spread), dtype=torch.float64) if mean is None else mean, spread))
    return m


# --- difference of means


def test_patterns_are_the_planted_means_less_their_mean() -> None:
    means = randn(5, 8)
    found = Directions.fit(stories_of(means + 30.0, covariance(8)))
    torch.testing.assert_close(found.patterns, means - means.mean(0), rtol=0, atol=EXACT)
    torch.testing.assert_close(found.centre, means.mean(0) + 30.0, rtol=0, atol=EXACT)
    assert found.names == ("0", "1", "2", "3", "4")


def test_the_centre_is_the_mean_of_labels_not_the_grand_mean() -> None:
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 6.0]], dtype=torch.float64)
    even, uneven = (stories_of(means, covariance(2), repeats) for repeats in ((1, 1, 1), (1, 2, 10)))
    assert uneven.mean.tolist() != pytest.approx([2.0, 2.0])
    for stories in (even, uneven):
        found = Directions.fit(stories)
        assert found.centre.tolist() == pytest.approx([2.0, 2.0], abs=EXACT)
        assert found.patterns[2].tolist() == pytest.approx([2.0, 4.0], abs=EXACT)


def test_fit_follows_rotation_translation_and_scale() -> None:
    means, spread = randn(4, 6), covariance(6)
    turn = torch.linalg.qr(randn(6, 6, seed=9))[0]
    for options in ({}, {"method": "whitened"}):
        plain = Directions.fit(stories_of(means, spread), neutral_of(spread), explained=0.3, **options)
        moved = Directions.fit(
            stories_of(3 * means @ turn + 7.0, 9 * turn.T @ spread @ turn),
            neutral_of(9 * turn.T @ spread @ turn, 100 + torch.zeros(6).double()),
            explained=0.3,
            **options,
        )
        torch.testing.assert_close(moved.patterns, 3 * plain.patterns @ turn, rtol=0, atol=1e-9)
        torch.testing.assert_close(moved.readers.double(), plain.readers.double() @ turn, rtol=0, atol=1e-6)
        torch.testing.assert_close(moved.residual, plain.residual, rtol=0, atol=1e-9)


# --- confounds


# Shares 0.30, 0.20, 0.20, 0.15, 0.15: two components reach 0.5 exactly, three are needed for a bit more.
SPECTRUM = torch.tensor([30.0, 20.0, 20.0, 15.0, 15.0], dtype=torch.float64)


@pytest.mark.parametrize(("explained", "k"), [(0.29, 1), (0.30, 1), (0.31, 2), (0.5, 2), (0.501, 3), (1.0, 5)])
def test_as_many_confounds_as_reach_the_share(explained: float, k: int) -> None:
    # a sixth dimension without neutral variance carries the labels, so that something is left
    stories = stories_of(torch.cat([randn(3, 5), 9 * randn(3, 1, seed=1)], 1), torch.eye(6, dtype=torch.float64))
    steps = torch.diag(torch.cat([SPECTRUM, torch.zeros(1)]).double().sqrt())
    neutral = Moments(covariance=True)
    neutral.update(torch.cat([steps, -steps]))
    found = Directions.fit(stories, neutral, explained=explained)
    assert found.provenance["confounds"] == k
    assert found.provenance["confounds_reach"] == pytest.approx(float(SPECTRUM[:k].sum() / 100), abs=1e-12)


def test_the_share_is_of_the_full_trace() -> None:
    # one direction of 40 over a floor of 60 spread over 60 dimensions: never half of the leading few
    spectrum = torch.cat([torch.tensor([40.0]), torch.ones(60)]).double()
    found = Directions.fit(stories_of(randn(3, 61), covariance(61)), neutral_of(torch.diag(spectrum)))
    assert found.provenance["confounds"] == 11


def test_nuisance_directions_are_removed_and_the_rest_is_kept() -> None:
    d, nuisance = 10, torch.linalg.qr(randn(10, 2, seed=3))[0].T
    signal = randn(4, d, seed=4)
    signal -= signal @ nuisance.T @ nuisance
    stories = stories_of(signal + 5 * randn(4, 2, seed=5) @ nuisance, torch.eye(d, dtype=torch.float64))
    spread = (
        0.1 * torch.eye(d, dtype=torch.float64) + nuisance.T @ torch.diag(torch.tensor([8.0, 5.0]).double()) @ nuisance
    )
    found = Directions.fit(stories, neutral_of(spread), explained=0.9)
    assert found.provenance["confounds"] == 2
    torch.testing.assert_close(found.patterns, signal - signal.mean(0), rtol=0, atol=EXACT)
    assert float((found.patterns @ nuisance.T).abs().max()) < 1e-13  # projected out twice


def test_without_neutral_rows_nothing_is_taken_out() -> None:
    found = Directions.fit(stories_of(randn(3, 4), covariance(4)))
    assert found.provenance["confounds"] == 0
    assert found.provenance["explained"] == 0
    assert found.residual.tolist() == [1.0] * 3


def test_residual_is_the_length_that_the_confounds_leave() -> None:
    # patterns (+-3, +-4); the first axis is a confound: 4 of 5 are left
    means = torch.tensor([[3.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)
    stories = stories_of(means, torch.eye(2, dtype=torch.float64))
    found = Directions.fit(stories, neutral_of(torch.diag(torch.tensor([9.0, 1.0]).double())))
    assert found.residual.tolist() == pytest.approx([0.8, 0.8], abs=EXACT)
    assert found.patterns.tolist() == [pytest.approx([0.0, 4.0], abs=EXACT), pytest.approx([0.0, -4.0], abs=EXACT)]


def test_a_direction_inside_the_confounds_is_refused_by_name() -> None:
    means = torch.tensor([[3.0, 0.0], [-3.0, 0.0]], dtype=torch.float64)
    stories = stories_of(means, torch.eye(2, dtype=torch.float64))
    with pytest.raises(FitError, match=r"nothing is left.*\['0', '1'\].*Lower `explained`"):
        Directions.fit(stories, neutral_of(torch.diag(torch.tensor([9.0, 1.0]).double())))


# --- whitened


def separation(found: Directions, means: Tensor, spread: Tensor) -> float:
    """d' between the first two labels: distance of their mean scores over the scores' own spread, both measured."""
    scores = [found.score(cloud(mean, spread), "raw")[:, 0] for mean in means[:2]]
    return float((scores[0].mean() - scores[1].mean()) / scores[0].std(correction=0))


@pytest.mark.parametrize("d", [2, 7, 40])
def test_whitened_separates_as_well_as_theory_allows(d: int) -> None:
    means, spread = torch.stack([randn(d), -randn(d)]), covariance(d, seed=d)
    delta = means[0] - means[1]
    stories = stories_of(means, spread)
    difference = separation(Directions.fit(stories), means, spread)
    whitened = separation(Directions.fit(stories, method="whitened", shrinkage=0.0), means, spread)
    assert difference == pytest.approx(float(delta @ delta / (delta @ spread @ delta).sqrt()), rel=1e-5)
    assert whitened == pytest.approx(float((delta @ torch.linalg.solve(spread, delta)).sqrt()), rel=1e-5)
    assert whitened > difference * (1 + 1e-3)


def test_whitened_readers_are_patterns_over_the_within_label_covariance() -> None:
    means, spread = randn(4, 6), covariance(6)
    found = Directions.fit(stories_of(means, spread), method="whitened", shrinkage=0.0, rank=None)
    readers = torch.linalg.solve(spread, (means - means.mean(0)).T).T
    torch.testing.assert_close(found.readers.double(), readers / readers.norm(dim=1, keepdim=True), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.patterns, means - means.mean(0), rtol=0, atol=EXACT)


def test_full_shrinkage_is_the_difference() -> None:
    stories = stories_of(randn(4, 6), covariance(6))
    whitened = Directions.fit(stories, method="whitened", shrinkage=1.0)
    torch.testing.assert_close(whitened.readers, Directions.fit(stories).readers, rtol=0, atol=1e-7)


def test_rank_keeps_the_leading_whitened_components() -> None:
    # in white noise, patterns along three axes of falling length: rank 2 drops the shortest
    means = torch.tensor([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.1, 0.2, 0.5]]).double()
    stories = stories_of(torch.cat([means, -means]), torch.eye(3, dtype=torch.float64))
    full, two = (Directions.fit(stories, method="whitened", shrinkage=0.0, rank=r) for r in (3, 2))
    assert torch.linalg.matrix_rank(full.readers.double(), rtol=1e-5) == 3
    assert torch.linalg.matrix_rank(two.readers.double(), rtol=1e-5) == 2
    assert float(two.readers[:, 2].abs().max()) < 0.05
    torch.testing.assert_close(two.patterns, full.patterns)


def test_rank_at_or_above_the_labels_changes_nothing() -> None:
    stories = stories_of(randn(4, 9), covariance(9))
    four, every = (Directions.fit(stories, method="whitened", rank=r) for r in (4, None))
    assert torch.equal(four.readers, every.readers)


def test_whitened_by_the_neutral_covariance() -> None:
    means, spread, quiet = randn(3, 5), covariance(5), covariance(5, seed=7)
    found = Directions.fit(
        stories_of(means, spread), neutral_of(quiet), method="whitened", whiten_by="neutral", shrinkage=0.0
    )
    readers = torch.linalg.solve(quiet, (means - means.mean(0)).T).T
    torch.testing.assert_close(found.readers.double(), readers / readers.norm(dim=1, keepdim=True), rtol=0, atol=1e-7)
    assert found.provenance["confounds"] == 0


def test_scatter_names_the_rows_to_whiten_with() -> None:
    means, pooled, tokens = randn(3, 5), covariance(5), covariance(5, seed=7)
    stories = stories_of(means, pooled)
    found = Directions.fit(stories, method="whitened", scatter=stories_of(means, tokens), shrinkage=0.2)
    n, k = 30, 3
    c = tokens * n / (n - k)
    c = 0.8 * c + 0.2 * c.trace() / 5 * torch.eye(5, dtype=torch.float64)
    readers = torch.linalg.solve(c, (means - means.mean(0)).T).T
    torch.testing.assert_close(found.readers.double(), readers / readers.norm(dim=1, keepdim=True), rtol=0, atol=1e-7)


# --- precision of readers


def massive() -> Moments:
    """Noise in which a dimension of std 1e6 drags another along: readers cancel it, and must not be rounded."""
    spread = torch.eye(3, dtype=torch.float64)
    drag = torch.tensor([1e6, 3e5, 0.0], dtype=torch.float64)
    means = torch.tensor([[0.0, 2.0, 1.0], [0.0, -2.0, 1.0], [0.0, 0.0, -2.0]], dtype=torch.float64)
    return stories_of(means, spread + torch.outer(drag, drag))


def test_readers_are_float32_where_rounding_does_not_show() -> None:
    found = Directions.fit(stories_of(randn(3, 5), covariance(5)), method="whitened")
    assert found.readers.dtype == torch.float32
    assert found.provenance["reader_noise"] < 1e-6


def test_readers_of_a_massive_dimension_keep_their_digits() -> None:
    stories = massive()
    found = Directions.fit(stories, method="whitened", shrinkage=0.0)
    assert found.readers.dtype == torch.float64
    assert found.provenance["reader_noise"] > 1e-3
    rows = cloud(stories.label_mean[0], stories.covariance()).float()
    exact = (rows.double() - found.centre) @ found.readers.T
    spread = exact.std(0)
    assert float(((found.score(rows) - exact).abs() / spread).max()) < 1e-6
    # the noise that was avoided, as it was announced
    rounded = (rows.double() - found.centre) @ found.readers.float().double().T
    noise = float(((rounded - exact).std(0) / spread).max())
    assert noise > 1e-3


# --- rates


def test_z_on_tokens_alarms_at_its_nominal_rate_on_fresh_tokens() -> None:
    d, n = 12, 40_000
    root = torch.linalg.cholesky(covariance(d, seed=2)).T
    found = Directions.fit(stories_of(randn(4, d), covariance(d)), method="whitened")
    reference = Moments(covariance=True)
    reference.update(randn(n, d, seed=5) @ root + 3.0)
    z = found.calibrate(reference).score(randn(n, d, seed=6) @ root + 3.0, "z")
    for level, rate in ((1.2816, 0.10), (2.3263, 0.01)):
        # binomial noise of the fresh rows, and as much again from the reference's own mean and std; 4 sigma
        assert float((z > level).double().mean(0).sub(rate).abs().max()) < 4 * math.sqrt(2 * rate / n)
