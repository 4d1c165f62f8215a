"""Read-out: what the sums of a Moments say, each second moment with the error bound that it carries."""

from __future__ import annotations

import abc
import warnings

import torch
from torch import Tensor

from . import precision
from .errors import FitError, LabelError, PrecisionError, PrecisionWarning
from .linalg import shrink
from .sums import Sums


class ReadOut(abc.ABC):
    """Statistics of the rows seen so far, float64; base of Moments, which says where the sums are."""

    labels: tuple[str, ...]
    keeps_covariance: bool
    strict: bool
    _coarsest: torch.dtype
    _norm_sum: float
    _norm_count: int

    @abc.abstractmethod
    def _view(self) -> Sums:
        """Sums over every row so far; raises FitError before the first."""

    @abc.abstractmethod
    def _check_whole(self) -> None:
        """Fetch what is still elsewhere; raises LedgerError where an update was interrupted."""

    def _filled(self) -> Sums:
        sums = self._view()
        if int(sums.count) == 0:
            raise FitError("Moments: no row was seen", way_out="Call update, or capture with it, first.")
        if not float(sums.weight) > 0:
            raise FitError("Moments: the weights add up to nothing", got=float(sums.weight))
        return sums

    @property
    def mean(self) -> Tensor:
        """Mean [D]."""
        return self._filled().mean()

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of every column [D]; 0 for a single row."""
        sums = self._trusted()
        return _over(sums.squares(), sums.weight - 1)

    @property
    def label_mean(self) -> Tensor:
        """Mean per label [K, D]; NaN for a label without rows."""
        return self._filled().label_mean()

    @property
    def label_variance(self) -> Tensor:
        """Unbiased variance per label and column [K, D]; 0 for a single row, NaN for none."""
        sums = self._filled()
        return _over(sums.label_squares(), (sums.label_weight - 1).unsqueeze(1))

    @property
    def mean_norm(self) -> float:
        """Mean |x_t| over the tokens used, before pooling, without the first of each sequence: the unit of steering."""
        self._check_whole()
        if self._norm_count == 0:
            raise FitError("mean_norm: no token was counted", way_out="Call update, or capture with it, first.")
        return self._norm_sum / self._norm_count

    def covariance(self, ddof: int = 1, shrinkage: float | None = None) -> Tensor:
        """Covariance [D, D] with denominator (weight - ddof), shrunk towards its scaled identity if asked.

        Raises FitError where only means are kept.
        """
        sums = self._trusted(covariance=True)
        cov = _over(sums.scatter(), sums.weight - ddof)
        return cov if shrinkage is None else shrink(cov, shrinkage)

    def total_scatter(self) -> Tensor:
        """S_T [D, D] = sum w (x - mean)(x - mean)'."""
        return self._trusted(covariance=True).scatter()

    def within_scatter(self) -> Tensor:
        """S_W [D, D] = sum over labels of the scatter about the label's own mean; needs every row labelled."""
        sums = self._trusted(covariance=True)
        _check_labelled(sums, "within_scatter")
        return sums.within()

    def between_scatter(self) -> Tensor:
        """S_B [D, D] = S_T - S_W = sum over labels of w_k (mean_k - mean)(mean_k - mean)'; needs every row labelled."""
        sums = self._trusted(covariance=True)
        _check_labelled(sums, "between_scatter")
        return sums.between()

    def precision(self) -> dict[str, float]:
        """`offset` = max over columns of ((mean - s)/std)^2, and the relative `variance_bound` that it implies."""
        sums = self._filled()
        offset = sums.offset()
        exact = not self.keeps_covariance or int(sums.count) < precision.FREEZE_ROWS  # folded in float64 throughout
        dtype = torch.float64 if exact else self._coarsest
        return {"offset": offset, "variance_bound": precision.variance_bound(dtype, offset)}

    def _trusted(self, covariance: bool = False) -> Sums:
        """The sums; where second moments are beyond the contract with a warning, or an error when strict."""
        if covariance and not self.keeps_covariance:
            way_out = "Construct it with Moments(covariance=True)."
            raise FitError("covariance: this Moments keeps only means", way_out=way_out)
        sums, report = self._view(), self.precision()
        # a shift that is not frozen is taken for this read-out alone: no stream has moved away from it
        if sums.frozen and not report["variance_bound"] <= precision.BOUND[self._coarsest]:
            text = (
                f"the stream moved {report['offset'] ** 0.5:.3g} standard deviations from the shift it is summed "
                f"about: variances may err by {report['variance_bound']:.1e} (relative)"
            )
            if self.strict:
                raise PrecisionError(text, way_out="Shuffle the stream, or construct with dtype=torch.float64.")
            warnings.warn(PrecisionWarning(text), stacklevel=3)
        return sums


def _check_labelled(sums: Sums, what: str) -> None:
    unlabelled = int(sums.count) - int(sums.label_count.sum())
    if unlabelled:
        raise LabelError(
            f"{what}: rows without a label",
            expected="every row labelled",
            got=f"{unlabelled} of {int(sums.count)} rows unlabelled",
            way_out="Accumulate unlabelled rows in a Moments of their own.",
        )


def _over(scatter: Tensor, denominator: Tensor) -> Tensor:
    """scatter / denominator, 0 where one row or less leaves no freedom, NaN where the scatter is."""
    return torch.where((denominator > 0) | scatter.isnan(), scatter / denominator, torch.zeros_like(scatter))
