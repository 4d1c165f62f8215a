"""Edits: what is asked for of a row, and the affine map of low rank that does it in one read and one write.

With unit patterns V [R, D], which are not orthogonal: ablate is x - QQ'x for an orthonormal basis Q of their span;
clamp is x + (c - Vx) (VV')^+ V, so that every clamped score is c at once. Ablate, clamp and add, in this order, are
one map x + (target - x B') B* + delta, which is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import linalg
from .directions import Directions
from .errors import ArgumentError, near

UNITS = ("residual_norm", "absolute")
REFERENCES = ("zero", "baseline")
SAME = 1e-10  # eigenvalues of VV' below this of the largest belong to directions that are one


@dataclass(frozen=True)
class Request:
    """What is asked for of some rows; raises ArgumentError for what has no meaning."""

    add: Mapping[str, float] = field(default_factory=dict)
    ablate: str | Sequence[str] = ()
    clamp: Mapping[str, float] = field(default_factory=dict)
    when: Mapping[str, float] = field(default_factory=dict)
    unit: str = "residual_norm"
    to: str = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ablate", _names(self.ablate))
        if not self.add and not self.ablate and not self.clamp:
            raise ArgumentError("steer: nothing to do", way_out="Give add=, ablate= or clamp=.")
        for argument, value, known in (("unit", self.unit, UNITS), ("to", self.to, REFERENCES)):
            if value not in known:
                raise ArgumentError(argument, expected=" or ".join(map(repr, known)), got=repr(value))
        both = sorted(set(self.ablate) & set(self.clamp))
        if both:
            raise ArgumentError("ablate, clamp: a direction is in both", got=both)
        for name, number in [*self.add.items(), *self.clamp.items(), *self.when.items()]:
            if not math.isfinite(number):
                raise ArgumentError(f"add, clamp, when: {name!r}", expected="a finite number", got=number)

    @classmethod
    def of(cls, name: str, given: Mapping[str, Any], **common: Any) -> Request:
        """A named one; raises ArgumentError that says which."""
        known = ("add", "ablate", "clamp", "when")
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ArgumentError(f"requests: {name!r}: {unknown[0]!r}", way_out=near(unknown[0], known))
        return cls(**given, **common)


def _names(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Edit:
    """x + (target - x B') B* + delta where x . reader > level for every reader; all float64.

    basis B, dual B* [R, D], target [R], delta [D]; levels by the reader's name.
    """

    basis: Tensor
    dual: Tensor
    target: Tensor
    delta: Tensor
    levels: Mapping[str, float]

    @classmethod
    def of(cls, vectors: Directions, request: Request) -> Edit:
        """What a request makes of rows at the hook point of `vectors`; raises ArgumentError or LabelError."""
        scale = vectors.mean_norm if request.unit == "residual_norm" else 1.0
        centre = vectors.centre if request.to == "baseline" else torch.zeros_like(vectors.centre)
        basis = dual = centre.new_zeros(0, vectors.dim)
        target, delta = centre.new_zeros(0), torch.zeros_like(centre)
        if request.ablate:
            basis = dual = linalg.orthonormal_span(vectors[list(request.ablate)].unit)
            target = basis @ centre
        if request.clamp:
            v = vectors[list(request.clamp)].unit
            value = scale * torch.tensor(list(request.clamp.values()), dtype=torch.float64)
            inverse = torch.linalg.pinv(v @ v.T, hermitian=True, rtol=SAME)
            _check_reachable(v @ v.T @ inverse @ value, value, list(request.clamp))
            # the clamp reads what the ablation has left: of each move along B*, (B* V') of it comes back
            dual = torch.cat([dual - dual @ v.T @ inverse @ v, inverse @ v])
            basis, target = torch.cat([basis, v]), torch.cat([target, value + v @ centre])
        pushes = {name: strength for name, strength in request.add.items() if strength != 0}
        if pushes:
            strength = scale * torch.tensor(list(pushes.values()), dtype=torch.float64)
            delta = strength @ vectors[list(pushes)].unit
        return cls(basis, dual, target, delta, {name: _level(vectors, name, z) for name, z in request.when.items()})


def _level(vectors: Directions, name: str, level: float) -> float:
    """A level of the centred score, or of the z score where there is a calibration, as one of the raw score."""
    (at,) = vectors.index(name)
    c = vectors.calibration
    centred = level if c is None else level * float(c.std[at]) + float(c.mean[at])
    return centred + float(vectors.readers[at].double() @ vectors.centre)


def _check_reachable(reached: Tensor, value: Tensor, names: list[str]) -> None:
    off = (reached - value).abs() > 1e-6 * value.abs().max()
    if bool(off.any()):
        raise ArgumentError(
            "clamp: the same direction under several names cannot have several scores",
            got=[name for name, bad in zip(names, off.tolist(), strict=True) if bad],
            way_out="Clamp one of them.",
        )
