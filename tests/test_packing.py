"""Packed readers: what their parts add up to, how many it takes, and that directions score through them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from emocore import ops, packing
from emocore.directions import Directions
from emocore.moments import Moments
from emocore.store import load, save

DTYPES = [torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(k: int, dim: int, seed: int = 1) -> Tensor:
    v = randn(k, dim, seed=seed)
    return v / v.norm(dim=1, keepdim=True)


def directions(readers: Tensor, centre: Tensor | None = None, **changes: Any) -> Directions:
    k, dim = readers.shape
    return Directions(
        names=tuple("abcdefghijklmnop"[:k]),
        patterns=readers.double() * 3,
        readers=readers.float(),
        centre=torch.zeros(dim, dtype=torch.float64) if centre is None else centre,
        mean_norm=4.0,
        residual=torch.ones(k, dtype=torch.float64),
        **changes,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_add_up(dtype: torch.dtype, parts: int) -> None:
    v = unit(5, 40)
    packed = packing.split(v, dtype, parts)
    assert packed.shape == (parts, 5, 40)
    assert packed.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    # a part is rounded to half an ulp, which its sign halves again for the next; fp16 has none below 2^-25
    error = (packed.double().sum(0) - v).abs()
    assert bool((error <= v.abs() * half_ulp * (half_ulp / 2) ** (parts - 1) * 1.01 + 2.0**-25).all())
    assert error.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_readers_are_one_part(dtype: torch.dtype) -> None:
    v = unit(5, 40).to(dtype)
    assert torch.equal(packing.split(v, dtype, 3), v[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_offset_is_of_the_rounded_readers(dtype: torch.dtype) -> None:
    v, c = unit(5, 40), randn(40, seed=2) * 100
    packed, offset = packing.pack(v, c, dtype)
    assert offset.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(offset.double(), -(packed.double().sum(0) @ c), rtol=1e-7, atol=1e-7)
    assert not packing.pack(v, None, dtype).offset.any()


def test_rounding_noise_says_how_many_parts() -> None:
    # errors of bfloat16 are a thousandth and more of what they round, those of float16 an eighth of that
    assert packing.parts_by_dtype(unit(3, 64), torch.eye(64).double()) == {"bfloat16": 2, "float16": 1}
    # rows that vary thousands of times more across a reader than along it
    v, across = torch.tensor([[0.6, -0.8]]).double(), torch.tensor([0.8, 0.6]).double()
    c = torch.eye(2, dtype=torch.float64) + 1e7 * torch.outer(across, across)
    assert packing.parts_by_dtype(v, c) == {"bfloat16": 3, "float16": 2}


def noise(v: Tensor, c: Tensor, dtype: torch.dtype, parts: int) -> float:
    e = packing.split(v, dtype, parts).double().sum(0) - v
    return float((((e @ c) * e).sum(1).sqrt() / ((v @ c) * v).sum(1).sqrt()).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_it_is_the_fewest_that_will_do(dtype: torch.dtype, scale: float) -> None:
    """Whitened readers: small where the covariance is large."""
    c = torch.diag(torch.linspace(0, 1, 64, dtype=torch.float64).mul(torch.log10(torch.tensor(scale)) * 2).pow(10))
    c = c + torch.eye(64, dtype=torch.float64)
    v = randn(3, 64) @ torch.linalg.inv(c + 0.1 * torch.outer(randn(64, seed=3), randn(64, seed=3)))
    v = v / v.norm(dim=1, keepdim=True)
    found = packing.parts_for(v, c, dtype)
    assert found == packing.MOST_PARTS or noise(v, c, dtype, found) <= 1e-3
    assert found == 1 or noise(v, c, dtype, found - 1) > 1e-3


def test_fits_and_calibrations_find_the_parts(tmp_path: Any) -> None:
    stories = Moments(labels=["x", "y"], covariance=True)
    stories.update(randn(400, 8), [i % 2 for i in range(400)])
    fitted = Directions.fit(stories)
    assert set(fitted.provenance["parts"]) == {"bfloat16", "float16"}
    means = Moments(labels=["x", "y"])
    means.update(randn(400, 8), [i % 2 for i in range(400)])
    assert Directions.fit(means).provenance["parts"] is None
    reference = Moments(covariance=True)
    reference.update(randn(400, 8, seed=4) * torch.logspace(0, 6, 8, dtype=torch.float64))
    calibrated = Directions.fit(means).calibrate(reference)
    wanted = packing.parts_by_dtype(calibrated.readers, reference.covariance())
    assert calibrated.provenance["parts"] == wanted
    save(calibrated, tmp_path / "v.safetensors")
    assert (
        load(tmp_path / "v.safetensors").packed(torch.device("cpu"), torch.bfloat16).readers.shape[0]
        == (wanted["bfloat16"])
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("kind", ["raw", "centered", "cosine", "z"])
@pytest.mark.parametrize("k", [3, 12])
def test_directions_score_through_packed_readers(dtype: torch.dtype, kind: str, k: int) -> None:
    reference = Moments(covariance=True)
    reference.update(randn(100, 20, seed=3))
    vectors = directions(unit(k, 20), randn(20, seed=2)).calibrate(reference)
    x = randn(2, 7, 20, seed=5).to(dtype)
    wanted = vectors.score(x, kind)
    with ops.use("triton"):
        found = vectors.score(x, kind)
    assert found.dtype == wanted.dtype
    # in one part where the calibration allows it: fp16 here
    rounded = 2e-3 if dtype == torch.float16 and kind != "cosine" else 2e-4
    torch.testing.assert_close(found, wanted, rtol=0, atol=rounded * float(wanted.abs().max()))


def test_readers_are_packed_once_for_each_dtype_and_kind() -> None:
    vectors, device = directions(unit(3, 20), randn(20, seed=2)), torch.device("cpu")
    once = vectors.packed(device, torch.bfloat16)
    assert vectors.packed(device, torch.bfloat16, "z") is once
    assert vectors.packed(device, torch.bfloat16, "centered") is once
    assert not vectors.packed(device, torch.bfloat16, "raw").offset.any()
    assert vectors.packed(device, torch.float16) is not once
    assert once.readers.shape[0] == packing.UNKNOWN_PARTS
    assert once.offset.any()


def test_readers_that_need_float64_are_not_packed() -> None:
    wide = unit(3, 20)
    vectors = Directions(("a", "b", "c"), wide, wide, torch.zeros(20).double(), 1.0, torch.ones(3).double())
    with ops.use("triton"):
        assert vectors.score(randn(2, 20).bfloat16()).dtype == torch.float64
