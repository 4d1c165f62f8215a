"""Directions: frozen vectors fitted from moments, the readers that score rows, and the scale that calibrates them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor, nn

from . import linalg, ops, packing
from .calibration import Calibration as Calibration
from .calibration import StreamReference as StreamReference
from .errors import ArgumentError, CalibrationError, FitError, LabelError, ShapeError, near
from .fitting import Recipe, derive
from .hookpoints import check_model, resolve
from .moments import Moments
from .tokens import Tokens

KINDS = ("raw", "centered", "cosine", "z")


@dataclass(frozen=True, eq=False)
class Directions:
    """One direction per name, at one hook point.

    patterns [K, D]: what the label adds to the mean over labels (steering and cosines use them at unit length).
    readers [K, D]: unit vectors that scores multiply with; the unit patterns unless whitened.
    centre [D]: the mean over labels. mean_norm: E|x_t|, the unit of steering.
    residual [K]: fraction of each pattern's length left after the confounds.
    All float64 but readers, which are float32 unless their rounding noise would show.
    """

    names: tuple[str, ...]
    patterns: Tensor
    readers: Tensor
    centre: Tensor
    mean_norm: float
    residual: Tensor
    hook_point: str | None = None
    tokens: Tokens | None = None
    calibration: Calibration | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.patterns.dim() != 2:
            raise ShapeError("Directions: patterns", expected="[K, D]", got=list(self.patterns.shape))
        k, d = self.patterns.shape
        if k < 1 or len(self.names) != k or len(set(self.names)) != k:
            raise LabelError("Directions: names", expected=f"{max(k, 1)} distinct names", got=len(set(self.names)))
        for name, shape in (
            ("patterns", (k, d)),
            ("readers", (k, d)),
            ("centre", (d,)),
            ("residual", (k,)),
        ):
            self._check(name, shape)
        for name in ("patterns", "readers"):
            zero = (getattr(self, name) == 0).all(1).nonzero().flatten().tolist()
            if zero:
                raise FitError(
                    f"Directions: {name} holds a zero vector",
                    got=[self.names[i] for i in zero[:8]],
                    way_out="Leave these names out: nothing tells them apart.",
                )
        if not (math.isfinite(self.mean_norm) and self.mean_norm > 0):
            raise FitError("Directions: mean_norm", expected="a length > 0", got=self.mean_norm)
        if self.calibration is not None:
            self.calibration.check(k)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        t: Tensor = getattr(self, name)
        if tuple(t.shape) != shape:
            raise ShapeError(f"Directions: {name}", expected=list(shape), got=list(t.shape))
        allowed = (torch.float32, torch.float64) if name == "readers" else (torch.float64,)
        if t.dtype not in allowed:
            raise ArgumentError(f"Directions: {name}", expected=" or ".join(map(str, allowed)), got=t.dtype)
        if not bool(t.isfinite().all()):
            raise FitError(
                f"Directions: {name} holds NaN or Inf",
                way_out="The file or the fit is broken: derive it again.",
            )

    # --- shape and parts

    @property
    def dim(self) -> int:
        """Width D."""
        return self.patterns.shape[1]

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def unit(self) -> Tensor:
        """Patterns at unit length [K, D] float64."""
        return linalg.unit(self.patterns)[0]

    @cached_property
    def norms(self) -> Tensor:
        """Lengths of the raw patterns [K] float64."""
        return linalg.unit(self.patterns)[1]

    def index(self, names: str | Sequence[str]) -> list[int]:
        """Places of `names`; raises LabelError with near matches."""
        names = [names] if isinstance(names, str) else names
        place = {n: i for i, n in enumerate(self.names)}
        for name in names:
            if name not in place:
                raise LabelError(f"direction {name!r}: unknown", way_out=near(name, self.names))
        return [place[n] for n in names]

    def __getitem__(self, names: str | Sequence[str]) -> Directions:
        """The named directions, as Directions."""
        at = self.index(names)
        calibration = self.calibration
        if calibration is not None:
            parts: dict[str, Any] = {"mean": calibration.mean[at], "std": calibration.std[at]}
            if (s := calibration.stream) is not None:
                parts["stream"] = dataclasses.replace(
                    s, mean=s.mean[:, at], std=s.std[:, at], largest=s.largest[:, :, at]
                )
            calibration = dataclasses.replace(calibration, **parts)
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in at),
            patterns=self.patterns[at],
            readers=self.readers[at],
            residual=self.residual[at],
            calibration=calibration,
        )

    def __repr__(self) -> str:
        calibrated = "calibrated" if self.calibration else "not calibrated"
        method = self.provenance.get("method", "given")
        return f"Directions({len(self)} x {self.dim} at {self.hook_point!r}, {method}, {calibrated})"

    # --- score

    def score(self, x: Tensor, kind: str = "centered", tokens: Tokens | None = None) -> Tensor:
        """Scores [..., K] of rows x [..., D], float32 (float64 where rows or readers are).

        kind, with readers v: "raw" x.v; "centered" (x - centre).v; "z" (centered - m) / s against the calibration; and
        "cosine" x.u / |x| with the unit patterns u. `tokens`, if given, is the rule the rows were made by, and must be
        the calibration's. Raises ShapeError, CalibrationError, or LabelError for an unknown kind.
        """
        if kind not in KINDS:
            raise LabelError(f"kind {kind!r}: unknown", way_out=near(kind, KINDS))
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ShapeError("x", expected=f"rows [..., {self.dim}]", got=list(x.shape))
        rows = x.reshape(-1, self.dim)
        scale = [t.to(x.device) for t in self._moments(tokens)] if kind == "z" else []
        scores: Tensor
        prepared = torch.float64 not in (x.dtype, self.readers.dtype) and ops.has_kernel("project_packed", x.device)
        if prepared:
            scores = ops.project_packed(rows, *self.packed(x.device, x.dtype, kind), kind == "cosine")
        elif kind == "cosine":
            scores = ops.project(rows, self.unit.to(x.device, self.readers.dtype), None, True)
        else:
            centre = None if kind == "raw" else self.centre.to(x.device)
            scores = ops.project(rows, self.readers.to(x.device), centre, False, *scale)
        if prepared and kind == "z":
            mean, std = scale
            scores = (scores - mean.to(scores)) / std.to(scores)
        return scores.reshape(*x.shape[:-1], len(self))

    def _moments(self, tokens: Tokens | None) -> tuple[Tensor, Tensor]:
        calibration = self.scale(tokens)
        return calibration.mean, calibration.std

    @cached_property
    def _packs(self) -> dict[Any, packing.Packed]:
        return {}

    def packed(self, device: torch.device, dtype: torch.dtype, kind: str = "centered") -> packing.Packed:
        """The readers of a kind of score as a GPU multiplies them with rows of `dtype`; made once for each.

        In as few parts as keep their rounding below 1e-3 of the scores' spread, where a fit or a calibration with a
        covariance has found how many, else in two.
        """
        kind = kind if kind in ("raw", "cosine") else "centered"
        key = (device, dtype, kind)
        if key not in self._packs:
            found = (self.provenance.get("parts") or {}).get(str(dtype).removeprefix("torch."))
            parts = packing.UNKNOWN_PARTS if kind == "cosine" or found is None else found
            readers, centre = self.readers, self.centre if kind == "centered" else None
            with torch.inference_mode(False):
                made = packing.pack(self.unit if kind == "cosine" else readers, centre, dtype, parts)
                self._packs[key] = packing.Packed(*(t.to(device) for t in made))
        return self._packs[key]

    # --- calibrate

    def scale(self, tokens: Tokens | None = None) -> Calibration:
        """The calibration; raises CalibrationError where there is none, or one of other rows than `tokens` makes."""
        c = self.calibration
        if c is None:
            raise CalibrationError(
                "z: these directions are not calibrated", way_out="Use vectors.calibrate(reference)."
            )
        if tokens is not None and c.tokens is not None and tokens != c.tokens:
            raise CalibrationError(
                "z: the rows are of another kind than the reference",
                expected=c.tokens,
                got=tokens,
                way_out="Calibrate on rows chosen and pooled like those that are scored.",
            )
        return c

    def calibrate(self, reference: Moments | StreamReference) -> Directions:
        """The same directions with the mean and std of their centered scores over `reference`.

        Moments with covariance give both exactly: m = v.(mean - centre), s^2 = v'Cv. A StreamReference, read by a
        monitor over neutral text, adds what EMAs, windows and single tokens do per sequence. Raises CalibrationError.
        """
        if isinstance(reference, StreamReference):
            calibration = self.calibration
            if calibration is None:
                raise CalibrationError(
                    "reference: a stream needs a scale first", way_out="Calibrate on token Moments before."
                )
            calibration = dataclasses.replace(calibration, stream=reference)
            return dataclasses.replace(self, calibration=calibration)
        calibration, parts = self._measured(reference)
        return dataclasses.replace(self, calibration=calibration, provenance={**self.provenance, "parts": parts})

    def _measured(self, reference: Moments) -> tuple[Calibration, dict[str, int]]:
        """The calibration, and in how many parts its rows let the readers be packed."""
        if not reference.keeps_covariance:
            raise CalibrationError("reference: only means", way_out="Use Moments(covariance=True).")
        if reference.dim != self.dim:
            raise CalibrationError("reference: width", expected=self.dim, got=reference.dim)
        v, c = self.readers.double(), reference.covariance()
        std = ((v @ c) * v).sum(1).clamp_min(0).sqrt()
        mean = v @ (reference.mean - self.centre)
        calibration = Calibration(mean, std, reference.count, reference.tokens)
        return calibration, packing.parts_by_dtype(self.readers, c)

    # --- fit

    @overload
    @classmethod
    def fit(cls, stories: Moments, neutral: Moments | None = None, **options: Any) -> Directions: ...
    @overload
    @classmethod
    def fit(
        cls, stories: Mapping[str, Moments], neutral: Mapping[str, Moments] | None = None, **options: Any
    ) -> ByHookPoint: ...
    @classmethod
    def fit(
        cls,
        stories: Any,
        neutral: Any = None,
        *,
        scatter: Any = None,
        hook_point: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Directions of the labels of `stories`, or {hook point: Directions} for a mapping of them.

        method="difference": v_k = mean_k - mean over labels, less the leading components of the neutral covariance that
        reach `explained` (0.5) of its variance. method="whitened": readers v_k C^-1 with C the within-label covariance
        (`whiten_by="labels"`) or the neutral one ("neutral"), shrunk by `shrinkage` (0.3), the differences kept to
        `rank` (20) whitened components; `explained` is then 0. `scatter` names other Moments to whiten with, of the
        kind of rows that will be read. For a mapping, neutral and scatter are mappings too.
        Raises FitError, LabelError, ShapeError or ArgumentError.
        """
        recipe = Recipe(**options)
        if not isinstance(stories, Mapping):
            return cls._fit(stories, neutral, scatter, recipe, hook_point, provenance)
        if hook_point is not None:
            raise ArgumentError("hook_point: the mapping's keys name them already", got=hook_point)
        neutral, scatter = _beside(stories, "neutral", neutral), _beside(stories, "scatter", scatter)
        return ByHookPoint(
            (name, cls._fit(one, neutral[name], scatter[name], recipe, name, provenance))
            for name, one in stories.items()
        )

    @classmethod
    def _fit(
        cls,
        stories: Moments,
        neutral: Moments | None,
        scatter: Moments | None,
        recipe: Recipe,
        hook_point: str | None,
        provenance: Mapping[str, Any] | None,
    ) -> Directions:
        found = derive(stories, neutral, scatter, recipe)
        return cls(
            names=stories.labels,
            patterns=found.patterns,
            readers=found.readers,
            centre=found.centre,
            mean_norm=stories.mean_norm,
            residual=found.residual,
            hook_point=hook_point,
            tokens=stories.tokens,
            provenance={**(provenance or {}), **found.record},
        )


