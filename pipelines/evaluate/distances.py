"""Distances between two sets of features, as pure functions of numpy arrays in float64.

Sets are arrays (N, D), or their mean (D) and covariance (D, D), which `Moments` sums up without holding the features.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np

Array = np.ndarray
BLOCK = 1000
"""Rows of a block, where a function goes through all pairs."""


@dataclass
class Moments:
    """Sums of features in float64, from which their mean and covariance follow."""

    count: int = 0
    total: Array = field(default_factory=lambda: np.zeros(0))
    products: Array = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, features: Array) -> Self:
        """Add features (N, D)."""
        rows = np.asarray(features, np.float64)
        if not self.count:
            self.total, self.products = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
        self.count += len(rows)
        self.total += rows.sum(0)
        self.products += rows.T @ rows
        return self

    @property
    def mean(self) -> Array:
        return self.total / self.count

    @property
    def covariance(self) -> Array:
        """As `numpy.cov`: divided by N - 1. At least two features are needed."""
        return (self.products - np.outer(self.total, self.mean)) / (self.count - 1)


def frechet_distance(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): FID, for features of Inception (Heusel et al., arXiv 1706.08500).

    The trace of the root is the sum of the roots of the eigenvalues of R^T C2 R with C1 = R R^T, which is symmetric: neither
    complex numbers nor an offset are needed where covariances are singular (fewer pictures than features).
    """
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    inner = root.T @ other_covariance @ root
    shared = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    difference = mean - other_mean
    return float(difference @ difference + np.trace(covariance) + np.trace(other_covariance) - 2 * shared)


def kernel_distance(
    real: Array, drawn: Array, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """KID: mean and deviation over subsets of the unbiased MMD with the kernel (x y / D + 1)^3 (arXiv 1801.01401).

    The subsets are those of torch-fidelity with the drawn pictures as its first input.
    """
    size = min(subset_size, len(real), len(drawn))
    generator = np.random.RandomState(seed)
    found = []
    for _ in range(num_subsets):
        x = drawn[generator.choice(len(drawn), size, replace=False)].astype(np.float64)
        y = real[generator.choice(len(real), size, replace=False)].astype(np.float64)
        own = sum(kernel.sum() - np.trace(kernel) for kernel in (_cubic(x, x), _cubic(y, y)))
        found.append(own / (size * (size - 1)) - 2 * _cubic(x, y).mean())
    return float(np.mean(found)), float(np.std(found))


def _cubic(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian_distance(real: Array, drawn: Array, *, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """CMMD, for unit features of CLIP: 1000 times the biased MMD with a Gaussian kernel (arXiv 2401.09603)."""
    own = _mean_gaussian(real, real, sigma) + _mean_gaussian(drawn, drawn, sigma)
    return scale * (own - 2 * _mean_gaussian(real, drawn, sigma))


def _mean_gaussian(x: Array, y: Array, sigma: float) -> float:
    blocks = (np.exp(_squared(x[at : at + BLOCK], y) / (-2 * sigma**2)).sum() for at in range(0, len(x), BLOCK))
    return float(sum(blocks)) / (len(x) * len(y))


def precision_recall(real: Array, drawn: Array, *, neighbors: int = 3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991): the share of drawn features within the manifold of the real ones, and
    of real ones within that of the drawn. A feature's ball reaches to its third neighbor; needs more than `neighbors` of each.
    """
    return _share_inside(drawn, real, neighbors), _share_inside(real, drawn, neighbors)


def _share_inside(asked: Array, manifold: Array, neighbors: int) -> float:
    radii = np.concatenate(
        [
            np.partition(_squared(manifold[at : at + BLOCK], manifold), neighbors, axis=1)[:, neighbors]
            for at in range(0, len(manifold), BLOCK)
        ]
    )
    inside = sum(int((_squared(asked[at : at + BLOCK], manifold) <= radii).any(1).sum()) for at in range(0, len(asked), BLOCK))
    return inside / len(asked)


def _squared(x: Array, y: Array) -> Array:
    """Squared distances (N, M) of the rows of two arrays."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.clip((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0, None)
