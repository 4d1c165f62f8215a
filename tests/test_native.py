"""emocore._C against NumPy in float64: every instruction set, hostile shapes, any number of threads."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emocore import _C

DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
ROWS = (0, 1, 31, 33, 257, 4097)
WIDTHS = (1, 3, 15, 17, 65, 100, 384)

# A sum of n roundings wanders by about sqrt(n) units: along a chain, over a block of chains, in the terms.
UNITS = _C.CHAIN**0.5 + _C.BLOCK_CHAINS**0.5 + 4
ROUNDING = {dtype: UNITS * (2.0**-53 if dtype == torch.float64 else 2.0**-24) for dtype in DTYPES}

# Variance bias and correlation error that emocore/precision.py allows.
CONTRACT = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1.5e-5, torch.float16: 2e-6}

# The sets that multiply bfloat16 rows as bfloat16; the others widen them to float32.
PAIRS = ("avx512_bf16", "amx_bf16")

each_width = pytest.mark.parametrize("D", WIDTHS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.values())


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    _C.use_isa(before)


def view(t: torch.Tensor) -> tuple[int, str, int, int, int]:
    return t.data_ptr(), DTYPES[t.dtype], t.shape[0], t.shape[1], t.stride(0)


@functools.cache
def normals(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_rows(n: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return normals(n, d, seed).to(dtype, copy=True)


def poisoned(*shape: int, dtype: Any = np.float64) -> np.ndarray:
    return np.full(shape, np.nan, dtype)


def stage(x: torch.Tensor, index: np.ndarray | None = None, threads: int = 1) -> tuple[Any, ...]:
    n = len(x) if index is None else len(index)
    out = torch.full((n, x.shape[1]), torch.nan, dtype=x.dtype)
    norms, finite = poisoned(n), np.full(n, 7, np.uint8)
    bad = _C.stage(view(x), index, view(out), norms, finite, threads)
    return out, norms, finite, bad


def label_sums(x: torch.Tensor, labels: Any, weights: Any, shift: Any, K: int, threads: int = 1) -> np.ndarray:
    both = np.zeros((2, K, x.shape[1]))
    _C.label_sums(view(x), labels, weights, shift, both[0], both[1], threads)
    return both


def gram(x: torch.Tensor, weights: Any = None, shift: Any = None, threads: int = 1) -> np.ndarray:
    P = -(-x.shape[1] // _C.TILE)
    tiles = np.zeros((P * (P + 1) // 2, _C.TILE, _C.TILE))
    _C.gram(view(x), weights, np.zeros(x.shape[1]) if shift is None else shift, tiles, threads)
    return tiles


def lower(tiles: np.ndarray, D: int) -> np.ndarray:
    """The packed tiles as the lower triangle of a D x D matrix."""
    P = -(-D // _C.TILE)
    full = np.zeros((P, _C.TILE, P, _C.TILE))
    corners = [(i, j) for i in range(P) for j in range(i + 1)]
    for (i, j), tile in zip(corners, tiles, strict=True):
        full[i, :, j] = tile
    return np.tril(full.reshape(P * _C.TILE, P * _C.TILE)[:D, :D])


def project(x: Any, V: np.ndarray, centre: Any = None, normalise: bool = False, threads: int = 1) -> np.ndarray:
    out = poisoned(len(x), len(V), dtype=np.float64 if x.dtype == torch.float64 else V.dtype)
    _C.project(view(x), V, centre, normalise, out, threads)
    return out


def steer_add(x: torch.Tensor, delta: np.ndarray, threads: int = 1) -> torch.Tensor:
    out = torch.full(x.shape, torch.nan, dtype=x.dtype)
    _C.steer_add(view(x), delta, view(out), threads)
    return out


# --- worked by hand


@pytest.mark.parametrize("arithmetic", ["float64", "float32", "bfloat16"])
def test_peak_counts_what_the_whole_team_does(isa: str, arithmetic: str) -> None:
    """Each member does every turn; a turn of a wider set, or of pairs, is more operations."""
    one = _C.peak(arithmetic, 1, 1)
    lanes = 1 if isa == "scalar" else (32 if isa == "avx2" else 64) // (8 if arithmetic == "float64" else 4)
    if arithmetic != "bfloat16" or isa not in PAIRS:
        assert one == 12 * 2 * lanes
    else:
        assert one in (12 * 4 * lanes, 4 * 2 * 16 * 16 * 32)
    assert _C.peak(arithmetic, 1000, 3) == 3000 * one
    assert _C.peak(arithmetic, 0, 1) == 0


def test_peak_refuses_what_nobody_multiplies(isa: str) -> None:
    for arithmetic, turns, threads in (("int32", 1, 1), ("nonsense", 1, 1), ("float32", -1, 1), ("float32", 1, 0)):
        with pytest.raises(ValueError, match=r"peak"):
            _C.peak(arithmetic, turns, threads)


def test_stage_by_hand(isa: str) -> None:
    x = torch.tensor([[3.0, 4.0], [torch.inf, 1.0], [0.0, -2.0]])
    out, norms, finite, bad = stage(x, np.array([2, 0, 1, 0]))
    assert out.tolist() == [[0, -2], [3, 4], [0, 0], [3, 4]]
    assert norms.tolist() == [2, 5, 0, 5]
    assert finite.tolist() == [1, 1, 0, 1]
    assert bad == 1


def test_label_sums_by_hand(isa: str) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 7.0], [2.0, 2.0]])
    labels, weights = np.array([1, 0, -1, 1], np.int32), np.array([2.0, 1.0, 9.0, 0.5])
    sums, squares = label_sums(x, labels, weights, np.array([1.0, 1.0]), 2)
    assert sums.tolist() == [[2, 4], [0.5, 2.5]]
    assert squares.tolist() == [[4, 16], [0.5, 2.5]]
    assert label_sums(x, None, None, np.zeros(2), 1)[0].tolist() == [[13, 16]]


def test_gram_by_hand(isa: str) -> None:
    tiles = gram(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), np.array([4.0, 1.0]), np.array([1.0, 1.0]))
    assert lower(tiles, 2).tolist() == [[4, 0], [8, 20]]  # y = 2 (0, 1) and (2, 4)


def test_gram_of_whole_numbers_is_exact(isa: str) -> None:
    """y has ten bits about a shift in quarters: more than one bfloat16 holds, and no sum of 15 squares rounds."""
    rng = np.random.default_rng(0)
    x, shift = rng.integers(-128, 128, (15, 70)).astype(np.float64), rng.integers(-400, 400, 70) / 4
    shift[:33] = 0
    for s in (shift, np.zeros(70)):
        for dtype in DTYPES:
            tiles = gram(torch.from_numpy(x).to(dtype), None, s)
            assert np.array_equal(lower(tiles, 70), np.tril((x - s).T @ (x - s)))


def test_project_by_hand(isa: str) -> None:
    x, V = torch.tensor([[4.0, 4.0], [1.0, 0.0]]), np.array([[1.0, 0.0], [1.0, 1.0], [0.0, -2.0]], np.float32)
    assert project(x, V, np.array([1.0, 0.0])).tolist() == [[3, 7, -8], [0, 0, 0]]
    expected = np.array([[3, 7, -8], [0, 0, 0]]) / 5
    assert np.array_equal(project(x, V, np.array([1.0, 0.0]), normalise=True), expected.astype(np.float32))


def test_steer_add_by_hand(isa: str) -> None:
    # bf16 keeps 8 bits: 256 + 1 is a tie and goes to even 256, 258 + 1 to 260, 256 + 1.5 up to 258.
    x = torch.tensor([[256.0, 258.0, 256.0, 1.0]], dtype=torch.bfloat16)
    assert steer_add(x, np.array([1.0, 1.0, 1.5, -1.0])).tolist() == [[256, 260, 258, 0]]


# --- hostile shapes


@each_dtype
@each_width
def test_stage(isa: str, dtype: torch.dtype, D: int) -> None:
    for n in ROWS:
        x = random_rows(n, D, dtype, seed=n)
        out, norms, finite, bad = stage(x, threads=2)
        assert torch.equal(out, x)
        assert bad == 0
        assert finite.all()
        np.testing.assert_allclose(norms, np.linalg.norm(x.double().numpy(), axis=1), rtol=1e-14)


@each_dtype
@each_width
def test_label_sums(isa: str, dtype: torch.dtype, D: int) -> None:
    rng = np.random.default_rng(D)
    shift = rng.standard_normal(D)
    for n in ROWS:
        x, labels, weights = random_rows(n, D, dtype), rng.integers(-1, 5, n).astype(np.int32), rng.random(n)
        y, one_hot = x.double().numpy() - shift, (labels == np.arange(5)[:, None]) * weights
        sums, squares = label_sums(x, labels, weights, shift, 5, threads=2)
        np.testing.assert_allclose(sums, one_hot @ y, rtol=0, atol=1e-12 * n)
        np.testing.assert_allclose(squares, one_hot @ y**2, rtol=0, atol=1e-12 * n)


@each_dtype
@each_width
def test_gram(isa: str, dtype: torch.dtype, D: int) -> None:
    rng = np.random.default_rng(D)
    shift = rng.standard_normal(D).astype(np.float32).astype(np.float64)
    for n in ROWS:
        x, weights = random_rows(n, D, dtype), rng.random(n)
        y = x.double().numpy() - shift
        bound = ROUNDING[dtype] * (y**2).sum(0).max(initial=0.0)
        exact = np.tril((y * weights[:, None]).T @ y)
        np.testing.assert_allclose(lower(gram(x, weights, shift, threads=2), D), exact, rtol=0, atol=bound)


@each_width
@pytest.mark.parametrize("about", ["zero", "few", "some", "all"])
def test_gram_of_bfloat16_about_short_shifts(isa: str, D: int, about: str) -> None:
    rng = np.random.default_rng(D)
    shift = np.round(8 * rng.standard_normal(D)) / 8
    if about == "few":
        shift[np.arange(D) % 5 != 4] = 0
    elif about != "all":
        shift[0 if about == "zero" else D // 2 :] = 0
    for n in (*ROWS, 512, 1100):
        x = random_rows(n, D, torch.bfloat16, seed=n)
        y = x.double().numpy() - shift
        bound = ROUNDING[torch.bfloat16] * (y**2).sum(0).max(initial=0.0)
        np.testing.assert_allclose(lower(gram(x, None, shift, threads=2), D), np.tril(y.T @ y), rtol=0, atol=bound)


@each_dtype
@each_width
@pytest.mark.parametrize("normalise", [False, True])
def test_project(isa: str, dtype: torch.dtype, D: int, normalise: bool) -> None:
    rng = np.random.default_rng(D)
    centre, V = rng.standard_normal(D), rng.standard_normal((7, D)).astype(np.float32)
    for n in ROWS:
        x = random_rows(n, D, dtype)
        y = x.double().numpy() - (centre if dtype == torch.float64 else centre.astype(np.float32))
        size = np.linalg.norm(y, axis=1, keepdims=True)
        scale = size if normalise else np.ones_like(size)
        error = np.abs(project(x, V, centre, normalise, threads=2) - y @ V.T.astype(np.float64) / scale)
        assert (error <= ROUNDING[dtype] * size / scale * np.linalg.norm(V, axis=1)).all()


@each_dtype
@each_width
def test_steer_add(isa: str, dtype: torch.dtype, D: int) -> None:
    delta = np.random.default_rng(D).standard_normal(D).astype(np.float32)
    sum_dtype = torch.promote_types(dtype, torch.float32)
    for n in ROWS:
        x = random_rows(n, D, dtype)
        assert torch.equal(steer_add(x, delta, threads=2), (x.to(sum_dtype) + torch.from_numpy(delta)).to(dtype))


@pytest.mark.parametrize("D", [2880, 8191])
def test_wide_rows(isa: str, D: int) -> None:
    x, V = random_rows(9, D, torch.float32), random_rows(5, D, torch.float32, seed=1).numpy()
    X = x.double().numpy()
    scores, bound = X @ V.T.astype(np.float64), ROUNDING[torch.float32] * D
    np.testing.assert_allclose(project(x, V, threads=2), scores, rtol=0, atol=bound)
    np.testing.assert_array_equal(label_sums(x, None, None, np.zeros(D), 1)[0, 0], X.cumsum(0)[-1])
    if D < 4096:
        bound = ROUNDING[torch.float32] * 9
        np.testing.assert_allclose(lower(gram(x, threads=2), D), np.tril(X.T @ X), rtol=0, atol=bound)


@pytest.mark.parametrize("K", [1, 4, 16, 171, 512])
@pytest.mark.parametrize("rows", [torch.float32, torch.float64])
@pytest.mark.parametrize("readers", [np.float32, np.float64])
def test_readers(isa: str, K: int, rows: torch.dtype, readers: Any) -> None:
    x, V = random_rows(50, 300, rows), np.random.default_rng(K).standard_normal((K, 300)).astype(readers)
    wide = rows == torch.float64 or readers == np.float64
    for out_dtype in (np.float32, np.float64):
        out = poisoned(50, K, dtype=out_dtype)
        _C.project(view(x), V, None, False, out, 2)
        tolerance = 1e-12 if wide and out_dtype == np.float64 else ROUNDING[torch.float32] * 300
        np.testing.assert_allclose(out, x.double().numpy() @ V.T.astype(np.float64), rtol=0, atol=tolerance)


# --- memory: strides, padding, what may not be touched


@each_dtype
def test_strided_rows_equal_contiguous_ones(isa: str, dtype: torch.dtype) -> None:
    wide = random_rows(700, 150, dtype)
    x = wide[3:603:2, 5:105]
    packed, shift, V = x.contiguous(), np.ones(100), np.ones((3, 100), np.float32)
    assert torch.equal(stage(x)[0], packed)
    assert np.array_equal(gram(x), gram(stage(x)[0]))
    assert np.array_equal(label_sums(x, None, None, shift, 1), label_sums(packed, None, None, shift, 1))
    assert np.array_equal(project(x, V), project(packed, V))
    assert torch.equal(steer_add(x, shift), steer_add(packed, shift))


def test_outputs_keep_to_their_rows(isa: str) -> None:
    x, out = random_rows(40, 21, torch.float32), torch.full((40, 30), 5.0)
    _C.stage(view(x), None, view(out[:, 4:25]), np.empty(40), np.empty(40, np.uint8), 1)
    assert torch.equal(out[:, 4:25], x)
    assert (out[:, :4] == 5).all()
    assert (out[:, 25:] == 5).all()
    scores = np.full((40, 9), 5.0)
    _C.project(view(x), np.ones((3, 21)), None, False, scores[:, 2:5], 1)
    assert (scores[:, :2] == 5).all()
    assert (scores[:, 5:] == 5).all()


def test_gram_leaves_the_columns_past_the_width(isa: str) -> None:
    x = random_rows(10, 130, torch.float32)
    x[3, 129] = torch.inf
    tiles = np.full((3, 128, 128), 5.0)
    _C.gram(view(x), None, np.zeros(130), tiles, 1)
    assert (tiles[1][2:] == 5).all()
    assert (tiles[2][2:] == 5).all()
    assert (tiles[2][:, 2:] == 5).all()
    assert np.isfinite(tiles[0]).all()


def test_tiles_by_tuple_are_the_same(isa: str) -> None:
    x, shift = random_rows(20, 130, torch.float32), np.zeros(130)
    for shape in ((3, 128 * 128), (3 * 128, 128)):
        tiles = torch.zeros(shape, dtype=torch.float64)
        _C.gram(view(x), None, shift, view(tiles), 1)
        assert np.array_equal(tiles.numpy().reshape(3, 128, 128), gram(x))


def test_steer_in_place(isa: str) -> None:
    x = random_rows(33, 100, torch.bfloat16)
    expected = steer_add(x, np.full(100, 0.5))
    _C.steer_add(view(x), np.full(100, 0.5), view(x), 2)
    assert torch.equal(x, expected)


def test_readonly_inputs_are_read(isa: str) -> None:
    x = np.ones((4, 3))
    x.setflags(write=False)
    sums = np.zeros((1, 3))
    _C.label_sums(x, None, None, x[0], sums, None, 1)
    assert (sums == 0).all()


# --- values that do not behave


@each_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 7, 16, 36])
def test_one_bad_value_clears_its_row(isa: str, dtype: torch.dtype, value: float, column: int) -> None:
    x = random_rows(5, 37, dtype)
    x[2, column] = value
    out, norms, finite, bad = stage(x)
    assert bad == 1
    assert finite.tolist() == [1, 1, 0, 1, 1]
    assert norms[2] == 0
    assert (out[2] == 0).all()
    keep = [0, 1, 3, 4]
    assert torch.equal(out[keep], x[keep])


def test_large_values_are_finite(isa: str) -> None:
    assert stage(torch.full((1, 5), 1e300, dtype=torch.float64))[2].tolist() == [1]
    assert stage(torch.full((1, 5), 3e38))[1][0] == pytest.approx(3e38 * 5**0.5)


def test_every_bfloat16_survives_a_zero(isa: str) -> None:
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(torch.bfloat16).reshape(256, 256)
    out = steer_add(x, np.zeros(256))
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()], x[~x.isnan()])


# --- the same bits


@each_dtype
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_no_bit(isa: str, dtype: torch.dtype, threads: int) -> None:
    x, rng = random_rows(1500, 200, dtype), np.random.default_rng(0)
    labels, weights = rng.integers(-1, 9, 1500).astype(np.int32), rng.random(1500)
    shift, V = rng.standard_normal(200), rng.standard_normal((19, 200)).astype(np.float32)
    index = rng.integers(0, 1500, 2000)
    for one, many in zip(stage(x, index), stage(x, index, threads=threads), strict=True):
        assert np.array_equal(one, many) if not isinstance(one, torch.Tensor) else torch.equal(one, many)
    sums = label_sums(x, labels, weights, shift, 9)
    assert np.array_equal(sums, label_sums(x, labels, weights, shift, 9, threads=threads))
    assert np.array_equal(gram(x, weights, shift), gram(x, weights, shift, threads=threads))
    for n in (1, 2, 1500):
        few = project(x[:n], V, shift, True, threads)
        assert np.array_equal(few, project(x[:n], V, shift, True))
    assert torch.equal(steer_add(x, shift), steer_add(x, shift, threads=threads))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_rounds_of_packed_rows_wait_for_each_other(threads: int) -> None:
    x = random_rows(9000, 700, torch.float32)
    assert np.array_equal(gram(x), gram(x, threads=threads))


@pytest.mark.parametrize("moved", [7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPES.get)
def test_rounds_of_one_chain_or_several(isa: str, dtype: torch.dtype, moved: int) -> None:
    """Wide rows: a block outlives the round that began it, and strips of many tiles take turns."""
    x, shift = random_rows(1330, 1100, dtype), np.where(np.arange(1100) % 100 < moved, 0.5, 0.0)
    y = x.double().numpy() - shift
    one = gram(x, None, shift)
    np.testing.assert_allclose(lower(one, 1100), np.tril(y.T @ y), rtol=0, atol=ROUNDING[dtype] * 1330 * 2)
    assert np.array_equal(one, gram(x, None, shift, threads=3))


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=5), runs=st.booleans(), seed=st.integers(0, 9))
def test_label_sums_do_not_know_where_calls_were_cut(cuts: list[int], runs: bool, seed: int) -> None:
    x, labels = (
        random_rows(400, 37, torch.float32, seed),
        np.random.default_rng(seed).integers(-1, 4, 400).astype(np.int32),
    )
    labels = np.sort(labels) if runs else labels
    whole, parts = label_sums(x, labels, None, np.ones(37), 4), np.zeros((2, 4, 37))
    for a, b in itertools.pairwise([0, *sorted(cuts), 400]):
        _C.label_sums(view(x[a:b]), labels[a:b], None, np.ones(37), parts[0], parts[1], 2)
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPES.get)
def test_gram_calls_of_whole_blocks_add_up_to_one(isa: str, dtype: torch.dtype) -> None:
    block, shift = _C.CHAIN * _C.BLOCK_CHAINS, np.where(np.arange(40) % 9 == 3, 0.25, 0.0)
    x, tiles = random_rows(2 * block + 300, 40, dtype), np.zeros((1, 128, 128))
    for a, b in ((0, block), (block, 2 * block + 300)):
        _C.gram(view(x[a:b]), None, shift, tiles, 2)
    assert np.array_equal(tiles, gram(x, None, shift))


@each_dtype
def test_a_score_does_not_know_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    x, V = random_rows(97, 300, dtype), random_rows(13, 300, torch.float32, seed=1).numpy()
    whole = project(x, V, np.ones(300), normalise=True)
    for r in (0, 1, 2, 47, 48, 96):
        assert np.array_equal(project(x[r : r + 1], V, np.ones(300), normalise=True), whole[r : r + 1])
    for k in (0, 5, 12):
        assert np.array_equal(project(x, V[k : k + 1], np.ones(300), normalise=True), whole[:, k : k + 1])


# --- the numerical contract


@each_dtype
@pytest.mark.parametrize("ratio", [0, 0.5, 1, 2, 3, 10, 100])
def test_gram_keeps_the_contract(isa: str, dtype: torch.dtype, ratio: float) -> None:
    n, D, rng = 20_000, 24, np.random.default_rng(3)
    scale = np.exp(rng.uniform(-3, 3, D))
    mixed = rng.standard_normal((n, D)) + 0.5 * rng.standard_normal((n, 1))
    x = torch.from_numpy((mixed + ratio) * scale).to(dtype)
    X = x.double().numpy()
    mean = X.mean(0)
    shift = mean.astype(np.float32).astype(np.float64)
    exact = (X - mean).T @ (X - mean) / n
    got = lower(gram(x, None, shift), D) / n - np.tril(np.outer(mean - shift, mean - shift))
    std = np.sqrt(np.diag(exact))
    error = np.abs(np.tril(got - np.tril(exact))) / np.outer(std, std)
    assert error.max() <= CONTRACT[dtype]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("ratio", [0, 0.5, 1, 2, 3, 10, 100])
def test_bfloat16_products_round_no_row(isa: str, ratio: float, every: int) -> None:
    """About shifts like those that freeze, multiples of a power of two near the deviation; the rows' own rounding is
    the same for all."""
    n, D, rng = 20_000, 40, np.random.default_rng(5)
    scale = np.exp(rng.uniform(-9, 9, D))
    mixed = rng.standard_normal((n, D)) + 0.5 * rng.standard_normal((n, 1))
    x = torch.from_numpy((mixed + ratio * (np.arange(D) % every == 0)) * scale).bfloat16()
    X = x.double().numpy()
    grid = 2 ** np.floor(np.log2(X.std(0)))
    shift = np.round(X.mean(0) / grid) * grid
    y = X - shift
    std = np.sqrt((y**2).mean(0) - y.mean(0) ** 2)
    error = np.abs(np.tril(lower(gram(x, None, shift), D) - y.T @ y)) / n / np.outer(std, std)
    assert error.max() <= 2e-6


def column(isa: str, values: list[float]) -> float:
    return float(gram(torch.tensor(values, dtype=torch.bfloat16)[:, None])[0, 0, 0])


def test_where_bfloat16_products_round(isa: str) -> None:
    """e^2 is half a unit of 1: lost where it is added to 1 alone, kept where two of them are added first."""
    e, unit = 2.0**-12, 2.0**-23
    kept = {
        "one after the other": column(isa, [1, 0, e, e]) - 1,
        "small ones first": column(isa, [e, e, 1, 0]) - 1,
        "a step of 32 later": column(isa, [1, *[0] * 31, e, e]) - 1,
    }
    tiles = isa == "amx_bf16"  # even rows and odd rows of a step apart, then both, then the step
    assert kept == {
        "one after the other": 0,
        "small ones first": 0 if tiles else unit,
        "a step of 32 later": unit if tiles else 0,
    }


def test_bfloat16_products_under_float32s_smallest_are_nothing(isa: str) -> None:
    assert column(isa, [2.0**-60, 2.0**-60]) == 2.0**-119
    assert column(isa, [2.0**-70]) == (0 if isa in PAIRS else 2.0**-140)


# --- refusals come before any writing


def test_labels_and_indices_out_of_range() -> None:
    x, sums = random_rows(4, 3, torch.float32), np.zeros((2, 3))
    for bad in (2, -2):
        with pytest.raises(IndexError, match=rf"label_sums: labels must be in \[-1, 2\), got {bad} at 3"):
            _C.label_sums(view(x), np.array([0, 1, 0, bad], np.int32), None, np.zeros(3), sums, None, 1)
    assert (sums == 0).all()
    out, norms, finite = poisoned(2, 3, dtype=np.float32), poisoned(2), np.full(2, 7, np.uint8)
    for bad in (4, -1):
        with pytest.raises(IndexError, match=rf"stage: index must be in \[0, 4\), got {bad} at 1"):
            _C.stage(view(x), np.array([0, bad]), out, norms, finite, 1)
    assert np.isnan(out).all()
    assert np.isnan(norms).all()
    assert (finite == 7).all()


def refused(**changes: Any) -> None:
    x = np.zeros((4, 3), np.float32)
    arguments = {
        "rows": x,
        "labels": None,
        "weights": None,
        "shift": np.zeros(3),
        "sums": np.zeros((2, 3)),
        "squares": None,
    }
    _C.label_sums(**{**arguments, "threads": 1, **changes})


def readonly(*shape: int) -> np.ndarray:
    array = np.zeros(shape)
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": np.zeros((4, 0))}, "rows must have D >= 1 columns, got 0"),
        (
            {"rows": np.zeros((4, 3), np.int32)},
            r"rows must be float64 or float32 or bfloat16 or float16 \[4, 3\], got int32 \[4, 3\]",
        ),
        ({"rows": np.zeros((4, 3), ">f2")}, "rows has dtype >f2, which no kernel reads"),
        ({"rows": np.zeros((4, 3), np.complex64)}, "rows has dtype complex64, which no kernel reads"),
        ({"rows": np.zeros((3, 4), np.float32).T}, "rows must be contiguous in its last axis"),
        ({"rows": np.float64(1)}, "rows must be a NumPy array or"),
        ({"rows": [[1.0]]}, "rows must be a NumPy array or"),
        ({"rows": (64, "float8", 4, 3, 3)}, "dtype must be one of float64, float32, bfloat16, float16"),
        ({"rows": (64, "float32", 4, "3", 3)}, "rows must be a NumPy array or"),
        ({"rows": (66, "float32", 4, 3, 3)}, "rows must be aligned"),
        ({"rows": (0, "float32", 4, 3, 3)}, "rows must be at an address, got 0"),
        ({"rows": (64, "float32", -4, 3, 3)}, "rows must have rows, cols >= 0"),
        ({"labels": np.zeros(4, np.int64)}, r"labels must be int32 \[4\], got int64 \[4\]"),
        ({"labels": np.zeros(5, np.int32)}, r"labels must be int32 \[4\], got int32 \[5\]"),
        ({"weights": np.zeros(4, np.float32)}, r"weights must be float64 \[4\], got float32 \[4\]"),
        ({"shift": np.zeros(4)}, r"shift must be float64 \[3\], got float64 \[4\]"),
        ({"sums": np.zeros((0, 3))}, "sums must have K >= 1 rows"),
        ({"sums": readonly(2, 3)}, "sums must be writable"),
        ({"sums": np.broadcast_to(np.zeros(3), (2, 3))}, "sums must be"),
        ({"squares": np.zeros((3, 3))}, r"squares must be float64 \[2, 3\], got float64 \[3, 3\]"),
        ({"threads": 0}, r"threads must be in \[1, 1024\], got 0"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused(**changes)


def test_refusals_of_the_other_ops() -> None:
    x, D = np.zeros((4, 3), np.float32), 3
    with pytest.raises(ValueError, match=r"stage: out must be float32 \[4, 3\], got float64 \[4, 3\]"):
        _C.stage(x, None, np.zeros((4, D)), np.zeros(4), np.zeros(4, np.uint8), 1)
    with pytest.raises(ValueError, match=r"gram: tiles, as rows, must be float64 \[128, 128\], got float64 \[3, 3\]"):
        _C.gram(x, None, np.zeros(D), np.zeros((D, D)), 1)
    with pytest.raises(ValueError, match="gram: weights must be finite and >= 0, got -1"):
        _C.gram(x, np.array([1.0, 1.0, 1.0, -1.0]), np.zeros(D), np.zeros((1, 128, 128)), 1)
    with pytest.raises(ValueError, match=r"project: readers must be float32 or float64 \[2, 3\], got float64 \[2, 4\]"):
        _C.project(x, np.zeros((2, 4)), None, False, np.zeros((4, 2)), 1)
    with pytest.raises(ValueError, match=r"steer_add: delta must be float32 or float64 \[3\], got float64 \[2\]"):
        _C.steer_add(x, np.zeros(2), x, 1)
    with pytest.raises(ValueError, match=r"expected one of scalar.*, got 'mmx'"):
        _C.use_isa("mmx")


# --- threads of others


def test_the_team_is_torchs() -> None:
    assert "torch" in _C.openmp()


def test_the_gil_is_free_while_computing() -> None:
    x, ticks, done = random_rows(8192, 1024, torch.float32), 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    start = time.perf_counter()
    gram(x)
    seen, took = ticks, time.perf_counter() - start
    done.set()
    ticker.join()
    assert seen > 3, f"{seen} ticks in {took:.2f} s"


def test_two_callers_at_once() -> None:
    x = random_rows(3000, 200, torch.float32)
    results: list[np.ndarray] = []
    callers = [threading.Thread(target=lambda: results.append(gram(x, threads=2))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    assert all(np.array_equal(r, gram(x)) for r in results)


# --- which instruction set


def test_those_of_the_machine_come_narrowest_first() -> None:
    known = ["scalar", "avx2", "avx512", *PAIRS]
    assert _C.isas() == [isa for isa in known if isa in _C.isas()]
    assert _C.isas()[0] == "scalar"


def chosen(name: str) -> subprocess.CompletedProcess[str]:
    command = "from emocore import _C; print(_C.isa())"
    environment = {**os.environ, "EMOCORE_ISA": name}
    return subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", _C.isas())
def test_the_environment_chooses(name: str) -> None:
    assert chosen(name).stdout.strip() == name


def test_an_empty_choice_is_none() -> None:
    """The fastest is the widest, but that Intel's pairs are slower than its floats."""
    fast = [isa for isa in _C.isas() if isa != "avx512_bf16" or "Intel" not in Path("/proc/cpuinfo").read_text()]
    assert chosen("").stdout.strip() == fast[-1]


