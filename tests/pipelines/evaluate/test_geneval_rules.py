"""GenEval's rules on hand-made detections: each verdict is the one that the published code gives for the same input."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from pipelines.draw.prompts import read_named
from pipelines.evaluate.geneval.prompts import NAMES, PromptReader, request_of
from pipelines.evaluate.geneval.rules import (
    COLORS,
    Clause,
    Detection,
    Request,
    TaskCounts,
    Thresholds,
    judge,
    keep_detections,
    overlap,
    relations,
    wanted_objects,
)

A_CAT, TWO_CATS, THREE_CATS = (Clause("cat", count) for count in (1, 2, 3))
LEFT, RIGHT, TOP, BELOW = (0, 40, 20, 60), (70, 40, 90, 60), (40, 0, 60, 20), (40, 80, 60, 100)


def cat(score: float, box: Sequence[float] = LEFT) -> Detection:
    return Detection("cat", score, tuple(box))  # type: ignore[arg-type]


def dog(score: float, box: Sequence[float] = RIGHT) -> Detection:
    return Detection("dog", score, tuple(box))  # type: ignore[arg-type]


def placed(position: str, box: Sequence[float], other: Sequence[float] = LEFT) -> tuple[list[Detection], Request]:
    """A dog at `box` and a cat at `other`, and a request for a dog at a position relative to a cat."""
    return [cat(0.9, other), dog(0.9, box)], Request("position", (A_CAT, Clause("dog", 1, position=(position, 0))))


CASES: dict[str, tuple[tuple[list[Detection], Request], dict[str, str], bool]] = {
    # what is detected and asked for, the colors of objects by class, the verdict
    "one is there": (([cat(0.31)], Request("single_object", (A_CAT,))), {}, True),
    "more than one is fine": (([cat(0.9), cat(0.9, TOP)], Request("single_object", (A_CAT,))), {}, True),
    "the threshold itself is too little": (([cat(0.3)], Request("single_object", (A_CAT,))), {}, False),
    "none is there": (([dog(0.9)], Request("single_object", (A_CAT,))), {}, False),
    "two classes": (([cat(0.5), dog(0.5)], Request("two_object", (A_CAT, Clause("dog", 1)))), {}, True),
    "one class of two": (([cat(0.5), dog(0.2)], Request("two_object", (A_CAT, Clause("dog", 1)))), {}, False),
    "counted": (([cat(0.91), cat(0.95, TOP)], Request("counting", (TWO_CATS,), (THREE_CATS,))), {}, True),
    "counting wants 0.9": (([cat(0.9), cat(0.95, TOP)], Request("counting", (TWO_CATS,), (THREE_CATS,))), {}, False),
    "weak ones are not counted": (
        ([cat(0.91), cat(0.95, TOP), cat(0.8, BELOW)], Request("counting", (TWO_CATS,), (THREE_CATS,))), {}, True),
    "one too many": (
        ([cat(0.91), cat(0.95, TOP), cat(0.92, BELOW)], Request("counting", (TWO_CATS,), (THREE_CATS,))), {}, False),
    "excluded alone": (([cat(0.9), dog(0.9)], Request("single_object", (A_CAT,), (Clause("dog", 1),))), {}, False),
    "fewer than excluded": (([cat(0.9), dog(0.9)], Request("single_object", (A_CAT,), (Clause("dog", 2),))), {}, True),
    "any exclusion is enough": (
        ([cat(0.9), dog(0.9)], Request("single_object", (A_CAT,), (Clause("cup", 1), Clause("dog", 1)))), {}, False),
    "right color": (([cat(0.9)], Request("colors", (Clause("cat", 1, "red"),))), {"cat": "red"}, True),
    "wrong color": (([cat(0.9)], Request("colors", (Clause("cat", 1, "red"),))), {"cat": "blue"}, False),
    "only the best is looked at": (
        ([cat(0.9), cat(0.8, TOP)], Request("colors", (Clause("cat", 1, "red"),))), {"cat": "blue,red"}, False),
    "all wanted have the color": (
        ([cat(0.9), cat(0.8, TOP)], Request("colors", (Clause("cat", 2, "red"),))), {"cat": "red,blue"}, False),
    "two colors": (
        ([cat(0.9), dog(0.9)], Request("color_attr", (Clause("cat", 1, "red"), Clause("dog", 1, "blue")))),
        {"cat": "red", "dog": "blue"}, True),
    "colors exchanged": (
        ([cat(0.9), dog(0.9)], Request("color_attr", (Clause("cat", 1, "red"), Clause("dog", 1, "blue")))),
        {"cat": "blue", "dog": "red"}, False),
    "right of": (placed("right of", RIGHT), {}, True),
    "not left of": (placed("left of", RIGHT), {}, False),
    "left of": (placed("left of", LEFT, RIGHT), {}, True),
    "above": (placed("above", TOP, BELOW), {}, True),
    "below": (placed("below", BELOW, TOP), {}, True),
    "a diagonal is both": (placed("above", (60, 0, 80, 20), (0, 60, 20, 80)), {}, True),
    "beside is not below": (placed("below", (70, 45, 90, 65)), {}, False),
    "centers too close": (placed("right of", (4, 40, 24, 60)), {}, False),
    "just far enough": (placed("right of", (10, 40, 30, 60)), {}, True),
    "no target": (([dog(0.9)], placed("right of", RIGHT)[1]), {}, False),
    "the target has the wrong color": (
        ([cat(0.9), dog(0.9)],
         Request("position", (Clause("cat", 1, "red"), Clause("dog", 1, position=("right of", 0))))),
        {"cat": "blue"}, False),
    "of every target": (
        ([cat(0.9), cat(0.8, (80, 40, 100, 60)), dog(0.9, (40, 40, 60, 60))],
         Request("position", (TWO_CATS, Clause("dog", 1, position=("right of", 0))))), {}, False),
    "no place for the wrong color": (
        ([cat(0.9), dog(0.9)], Request("position", (A_CAT, Clause("dog", 1, "red", ("right of", 0))))),
        {"dog": "blue"}, False),
    "the same class twice": (
        ([cat(0.9), cat(0.8, RIGHT)], Request("two_object", (A_CAT, A_CAT))), {}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_verdicts_are_the_published_ones(case: str) -> None:
    (detections, request), colors, correct = CASES[case]
    kept = keep_detections(detections, request.task)
    named = [
        colors[clause.name].split(",")[: len(wanted_objects(kept, clause) or ())] if clause.color else None
        for clause in request.include
    ]
    verdict = judge(kept, request, named)
    assert verdict.correct is correct and bool(verdict.faults) is not correct


def test_at_most_sixteen_of_a_class_are_kept_the_best_first() -> None:
    many = [cat(0.5 + number / 100, (number, 0, number + 5, 5)) for number in range(20)]
    kept = keep_detections([*many, dog(0.2)], "single_object")
    assert [found.score for found in kept["cat"]] == sorted((found.score for found in many), reverse=True)[:16]
    assert "dog" not in kept
    assert len(keep_detections(many, "single_object", Thresholds(max_objects=3))["cat"]) == 3


def test_overlaps_are_dropped_only_below_one() -> None:
    same = [cat(0.9, LEFT), cat(0.8, LEFT), cat(0.7, RIGHT)]
    assert len(keep_detections(same, "single_object")["cat"]) == 3
    kept = keep_detections(same, "single_object", Thresholds(max_overlap=0.5))["cat"]
    assert [found.score for found in kept] == [0.9, 0.7]
    assert overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)  # as published: 9 is inside, so a box is 10 wide
    assert overlap((0, 0, 9, 9), (20, 20, 29, 29)) == 0.0 and overlap((5, 5, 3, 3), (5, 5, 3, 3)) == 0.0


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        ((40, 0, 50, 10), (0, 0, 10, 10), {"right of"}),
        ((40, 40, 50, 50), (0, 0, 10, 10), {"right of", "below"}),
        ((40, 25, 50, 35), (0, 0, 10, 10), {"right of"}),  # 23 of 47 px: under half
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),  # 2 px apart: 0.1 of both widths
        ((0, 0, 10, 10), (2.002, 0, 12.002, 10), set()),  # what is left over is under half of the offset
        ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),
    ],
)
def test_relations_of_boxes(box: tuple[float, ...], other: tuple[float, ...], expected: set[str]) -> None:
    assert relations(box, other) == expected  # type: ignore[arg-type]


def test_figures_are_those_of_the_published_summary() -> None:
    counts = TaskCounts()
    for task, prompt, correct in [
        ("colors", "a", True), ("colors", "a", False), ("counting", "b", False), ("counting", "b", False),
        ("single_object", "c", True), ("position", "d", True), ("two_object", "e", True), ("color_attr", "f", False),
    ]:  # fmt: skip
        counts.add(task, prompt, correct)
    figures = counts.figures()
    assert figures == pytest.approx(
        {
            "single_object": 1.0, "two_object": 1.0, "counting": 0.0, "colors": 0.5, "position": 1.0, "color_attr": 0.0,
            "score": 3.5 / 6, "correct_pictures": 4 / 8, "correct_prompts": 4 / 6,
        }
    )  # fmt: skip
    assert list(figures)[1:7] == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert TaskCounts().figures() == {}


PROMPTS: dict[str, dict[str, Any]] = {
    "a photo of an orange": {"tag": "single_object", "include": [{"class": "orange", "count": 1}]},
    "a photo of a hot dog and a dog": {
        "tag": "two_object", "include": [{"class": "hot dog", "count": 1}, {"class": "dog", "count": 1}]},
    "a photo of three buses": {
        "tag": "counting", "include": [{"class": "bus", "count": 3}], "exclude": [{"class": "bus", "count": 4}]},
    "a photo of an orange orange": {"tag": "colors", "include": [{"class": "orange", "count": 1, "color": "orange"}]},
    "a photo of a cup left of a tv remote": {
        "tag": "position",
        "include": [{"class": "tv remote", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}]},
    "a photo of a red cup and a green wine glass": {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "wine glass", "count": 1, "color": "green"}]},
}  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_read_as_its_metadata(prompt: str) -> None:
    assert PromptReader().read(prompt) == request_of(PROMPTS[prompt])


def test_all_published_prompts_are_read_as_their_metadata() -> None:
    published, reader = read_named("geneval"), PromptReader()
    assert published.metadata is not None
    requests = [request_of(json.loads(metadata)) for metadata in published.metadata]
    assert [reader.read(prompt) for prompt in published.prompts] == requests
    tasks = Counter(request.task for request in requests)
    assert tasks == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100
    }  # fmt: skip


def test_other_wordings_are_not_guessed() -> None:
    reader = PromptReader()
    for prompt in ("a cat", "a photo of a unicorn", "a photo of two cat", "a photo of a cat and a dog and a cup", ""):
        assert reader.read(prompt) is None
    assert len(NAMES) == 80 and len(COLORS) == 10


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tag": "counts"}, "none of single_object"),
        ({"include": [{"class": "cup", "count": 1, "position": ["left of", 0]}]}, "must come before"),
        ({"include": [{"class": "cup", "count": 1, "position": ["near", 0]}]}, "none of left of"),
    ],
)
def test_bad_metadata_is_told(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        request_of(PROMPTS["a photo of an orange"] | change)


def test_thresholds_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\{'counting': 9\} must be in"):
        replace(Thresholds(), counting=9)
    with pytest.raises(ValueError, match="max_objects=0"):
        replace(Thresholds(), max_objects=0)