class ByHookPoint(dict[str, Directions]):
    """Directions of several hook points: a dict by name that is calibrated as one."""

    def calibrate(self, reference: Mapping[str, Moments] | Mapping[str, StreamReference]) -> ByHookPoint:
        """Every Directions calibrated on the reference of its own hook point; raises CalibrationError."""
        beside = _beside(self, "reference", reference)
        return ByHookPoint((name, one.calibrate(beside[name])) for name, one in self.items())


def _beside(leading: Mapping[str, Any], argument: str, others: Any) -> Mapping[str, Any]:
    """`others` as a mapping with an entry for every key of `leading`; None gives None to each."""
    if others is None:
        return dict.fromkeys(leading)
    if not isinstance(others, Mapping):
        raise ArgumentError(argument, expected="a mapping by hook point", got=type(others).__name__)
    missing = [name for name in leading if name not in others]
    if missing:
        raise ArgumentError(
            f"{argument}: hook points are missing", got=missing[:8], way_out="Give one for every hook point."
        )
    return others


def placed(model: nn.Module, vectors: Directions | Mapping[str, Directions]) -> dict[str, Directions]:
    """{module name: Directions} in `model`; raises ArgumentError for vectors without a place or of another model."""
    several = vectors if isinstance(vectors, Mapping) else {vectors.hook_point: vectors}
    found: dict[str, Directions] = {}
    for spec, directions in several.items():
        if spec is None:
            raise ArgumentError("vectors: they name no hook point", way_out="Give {hook point: vectors}.")
        check_model(model, directions.provenance.get("model"), f"vectors at {spec!r}")
        for name in resolve(model, spec):
            if name in found:
                raise ArgumentError(f"vectors: two sets for {name!r}", way_out="Name every module once.")
            found[name] = directions
    if not found:
        raise ArgumentError("vectors: an empty mapping", way_out="Give at least one hook point.")
    return found
