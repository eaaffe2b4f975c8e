"""Captions of several captioners are joined with their scores when they are read, and images are filtered by theirs."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.score.candidates import Candidates, Filters, scored_captioners
from pipelines.score.config import ImageFilter
from pipelines.tables.errors import MissingTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES, SCORES, image_scores_path, scores_path
from pipelines.tables.table import Table
from tests.support.contests import write_contest

CONTEST = {
    "x": {"original": ("told", 20.0), "a": ("a of x", 21.0)},
    "y": {"a": ("a of y", 22.5), "b": ("b of y", 23.0)},
    "z": {},
}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    write_contest(str(tmp_path), CONTEST)
    return str(tmp_path)


def test_captions_meet_their_scores_in_the_order_of_the_captioners(uri: str) -> None:
    assert Candidates(uri, ("original", "a", "b"), "clip").read("00000") == {
        "x": [
            {"captioner": "original", "caption": "told", "clip_score": 20.0},
            {"captioner": "a", "caption": "a of x", "clip_score": 21.0},
        ],
        "y": [
            {"captioner": "a", "caption": "a of y", "clip_score": 22.5},
            {"captioner": "b", "caption": "b of y", "clip_score": 23.0},
        ],
    }
    both = Candidates(uri, ("b", "a"), "clip").read("00000")  # one captioner is dropped, and nothing is made again
    assert [caption["captioner"] for caption in both["y"]] == ["b", "a"] and len(both["x"]) == 1


def test_without_a_clip_no_score_is_read(uri: str) -> None:
    candidates = Candidates(uri, ("original", "a"), None)
    assert [table.path for table in candidates.tables()] == ["images", "captions/a"]
    found = candidates.read("00000")["x"]
    assert [(caption["caption"], caption["clip_score"]) for caption in found] == [("told", None), ("a of x", None)]


def test_a_caption_without_a_score_does_not_compete(uri: str) -> None:
    table = Table(uri, scores_path("clip", "a"), SCORES)
    table.write_shard("00000", table.read_shard("00000").slice(0, 1))
    found = Candidates(uri, ("a", "b"), "clip").read("00000")
    assert [[caption["captioner"] for caption in captions] for captions in found.values()] == [["a"], ["b"]]


def test_scores_alone_are_those_of_the_join_in_the_shards_that_every_captioner_has(uri: str) -> None:
    candidates = Candidates(uri, ("original", "a", "b"), "clip")
    read = candidates.read("00000")
    for caption in (caption for captions in read.values() for caption in captions):
        del caption["caption"]
    assert candidates.read_scored("00000") == read
    for captioner in ("a", "original"):
        table = Table(uri, scores_path("clip", captioner), SCORES)
        table.write_shard("00001", table.read_shard("00000"))
    assert candidates.list_scored() == ["00000"]
    told = candidates.find_scored().explain()
    assert told == "b has scores for 1 of 2 shards: only shards that all captioners have are compared"
    both = Candidates(uri, ("original", "a"), "clip").find_scored()
    assert both.common == ["00000", "00001"] and both.explain() == ""
    with pytest.raises(MissingTableError, match=r"no table 'scores/clip/c' .* which has scores/clip/a, scores/clip/b"):
        Candidates(uri, ("a", "c"), "clip").list_scored()


def test_captioners_that_are_scored_are_those_with_a_table(uri: str) -> None:
    assert scored_captioners(uri, "clip") == ("original", "a", "b") and scored_captioners(uri, "siglip") == ()
    Table(uri, scores_path("clip", "c"), SCORES).write_file("_lease.json", b"")  # deleted, or not yet begun
    assert scored_captioners(uri, "clip") == ("original", "a", "b")


def test_filters_admit_images_within_all_limits(tmp_path: Path) -> None:
    scores = {"aesthetic": {"x": 5.0, "y": 6.0, "z": 4.5, "v": 7.0}, "nsfw": {"x": 0.5, "y": 0.75, "z": 0.0}}
    for name, by_id in scores.items():
        table = Table(str(tmp_path), image_scores_path(name), IMAGE_SCORES)
        table.claim(Identity("score_images", {}, {}, {}))
        rows = [{"id": row_id, "score": score} for row_id, score in by_id.items()]
        table.write_shard("00000", pa.Table.from_pylist(rows, IMAGE_SCORES))
    filters = Filters(str(tmp_path), {"aesthetic": ImageFilter(min=5.0), "nsfw": ImageFilter(max=0.5)})
    assert filters.read("00000", ["v", "x", "y", "z", "w"]) == [False, True, False, False, False]  # v, w: no score of nsfw
    assert [table.path for table in filters.tables()] == ["image_scores/aesthetic", "image_scores/nsfw"]
    assert Filters(str(tmp_path), {}).read("00000", ["x"]) == [True]
    with pytest.raises(ValueError, match="needs min, max or both"):
        ImageFilter()
