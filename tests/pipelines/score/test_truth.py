"""Scores of captions by the truth about drawn scenes."""

import json
from pathlib import Path

import pytest

from pipelines.score.candidates import Candidates
from pipelines.score.truth import TRUTH, run_truth_scores, share_right
from pipelines.shapes.grammar import full_caption, parse, write_caption
from pipelines.shapes.scenes import Scene, Thing
from pipelines.tables.errors import TooManyRejectsError
from tests.support.contests import write_contest

STAR = "a large red solid star in the center of a white background"
PAIR = Scene((Thing("circle", "red", "solid"), Thing("square", "blue", "striped")), "gray", relation="left of")


def test_the_share_of_a_scene_that_a_caption_says_right() -> None:
    star = parse(STAR)
    assert star is not None
    by_hand = {
        STAR: 1.0,
        STAR.replace("red", "blue"): 5 / 6,
        STAR.replace("large", "small").replace("star", "circle"): 4 / 6,
        "a red star": 2 / 6,  # what is left out is not right
        "a red circle left of a blue square": 1 / 6,
        "there is something": 0.0,
    }
    assert {caption: share_right(caption, star) for caption in by_hand} == pytest.approx(by_hand)
    assert share_right(full_caption(PAIR), PAIR) == 1.0
    converse = write_caption(PAIR, "a {color} {shape} {relation} a {color2} {shape2}", converse=True)
    assert share_right(converse, PAIR) == pytest.approx(5 / 8)  # neither fill, and no background


def test_scores_by_the_truth_are_read_like_those_of_a_clip(tmp_path: Path, without_ray: None) -> None:
    uri, wrong = str(tmp_path), STAR.replace("star", "circle")
    contest = {"x": {"a": (STAR, 1.0), "b": (wrong, 90.0)}, "y": {"a": (wrong, 1.0)}}
    write_contest(uri, contest, metadata={name: json.dumps({"truth": STAR}) for name in contest})
    for captioner in ("a", "b"):
        assert run_truth_scores(uri, captioner).num_rejects == 0
    assert run_truth_scores(uri, "a").was_done
    read = Candidates(uri, ("a", "b"), TRUTH).read("00000")
    scores = {name: [caption["clip_score"] for caption in captions] for name, captions in read.items()}
    assert scores == {"x": pytest.approx([100, 500 / 6]), "y": pytest.approx([500 / 6])}


def test_images_without_a_truth_are_told(tmp_path: Path, without_ray: None) -> None:
    write_contest(str(tmp_path), {"x": {"a": (STAR, 1.0)}})
    with pytest.raises(TooManyRejectsError, match="no_truth 1"):
        run_truth_scores(str(tmp_path), "a")
