"""NIST's one-way analyses of variance (StRD), from streamed label moments, against the ceiling of their own data.

The data are rounded to float64 before anyone sums them. The digits that exact arithmetic reaches on the rounded data
are the ceiling; what is promised is to stay within 0.3 of a digit of it.
"""

import math
import re
from fractions import Fraction
from importlib.resources import files

import numpy as np
import pytest
import torch

from emocore.moments import Moments

SETS = ["SiRstv", "AtmWtAg", *(f"SmLs0{i}" for i in range(1, 10))]


def read(name: str) -> tuple[list[int], list[float], float]:
    """Treatments, responses and the certified F of one data file."""
    lines = files("scipy.stats").joinpath("tests", "data", "nist_anova", f"{name}.dat").read_text().splitlines()
    certified = next(float(line.split()[-1]) for line in lines if re.match(r"\s*Between \w+\s+\d", line))
    data = [line.split() for line in lines[60:] if line.strip()]
    return [int(k) for k, _ in data], [float(y) for _, y in data], certified


def digits(found: float, certified: float) -> float:
    """Log relative error, the number of digits that agree; no more than 15 can."""
    return min(15.0, -math.log10(abs(found - certified) / certified)) if found != certified else 15.0


def exact_f(labels: list[int], y: list[float]) -> float:
    groups: dict[int, list[Fraction]] = {}
    for k, value in zip(labels, map(Fraction, y), strict=True):
        groups.setdefault(k, []).append(value)
    mean = sum(map(sum, groups.values())) / len(y)
    means = {k: sum(g) / len(g) for k, g in groups.items()}
    between = sum(len(g) * (means[k] - mean) ** 2 for k, g in groups.items())
    within = sum((v - means[k]) ** 2 for k, g in groups.items() for v in g)
    return float(between / (len(groups) - 1) / (within / (len(y) - len(groups))))


def f_of(m: Moments) -> float:
    """F from label moments: their between scatter, and their variances pooled by degrees of freedom."""
    k, freedom = len(m.labels), (m.label_count - 1).double()
    within = freedom @ m.label_variance[:, 0] / freedom.sum()
    return float(m.between_scatter() / (k - 1) / within)


def streamed(labels: list[int], y: list[float], batch: int) -> Moments:
    m = Moments(len(set(labels)), covariance=True, strict=True)
    x, ids = torch.tensor(y, dtype=torch.float64).unsqueeze(1), torch.tensor(labels) - min(labels)
    for start in range(0, len(x), batch):
        m.update(x[start : start + batch], ids[start : start + batch])
    return m


@pytest.mark.parametrize("name", SETS)
def test_f_statistic_is_within_0_3_digits_of_the_ceiling(name: str) -> None:
    labels, y, certified = read(name)
    ceiling = digits(exact_f(labels, y), certified)
    found = digits(f_of(streamed(labels, y, batch=100)), certified)
    assert found >= ceiling - 0.3, f"{found:.2f} of {ceiling:.2f} digits"


@pytest.mark.parametrize("name", SETS)
def test_merged_treatments_reach_the_ceiling_too(name: str) -> None:
    """One Moments a treatment, as label-ordered as a stream can be."""
    labels, y, certified = read(name)
    k = len(set(labels))
    merged = Moments(k, covariance=True, strict=True)
    for label in sorted(set(labels)):
        part = Moments(k, covariance=True)
        rows = [[v] for at, v in zip(labels, y, strict=True) if at == label]
        part.update(np.array(rows), [label - min(labels)] * len(rows))
        merged.merge(part)
    assert digits(f_of(merged), certified) >= digits(exact_f(labels, y), certified) - 0.3


def test_digits_count_agreement() -> None:
    assert digits(2.0, 2.0) == 15
    assert digits(1.001, 1.0) == pytest.approx(3)
