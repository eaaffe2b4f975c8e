"""Pairs by embedding: those of all comparisons, in one block and in clusters, and no more where hundreds are alike."""

from pathlib import Path

import numpy as np
import pytest

from jobs.benchmark.duplicates import CLIP, planted_embeds, write_embeds
from pipelines.score import semantic_pairs
from pipelines.score.config import SEMANTIC_DUPLICATES, SemanticConfig
from pipelines.score.duplicates import run_duplicates
from pipelines.score.semantic_pairs import MAX_PAIRS, find_pairs
from pipelines.tables.schema import IMAGE_SCORES, image_scores_path
from pipelines.tables.table import Table

MIN = 0.95
ROWS_PER_SHARD = 400


def shuffled_positions(count: int) -> np.ndarray:
    """The positions of all rows, in some order of preference."""
    rows = np.random.default_rng(1).permutation(count).astype(np.uint64)
    size = np.uint64(ROWS_PER_SHARD)
    return (rows // size << np.uint64(32)) + rows % size


def all_pairs(vectors: np.ndarray, positions: np.ndarray) -> dict[tuple[int, int], float]:
    """(worse rank, better rank) -> cosine, by comparing all with all."""
    rows = (positions >> np.uint64(32)) * np.uint64(ROWS_PER_SHARD) + (positions & np.uint64(2**32 - 1))
    unit = vectors[rows].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = np.tril(unit @ unit.T, -1)
    return {(i, j): cosines[i, j] for i, j in np.argwhere(cosines >= MIN).tolist()}


def test_pairs_against_all_comparisons(tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = planted_embeds(3000, 64)
    positions = shuffled_positions(len(vectors))
    embeds = write_embeds(str(tmp_path), vectors, ROWS_PER_SHARD)
    wanted = all_pairs(vectors, positions)
    assert len(wanted) > 250

    worse, better, cosines = find_pairs(embeds, positions, 0, MIN)
    found = dict(zip(zip(worse.tolist(), better.tolist(), strict=True), cosines.tolist(), strict=True))
    assert found == pytest.approx(wanted, abs=1e-5) and len(found) == len(worse)

    num_old = 2000
    worse, better, _ = find_pairs(embeds, positions, num_old, MIN)
    assert {*zip(worse.tolist(), better.tolist(), strict=True)} == {pair for pair in wanted if pair[0] >= num_old}

    monkeypatch.setattr(semantic_pairs, "EXACT_ROWS", 1000)
    monkeypatch.setattr(semantic_pairs, "MIN_ROWS_PER_TASK", 1000)
    worse, better, _ = find_pairs(embeds, positions, 0, MIN)
    clustered = {*zip(worse.tolist(), better.tolist(), strict=True)}
    assert clustered <= wanted.keys() and len(clustered) >= 0.98 * len(wanted)


def test_hundreds_of_copies_make_no_tens_of_thousands_of_pairs(tmp_path: Path, local_ray: None) -> None:
    vectors = np.repeat(planted_embeds(5, 64), 60, axis=0)
    worse, better, _ = find_pairs(write_embeds(str(tmp_path), vectors, 300), np.arange(300, dtype=np.uint64), 0, 0.999)
    assert len(worse) <= 300 * MAX_PAIRS
    assert {rank - rank % 60 for rank in better.tolist()} == {0, 60, 120, 180, 240}
    run_duplicates(str(tmp_path), SemanticConfig(clip=CLIP, min_similarity=0.999))
    verdicts = Table(str(tmp_path), image_scores_path(SEMANTIC_DUPLICATES), IMAGE_SCORES).read_shard("00000")
    assert verdicts["detail"].null_count == 5


def test_an_embedding_that_is_no_unit_vector_is_named(tmp_path: Path, local_ray: None) -> None:
    vectors = planted_embeds(10, 8)
    vectors[7] = np.nan
    write_embeds(str(tmp_path), vectors)
    with pytest.raises(ValueError, match=r"^/.*/00000\.parquet: the embedding of 0+7 has length nan"):
        run_duplicates(str(tmp_path), SemanticConfig(clip=CLIP))
