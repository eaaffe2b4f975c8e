"""Policies side by side: expected figures against many draws, and a table read shard by shard."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.score.compare import compare_policies, compare_table
from pipelines.score.config import POLICIES, SelectionConfig
from pipelines.score.selection import Caption, all_policies, choose_caption
from pipelines.tables.errors import MissingTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import SCORES, Row, scores_path
from pipelines.tables.table import Table

SELECTION = SelectionConfig(proportions={"original": 1, "a": 3}, min_best_score=22.0)


def make_rows(count: int) -> list[Row]:
    """Images with up to three captions of different quality; some lack the original one, some are bad altogether."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        names = ("original", "a", "b") if number % 3 else ("a", "b")
        base = 15 if number % 10 == 0 else 26
        captions = [{"captioner": n, "caption": f"{n} {number}", "clip_score": float(base + rng.normal(0, 1))} for n in names]
        rows.append({"id": f"id{number}", "captions": captions})
    return rows


def captions_of(rows: list[Row]) -> list[list[Caption]]:
    return [row["captions"] for row in rows]


def test_expected_figures_are_those_of_many_draws() -> None:
    rows, num_epochs = make_rows(60), 300
    policies = all_policies(SELECTION, ["original", "a", "b"])
    comparison = compare_policies(captions_of(rows), policies)
    assert list(comparison.policies) == list(POLICIES) and comparison.num_images == 60
    for name, figures in comparison.policies.items():
        drawn: Counter[str] = Counter()
        scores = []
        for row in rows:
            for epoch in range(num_epochs):
                choice = choose_caption(row["captions"], policies[name], seed=0, epoch=epoch, sample_id=row["id"])
                if choice is not None:
                    drawn[choice["captioner"]] += 1
                    scores.append(choice["clip_score"])
        assert figures.num_dropped == 60 - drawn.total() / num_epochs == 6
        for captioner in ("original", "a", "b"):
            share = figures.shares.get(captioner, 0.0)
            sigma = math.sqrt(0.25 / drawn.total())  # at most
            assert drawn[captioner] / drawn.total() == pytest.approx(share, abs=4 * sigma)
        assert figures.expected_score == pytest.approx(np.mean(scores), abs=0.05)


def test_entropy_is_in_nats_and_dropped_images_have_none() -> None:
    two = [{"captioner": name, "caption": "", "clip_score": 30.0} for name in ("a", "b")]
    one = [{"captioner": "a", "caption": "", "clip_score": 30.0}]
    bad = [{"captioner": "a", "caption": "", "clip_score": 10.0}]
    found = compare_policies([two, one, bad, []], all_policies(SELECTION, [])).policies
    assert found["random"].entropy == pytest.approx(math.log(2) / 2)
    assert found["paper"].entropy == pytest.approx(math.log(2) / 2)
    assert found["best"].entropy == 0.0 and found["best"].shares == {"a": 1.0}
    assert found["random"].num_dropped == 2 and found["random"].shares == {"a": 0.75, "b": 0.25}
    nothing = compare_policies([bad], all_policies(SELECTION, [])).policies["best"]
    assert (nothing.expected_score, nothing.entropy, nothing.shares) == (None, None, {})


def test_tables_are_read_shard_by_shard_or_in_part(tmp_path: Path) -> None:
    rows, names = make_rows(30), ("original", "a", "b")
    with pytest.raises(MissingTableError, match="scores/clip/original"):
        compare_table(str(tmp_path), "clip", names, SELECTION)
    for name in names:
        table = Table(str(tmp_path), scores_path("clip", name), SCORES)
        table.claim(Identity("score", {}, {}, {}))
        for shard in range(3):
            scores = [
                {"id": row["id"], "clip_score": caption["clip_score"]}
                for row in rows[10 * shard : 10 * shard + 10]
                for caption in row["captions"]
                if caption["captioner"] == name
            ]
            table.write_shard(f"{shard:05d}", pa.Table.from_pylist(scores, SCORES))
    seen: list[tuple[int, int]] = []
    comparison, scope = compare_table(str(tmp_path), "clip", names, SELECTION, on_shard=lambda *progress: seen.append(progress))
    expected = compare_policies(captions_of(rows), all_policies(SELECTION, names))
    assert comparison.num_images == 30 and list(comparison.policies) == list(expected.policies)
    for name, figures in expected.policies.items():  # a table holds float32
        assert comparison.policies[name].shares == pytest.approx(figures.shares, abs=1e-4)
        assert comparison.policies[name].expected_score == pytest.approx(figures.expected_score, abs=1e-4)
    assert seen == [(1, 3), (2, 3), (3, 3)] and scope.total_shards == 3
    part, scope = compare_table(str(tmp_path), "clip", names, SELECTION, max_shards=2)
    assert scope.shards == ["00000", "00002"] and part.num_images == 20
    assert [comparison.captioners[name].num_captions for name in names] == [20, 30, 30]
    alone, _ = compare_table(str(tmp_path), "clip", ["a"], SELECTION)  # the others' tables are not looked at
    assert list(alone.captioners) == ["a"] and alone.policies["best"].shares == {"a": 1.0}
