"""Fitters: libraries that keep statistics of a stream of rows on the CPU, each by its own update."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from . import peers
from .harness import Absent, Contender

COMPONENTS = 256

Update = Callable[[Tensor], Tensor]  # adds rows and gives what the covariance of all of them is read from
Read = Callable[[Tensor, int], Tensor]  # of that and the number of rows


def fitters(labels: Tensor, dim: int, k: int) -> Iterator[Contender | Absent]:
    """All of them for rows with these labels; those of torch and NumPy first."""
    components = min(COMPONENTS, dim)
    yield _contender("torch float32 sums", lambda: _sums(labels, dim, k, torch.float32), _about_mean)
    yield _contender("torch float64 sums", lambda: _sums(labels, dim, k, torch.float64), _about_mean)
    yield _contender("NumPy float64 sums, no labels", lambda: _numpy(dim), _about_mean)
    for package, name, make, read in (
        ("concept_erasure", "concept-erasure LeaceFitter", lambda: _leace(labels, dim, k), _scatter),
        ("torchmetrics", "torchmetrics FID sums, no labels", lambda: _torchmetrics(dim), _about_mean),
        ("torch_incremental_pca", "torch-incremental-pca, no labels", lambda: _torch_pca(components), _whole),
        ("sklearn", "scikit-learn IncrementalPCA, no labels", lambda: _pca(components), _whole),
    ):
        yield peers.peer(package, name, lambda n=name, m=make, r=read: _contender(n, m, r))


def _contender(name: str, make: Callable[[], Update], read: Read) -> Contender:
    kept = make()
    return Contender(name, kept, lambda x: read(make()(x).double(), len(x)))


def _about_mean(found: Tensor, n: int) -> Tensor:
    """From x'x with the sum of x below it, [D + 1, D]."""
    return (found[:-1] - torch.outer(found[-1], found[-1]) / n) / (n - 1)


def _scatter(found: Tensor, n: int) -> Tensor:
    return found / (n - 1)


def _whole(found: Tensor, n: int) -> Tensor:
    return found


def _sums(labels: Tensor, dim: int, k: int, dtype: torch.dtype) -> Update:
    sums, scatter = torch.zeros(k, dim, dtype=dtype), torch.zeros(dim + 1, dim, dtype=dtype)

    def update(x: Tensor) -> Tensor:
        y = x.to(dtype)
        sums.index_add_(0, labels, y)
        scatter[:-1].addmm_(y.T, y)
        scatter[-1] += y.sum(0)
        return scatter

    return update


def _numpy(dim: int) -> Update:
    scatter = np.zeros((dim + 1, dim))

    def update(x: Tensor) -> Tensor:
        y = x.float().numpy().astype(np.float64)
        scatter[:-1] += y.T @ y
        scatter[-1] += y.sum(0)
        return torch.from_numpy(scatter)

    return update


def _leace(labels: Tensor, dim: int, k: int) -> Update:
    update, hot = peers.leace(dim, k, labels.device), nn.functional.one_hot(labels, k).float()
    return lambda x: update(x, hot)


class _Features(nn.Module):
    """Rows are the features: what FID asks of a model of one's own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, x: Tensor) -> Tensor:
        return x


def _torchmetrics(dim: int) -> Update:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(dim))

    def update(x: Tensor) -> Tensor:
        metric.update(x, real=True)
        return torch.cat([metric.real_features_cov_sum, metric.real_features_sum.reshape(1, -1)])

    return update


def _torch_pca(components: int) -> Update:
    from torch_incremental_pca import IncrementalPCA

    pca = IncrementalPCA(components, gram=True)

    def update(x: Tensor) -> Tensor:
        pca.partial_fit(x.float())
        return (pca.components_.T * pca.explained_variance_) @ pca.components_

    return update


def _pca(components: int) -> Update:
    from sklearn.decomposition import IncrementalPCA

    pca = IncrementalPCA(components)

    def update(x: Tensor) -> Tensor:
        pca.partial_fit(x.float().numpy())
        return torch.from_numpy((pca.components_.T * pca.explained_variance_) @ pca.components_)

    return update
