"""Directions: frozen vectors fitted from moments, with the readers that score rows and the scale that calibrates them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

from . import linalg, ops
from .errors import CalibrationError, FitError, LabelError, ShapeError, near
from .moments import Moments
from .tokens import Tokens

KINDS = ("raw", "centered", "cosine", "z")
NOISE_LIMIT = 1e-3  # rounding noise of a float32 reader against the spread of its scores


@dataclass(frozen=True)
class StreamReference:
    """What scores did over neutral sequences, read token by token: EMA moments [K], and each sequence's largest values [S, K]."""

    alpha: float
    window: int
    ema_mean: Tensor
    ema_std: Tensor
    token_max: Tensor
    ema_max: Tensor
    window_max: Tensor

    @property
    def sequences(self) -> int:
        """How many neutral sequences were read."""
        return len(self.ema_max)


@dataclass(frozen=True)
class Calibration:
    """Mean and std [K] of centered scores over a reference of `count` rows under token rule `tokens`; and its stream, if read."""

    mean: Tensor
    std: Tensor
    count: int
    tokens: Tokens | None
    stream: StreamReference | None = None


@dataclass(frozen=True, eq=False)
class Directions:
    """One direction per name, at one hook point.

    patterns [K, D]: what the label adds to the mean over labels (steering and cosines use them at unit length).
    readers [K, D]: unit vectors that scores multiply with; the unit patterns unless whitened. centre [D]: the mean over labels.
    mean_norm: E|x_t|, the unit of steering. residual [K]: fraction of each pattern's length left after the confounds.
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
        k, d = self.patterns.shape
        for name, t, shape in (
            ("readers", self.readers, (k, d)),
            ("centre", self.centre, (d,)),
            ("residual", self.residual, (k,)),
        ):
            if tuple(t.shape) != shape:
                raise ShapeError(f"Directions: {name}", expected=list(shape), got=list(t.shape))
        if len(self.names) != k or len(set(self.names)) != k:
            raise LabelError("Directions: names", expected=f"{k} distinct names", got=len(set(self.names)))
        for name in ("patterns", "readers", "centre"):
            if not bool(getattr(self, name).isfinite().all()):
                raise FitError(
                    f"Directions: {name} holds NaN or Inf", way_out="The file or the fit is broken: derive it again."
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
        return self.patterns.norm(dim=1)

    def index(self, names: Sequence[str]) -> list[int]:
        """Places of `names`; raises LabelError with near matches."""
        place = {n: i for i, n in enumerate(self.names)}
        for name in names:
            if name not in place:
                raise LabelError(f"direction {name!r}: unknown", way_out=near(name, self.names))
        return [place[n] for n in names]

    def __getitem__(self, names: str | Sequence[str]) -> Directions:
        """The named directions, as Directions."""
        at = self.index([names] if isinstance(names, str) else names)
        calibration = self.calibration
        if calibration is not None:
            stream = calibration.stream
            if stream is not None:
                parts = {n: getattr(stream, n)[..., at] for n in STREAM_TENSORS}
                stream = dataclasses.replace(stream, **parts)
            calibration = dataclasses.replace(
                calibration, mean=calibration.mean[at], std=calibration.std[at], stream=stream
            )
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
        """Scores [..., K] of rows x [..., D], float32 (float64 for float64 rows).

        kind: "raw" x.v; "centered" (x - centre).v; "cosine" x.v / |x|; "z" (centered - m) / s against the calibration.
        `tokens`, if given, is the rule the rows were made by, and must be the calibration's. Raises ShapeError,
        CalibrationError, or LabelError for an unknown kind.
        """
        if kind not in KINDS:
            raise LabelError(f"kind {kind!r}: unknown", way_out=near(kind, KINDS))
        if x.shape[-1] != self.dim:
            raise ShapeError("x: width", expected=f"D = {self.dim}", got=x.shape[-1])
        rows = x.reshape(-1, self.dim)
        centre = None if kind in ("raw", "cosine") else self.centre.to(x.device)
        scores = ops.project(rows, self.readers.to(x.device), centre, kind == "cosine")
        if kind == "z":
            c = self._calibrated(tokens)
            scores = (scores - c.mean.to(scores)) / c.std.to(scores)
        return scores.reshape(*x.shape[:-1], len(self))

    def _calibrated(self, tokens: Tokens | None) -> Calibration:
        c = self.calibration
        if c is None:
            raise CalibrationError("z: these directions are not calibrated", way_out="Use vectors.calibrate(reference).")
        if tokens is not None and c.tokens is not None and tokens.pool != c.tokens.pool:
            raise CalibrationError(
                "z: the rows are of another kind than the reference",
                expected=c.tokens,
                got=tokens,
                way_out="Calibrate on rows pooled like those that are scored.",
            )
        return c

    def calibrate(self, reference: Moments | StreamReference) -> Directions:
        """The same directions with the mean and std of their centered scores over `reference`.

        Moments with covariance give both exactly: m = v.(mean - centre), s^2 = v'Cv. A StreamReference, read by a monitor
        over neutral text, adds what EMAs, windows and single tokens do per sequence. Raises CalibrationError.
        """
        if isinstance(reference, StreamReference):
            if self.calibration is None:
                raise CalibrationError(
                    "reference: a stream needs a scale first", way_out="Calibrate on token Moments before."
                )
            return dataclasses.replace(
                self, calibration=dataclasses.replace(self.calibration, stream=reference)
            )
        if not reference.keeps_covariance:
            raise CalibrationError("reference: only means", way_out="Use Moments(covariance=True).")
        if reference.dim != self.dim:
            raise CalibrationError("reference: width", expected=self.dim, got=reference.dim)
        v = self.readers.double()
        std = ((v @ reference.covariance()) * v).sum(1).clamp_min(0).sqrt()
        if not bool((std > 0).all()):
            raise CalibrationError(
                "reference: its scores do not vary", got=f"{reference.count} rows", way_out="Give more rows."
            )
        mean = v @ (reference.mean - self.centre)
        return dataclasses.replace(
            self, calibration=Calibration(mean, std, reference.count, reference.tokens)
        )

    # --- fit

    @overload
    @classmethod
    def fit(cls, stories: Moments, neutral: Moments | None = None, **options: Any) -> Directions: ...
    @overload
    @classmethod
    def fit(
        cls, stories: Mapping[str, Moments], neutral: Mapping[str, Moments] | None = None, **options: Any
    ) -> dict[str, Directions]: ...
    @classmethod
    def fit(cls, stories: Any, neutral: Any = None, **options: Any) -> Any:
        """Directions of the labels of `stories`, or {hook point: Directions} for a mapping.

        method="difference": v_k = mean_k - mean over labels, less the leading components of the neutral covariance that
        reach `explained` (0.5) of its variance. method="whitened": readers v_k C^-1 with C the within-label covariance
        (`whiten_by="labels"`) or the neutral one ("neutral"), shrunk by `shrinkage` (0.3), the differences kept to `rank`
        (20) whitened components; `explained` is then 0. `scatter` names other Moments to whiten with, of the kind of rows
        that will be read. Raises FitError, LabelError.
        """
        if isinstance(stories, Mapping):
            scatter = options.pop("scatter", None) or {}
            return {
                name: _fit(m, (neutral or {}).get(name), hook_point=name, scatter=scatter.get(name), **options)
                for name, m in stories.items()
            }
        return _fit(stories, neutral, **options)


STREAM_TENSORS = ("ema_mean", "ema_std", "token_max", "ema_max", "window_max")


def _fit(
    stories: Moments,
    neutral: Moments | None,
    *,
    method: str = "difference",
    scatter: Moments | None = None,
    whiten_by: str = "labels",
    shrinkage: float = 0.3,
    rank: int | None = 20,
    explained: float | None = None,
    hook_point: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Directions:
    if method not in ("difference", "whitened"):
        raise FitError("method", expected="'difference' or 'whitened'", got=repr(method))
    means = _label_means(stories)
    centre = means.mean(0)
    differences = means - centre
    explained = (0.5 if method == "difference" else 0.0) if explained is None else explained
    basis, reached = differences.new_zeros(0, len(centre)), 0.0
    if neutral is not None and explained > 0:
        basis, reached = linalg.principal_subspace(neutral.covariance(), explained)
    patterns = linalg.project_out(differences, basis)
    residual = patterns.norm(dim=1) / differences.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    _check_lengths(stories.labels, differences, residual)
    readers = patterns
    if method == "whitened":
        spread = _whitening_covariance(stories, neutral, scatter, whiten_by)
        readers = whiten(patterns, linalg.shrink(spread, shrinkage), rank)
    readers, noise = _rounded(linalg.unit(readers)[0], scatter or stories)
    return Directions(
        names=stories.labels,
        patterns=patterns,
        readers=readers,
        centre=centre,
        mean_norm=stories.mean_norm,
        residual=residual,
        hook_point=hook_point,
        tokens=stories.tokens,
        provenance={
            **(provenance or {}),
            "method": method,
            "whiten_by": whiten_by if method == "whitened" else None,
            "shrinkage": shrinkage if method == "whitened" else None,
            "rank": rank if method == "whitened" else None,
            "explained": explained,
            "confounds": len(basis),
            "confounds_reach": reached,
            "rows": stories.count,
            "reader_noise": noise,
        },
    )


def whiten(patterns: Tensor, covariance: Tensor, rank: int | None) -> Tensor:
    """Readers V C^-1 [K, D], the whitened patterns V C^(-1/2) kept to their `rank` leading components.

    The optimal linear reader of a pattern in noise C; reduced-rank as in linear discriminant analysis (Hastie, Tibshirani
    and Friedman, section 4.3.3).
    """
    w = linalg.whitener(covariance)
    whitened = patterns @ w
    if rank is not None and rank < min(whitened.shape):
        basis = torch.linalg.svd(whitened, full_matrices=False)[2][:rank]
        whitened = (whitened @ basis.T) @ basis
    return whitened @ w


def _label_means(stories: Moments) -> Tensor:
    if len(stories.labels) < 2:
        raise FitError("stories: directions are differences between labels", expected="at least 2", got=len(stories.labels))
    empty = [n for n, count in zip(stories.labels, stories.label_count.tolist(), strict=True) if not count]
    if empty:
        raise FitError(
            f"stories: {len(empty)} labels have no row", got=empty[:8], way_out="Give them text, or leave the labels out."
        )
    return stories.label_mean


def _check_lengths(names: Sequence[str], differences: Tensor, residual: Tensor) -> None:
    lengths = differences.norm(dim=1)
    flat = [n for n, bad in zip(names, ((residual < 1e-6) | (lengths == 0)).tolist(), strict=True) if bad]
    if flat:
        raise FitError(
            "patterns: nothing is left of a direction once centre and confounds are taken out",
            got=flat[:8],
            way_out="Lower `explained`, or give rows that tell the labels apart.",
        )


def _whitening_covariance(
    stories: Moments, neutral: Moments | None, scatter: Moments | None, whiten_by: str
) -> Tensor:
    if whiten_by not in ("labels", "neutral"):
        raise FitError("whiten_by", expected="'labels' or 'neutral'", got=repr(whiten_by))
    source = scatter or (stories if whiten_by == "labels" else neutral)
    if source is None:
        raise FitError("neutral: whiten_by='neutral' needs the neutral Moments", way_out="Give neutral=.")
    if whiten_by == "neutral":
        return source.covariance()
    if not source.labels:
        raise FitError("scatter: whiten_by='labels' needs labelled Moments", way_out="Give labels, or whiten_by='neutral'.")
    freedom = source.count - int((source.label_count > 0).sum())
    if freedom < 1:
        raise FitError(
            "whitened: one row per label leaves no scatter within labels",
            got=f"{source.count} rows, {len(source.labels)} labels",
            way_out="Give more stories per label, or method='difference'.",
        )
    return source.within_scatter() / freedom


def _rounded(readers: Tensor, source: Moments) -> tuple[Tensor, float | None]:
    """Readers in float32, or in float64 where rounding would add noise sqrt(e'Ce) above 1e-3 of sqrt(v'Cv)."""
    single = readers.float()
    if not source.keeps_covariance:
        return single, None
    c = source.covariance()
    error = readers - single.double()
    noise = ((error @ c) * error).sum(1).clamp_min(0).sqrt()
    spread = ((readers @ c) * readers).sum(1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    worst = float((noise / spread).max())
    return (readers if worst > NOISE_LIMIT else single), worst
