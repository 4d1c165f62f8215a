"""Covariance algebra: packed tiles, shrinkage, whitening, subspaces, spans; by hand and by their definitions."""

import pytest
import torch
from torch import Tensor

from emocore.errors import FitError, ShapeError
from emocore.linalg import (
    orthonormal_span,
    pack_tiles,
    principal_subspace,
    project_out,
    shrink,
    tile_count,
    tile_diagonal,
    unit,
    unpack_tiles,
    whitener,
)

WIDTHS = [1, 3, 17, 127, 128, 129, 300]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d: int, seed: int = 0) -> Tensor:
    x = randn(4 * d + 4, d, seed=seed) * torch.linspace(0.1, 3, d)
    lower = (x.T @ x / len(x)).tril()
    return lower + lower.tril(-1).T


def diagonal(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).diag()


def near(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --- tiles


@pytest.mark.parametrize(("dim", "tiles"), [(1, 1), (128, 1), (129, 3), (384, 6), (4096, 528)])
def test_tile_count_by_hand(dim: int, tiles: int) -> None:
    assert tile_count(dim) == tiles


@pytest.mark.parametrize("d", WIDTHS)
def test_pack_and_unpack_are_inverse(d: int) -> None:
    matrix = covariance(d)
    tiles = pack_tiles(matrix)
    assert tiles.shape == (tile_count(d), 128, 128)
    assert torch.equal(unpack_tiles(tiles, d), matrix)
    assert torch.equal(tile_diagonal(tiles, d), matrix.diag())


def test_tile_of_panels_i_and_j_stands_at_its_place() -> None:
    tiles = pack_tiles(torch.arange(300.0).unsqueeze(1).maximum(torch.arange(300.0)))
    assert tiles[0, 1, 0] == 1  # panel 0 by panel 0
    assert tiles[1, 0, 127] == 128  # panel 1 by panel 0
    assert tiles[2, 3, 3] == 131  # panel 1 by panel 1
    assert tiles[4, 0, 0] == 256  # panel 2 by panel 1
    assert not tiles[5, 44:].any()  # past column 299


def test_upper_half_of_a_tile_is_not_read() -> None:
    lower = torch.ones(128, 128).tril() > 0
    tiles = torch.full((1, 128, 128), torch.nan).masked_fill(lower, 7.0)
    assert torch.equal(unpack_tiles(tiles, 3), torch.full((3, 3), 7.0))


def test_tiles_of_another_width_are_refused() -> None:
    with pytest.raises(ShapeError, match="3 tiles for D=129"):
        unpack_tiles(torch.zeros(1, 128, 128), 129)


# --- shrinkage and whitening


def test_shrinkage_keeps_the_trace_and_meets_both_ends() -> None:
    c = covariance(9)
    assert torch.equal(shrink(c, 0.0), c)
    near(shrink(c, 1.0), c.trace() / 9 * torch.eye(9, dtype=torch.float64))
    near(shrink(c, 0.3).trace(), c.trace())


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, float("nan")])
def test_shrinkage_is_a_fraction(shrinkage: float) -> None:
    with pytest.raises(FitError, match=r"0 \.\. 1"):
        shrink(covariance(2), shrinkage)


@pytest.mark.parametrize("d", [1, 3, 17, 129])
def test_whitened_covariance_is_the_identity(d: int) -> None:
    c = covariance(d)
    w = whitener(c)
    near(w, w.T)
    near(w @ c @ w, torch.eye(d, dtype=torch.float64), 1e-9)


def test_whitener_by_hand() -> None:
    near(whitener(diagonal(4.0, 0.25)), diagonal(0.5, 2.0))


@pytest.mark.parametrize("values", [(1.0, 0.0), (0.0, 0.0), (1.0, 1e-17), (1.0, -0.5)])
def test_singular_covariance_cannot_whiten(values: tuple[float, ...]) -> None:
    with pytest.raises(FitError, match="shrinkage > 0"):
        whitener(diagonal(*values))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_covariance_that_is_not_finite_is_a_typed_error(value: float) -> None:
    for use in (whitener, lambda c: principal_subspace(c, 0.5)):
        with pytest.raises(FitError, match="not finite"):
            use(diagonal(1.0, value))


# --- subspaces


@pytest.mark.parametrize(
    ("explained", "components", "reached"),
    [(0.0, 0, 0.0), (0.1, 1, 0.5), (0.5, 1, 0.5), (0.500001, 2, 0.8), (0.8, 2, 0.8), (0.99, 3, 1.0), (1.0, 3, 1.0)],
)
def test_fewest_components_that_reach_the_share(explained: float, components: int, reached: float) -> None:
    basis, share = principal_subspace(diagonal(0.2, 0.5, 0.3), explained)
    assert len(basis) == components
    assert share == pytest.approx(reached, abs=1e-15)
    near(basis, torch.eye(3, dtype=torch.float64)[[1, 2, 0][:components]])


def test_share_is_of_the_full_trace() -> None:
    """Not of the components that were computed, nor of the leading ones."""
    basis, share = principal_subspace(diagonal(*[1.0] * 10), 0.25)
    assert len(basis) == 3
    assert share == pytest.approx(0.3)


def test_subspace_is_orthonormal_and_signed() -> None:
    basis, _ = principal_subspace(covariance(40), 0.9)
    near(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64))
    assert (basis.gather(1, basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_no_variance_has_no_subspace() -> None:
    basis, share = principal_subspace(torch.zeros(4, 4), 0.5)
    assert (basis.shape, share) == ((0, 4), 0.0)


def test_all_of_a_singular_covariance_does_not_run_past_the_end() -> None:
    x = randn(3, 8)
    basis, share = principal_subspace(x.T @ x, 1.0)
    assert 3 <= len(basis) <= 8
    assert share == pytest.approx(1.0)


@pytest.mark.parametrize("explained", [-0.1, 1.5, float("nan")])
def test_explained_is_a_fraction(explained: float) -> None:
    with pytest.raises(FitError, match="fraction"):
        principal_subspace(covariance(2), explained)


def test_projected_vectors_are_orthogonal_to_rounding() -> None:
    basis = orthonormal_span(randn(5, 60))
    vectors = 1e8 * basis.sum(0) + randn(7, 60)  # almost all of it is to go
    rest = project_out(vectors, basis)
    assert float((rest @ basis.T).abs().max()) < 1e-14 * float(rest.norm())
    near(project_out(rest, basis), rest)
    assert torch.equal(project_out(vectors, basis[:0]), vectors)


def test_span_drops_what_depends_on_the_rest() -> None:
    v = randn(3, 10)
    for vectors, rank in ((v, 3), (torch.cat([v, v[:1] + v[1:2]]), 3), (v[[0, 0]], 1), (v * 0, 0), (v[:0], 0)):
        basis = orthonormal_span(vectors)
        assert basis.shape == (rank, 10)
        near(basis @ basis.T, torch.eye(rank, dtype=torch.float64))
        near(vectors @ basis.T @ basis, vectors)


def test_span_tolerance_is_relative_to_the_largest() -> None:
    for scale in (1e-100, 1.0, 1e100):
        assert len(orthonormal_span(scale * diagonal(1.0, 1e-5, 1e-7))) == 2


# --- lengths


def test_unit_rows_and_their_norms() -> None:
    vectors, norms = unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]]))
    assert norms.tolist() == [5, 0, 2]
    near(vectors, torch.tensor([[0.6, 0.8], [0, 0], [0, -1]]), 1e-7)