def test_an_unknown_choice_is_an_error_that_lists_the_known() -> None:
    done = chosen("mmx")
    assert done.returncode != 0
    assert f"ValueError: EMOCORE_ISA: expected one of {', '.join(_C.isas())}, got 'mmx'" in done.stderr


# In a process of its own: a fork beside torch's threads, then a process that never loads torch.
PRELUDE = f"""
import importlib.util, os, signal, sys, threading
import numpy as np
spec = importlib.util.spec_from_file_location("_C", {_C.__file__!r})
signal.alarm(60)
def load():
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
def gram(threads):
    tiles = np.zeros((6, 128, 128))
    _C.gram(x, None, np.zeros(300), tiles, threads)
    return tiles
x = np.random.default_rng(0).standard_normal((2000, 300)).astype(np.float32)
"""

FORK = """
expected = gram(2)
child = os.fork()
if child == 0:
    same = np.array_equal(gram(2), expected)
    sys.exit(0 if same and len(os.listdir("/proc/self/task")) == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(gram(2), expected)
"""

POOL = """
assert _C.openmp() == ""
expected = gram(1)
results = []
callers = [threading.Thread(target=lambda: results.append(gram(3))) for _ in range(4)]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
assert all(np.array_equal(r, expected) for r in results + [gram(2), gram(7)])
"""

LATE = """
import torch
assert "torch" in _C.openmp()
assert np.array_equal(gram(2), expected)
"""


@pytest.mark.parametrize(
    "script",
    ["import torch\n_C = load()\n" + FORK, "_C = load()\n" + POOL + FORK, "_C = load()\n" + POOL + LATE],
    ids=["fork-openmp", "fork-pool", "torch-after-us"],
)
def test_process(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
