"""Pairs by perceptual hash: every pair is found, the best stays, and every other image is near one that stays."""

import numpy as np
import pytest

from pipelines.score.hash_pairs import band_masks, decide, near_pairs
from pipelines.score.verdicts import Known, Verdicts


def clustered(count: int, seed: int = 0) -> np.ndarray:
    """Hashes of which many lie within a few bits of each other."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count // 4, dtype=np.uint64)[rng.integers(0, count // 4, count)]
    for _ in range(5):
        bit = np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
        hashes ^= np.where(rng.random(count) < 0.5, bit, np.uint64(0))
    return hashes


def verdicts_on(hashes: np.ndarray, pixels: np.ndarray, is_new: np.ndarray | bool = True) -> Verdicts:
    count = len(hashes)
    known = Known(np.arange(count, dtype=np.uint64), pixels, np.broadcast_to(is_new, count))
    return decide(known, hashes, 3, near_pairs)


@pytest.mark.parametrize("max_distance", [0, 1, 3, 4, 7])
def test_pairs_against_all_comparisons(max_distance: int) -> None:
    unique = np.unique(clustered(600))
    distances = np.bitwise_count(unique[:, None] ^ unique[None])
    wanted = {(i, j) for i, j in np.argwhere(distances <= max_distance).tolist() if i < j}
    parts = [np.stack(part, axis=1) for part in near_pairs(unique, max_distance)]
    found = [tuple(sorted(pair)) for part in parts for pair in part.tolist()]
    assert len(found) == len(set(found)) and set(found) == (wanted if max_distance else set())
    assert max_distance < 3 or len(wanted) > 100
    masks = band_masks(max_distance + 1)
    assert int(np.bitwise_or.reduce(masks)) == 2**64 - 1 and np.bitwise_count(masks).sum() == 64


def test_the_best_stays_and_every_other_is_near_it() -> None:
    rng = np.random.default_rng(1)
    hashes, pixels = clustered(500, 1), rng.integers(1, 5, 500)
    verdicts = verdicts_on(hashes, pixels)
    refused = dict(zip(verdicts.positions.tolist(), verdicts.twins.tolist(), strict=True))
    kept = [place for place in range(500) if place not in refused]
    assert 20 < len(refused) < 480
    for place, twin in refused.items():
        assert twin not in refused
        assert (hashes[place] ^ hashes[twin]).item().bit_count() <= 3
        assert (-pixels[twin], twin) < (-pixels[place], place)
    apart = np.bitwise_count(hashes[kept][:, None] ^ hashes[kept][None]) + 64 * np.eye(len(kept), dtype=int)
    assert apart.min() > 3
    assert verdicts.scores.tolist() == [1 - (hashes[p] ^ hashes[t]).item().bit_count() / 64 for p, t in refused.items()]


def test_old_images_stay_and_plain_ones_say_nothing() -> None:
    telling = 0x0F0F0F0F0F0F0F0F
    hashes = np.array([telling, telling ^ 1, 0, 0, 1], np.uint64)
    pixels = np.array([1, 100, 5, 5, 5])
    is_new = np.array([False, True, True, True, True])
    verdicts = verdicts_on(hashes, pixels, is_new)
    assert (verdicts.positions.tolist(), verdicts.twins.tolist(), verdicts.scores.tolist()) == ([1], [0], [1 - 1 / 64])
