"""Distances of features against their published formulas, and streaming sums against numpy's own."""

import numpy as np
import pytest
from scipy import linalg

from pipelines.evaluate.distances import Moments, frechet_distance, gaussian_distance, kernel_distance, precision_recall

RNG = np.random.default_rng(0)
REAL = (RNG.gamma(2.0, 0.3, (400, 64)) @ RNG.normal(size=(64, 64)) / 8).astype(np.float32)
DRAWN = (RNG.gamma(1.5, 0.4, (300, 64)) @ RNG.normal(size=(64, 64)) / 8 + 0.05).astype(np.float32)


def published_frechet(real: np.ndarray, drawn: np.ndarray) -> float:
    """pytorch-fid's and clean-fid's formula."""
    (mu1, mu2), (sigma1, sigma2) = zip(*((x.mean(0, np.float64), np.cov(x, rowvar=False)) for x in (real, drawn)), strict=True)
    root = linalg.sqrtm(sigma1.dot(sigma2)).real
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root))


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sums = Moments().add(features)
    return sums.mean, sums.covariance


def test_the_frechet_distance_is_the_published_formula() -> None:
    assert frechet_distance(*moments(DRAWN), *moments(REAL)) == pytest.approx(published_frechet(REAL, DRAWN), rel=1e-6)
    assert frechet_distance(*moments(REAL), *moments(REAL)) == pytest.approx(0, abs=1e-9)


def test_fewer_pictures_than_features_need_no_offset() -> None:
    """Singular covariances, for which the published code finds complex numbers and rounds."""
    few = frechet_distance(*moments(DRAWN[:20]), *moments(REAL[:30]))
    assert few == pytest.approx(published_frechet(REAL[:30], DRAWN[:20]), rel=1e-4)
    shared = frechet_distance(*moments(DRAWN[:20]), *moments(DRAWN[:20]))
    assert shared == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_sums_over_parts_in_any_order_are_those_of_the_whole(parts: int) -> None:
    sums = Moments()
    for part in reversed(np.array_split(np.random.default_rng(parts).permutation(REAL), parts)):
        sums.add(part)
    assert sums.count == 400
    np.testing.assert_allclose(sums.mean, REAL.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sums.covariance, np.cov(REAL, rowvar=False), rtol=1e-9, atol=1e-12)


def test_kid_and_cmmd_by_hand() -> None:
    x, y = DRAWN[:50].astype(np.float64), REAL[:50].astype(np.float64)

    def cubic(a: np.ndarray, b: np.ndarray) -> float:
        return float(((a * b).sum() / 64 + 1) ** 3)

    own = sum(cubic(z[i], z[j]) for z in (x, y) for i in range(50) for j in range(50) if i != j) / (50 * 49)
    cross = sum(cubic(a, b) for a in x for b in y) / 2500
    mean, deviation = kernel_distance(REAL[:50], DRAWN[:50], num_subsets=3)
    assert mean == pytest.approx(own - 2 * cross, rel=1e-9) and deviation == pytest.approx(0, abs=1e-12)

    def gaussian(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((u - v) ** 2).sum() / 200) for u in a] for v in b]))

    expected = 1000 * (gaussian(x, x) + gaussian(y, y) - 2 * gaussian(x, y))
    assert gaussian_distance(REAL[:50], DRAWN[:50]) == pytest.approx(expected, rel=1e-9)


def test_precision_and_recall_tell_a_narrow_set_from_a_wide_one() -> None:
    real = RNG.normal(size=(1200, 4)).astype(np.float32)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    precision, recall = precision_recall(real, (RNG.normal(size=(1200, 4)) * 0.1).astype(np.float32))
    assert precision > 0.95 and recall < 0.3
