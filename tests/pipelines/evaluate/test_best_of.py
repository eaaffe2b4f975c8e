"""Choosing among candidates: the rules by hand, the published tournament, and settings that cannot be."""

import random

import pytest

from pipelines.evaluate.best_of.choose import choose, play
from pipelines.evaluate.best_of.config import JUDGES, BestOfConfig
from pipelines.evaluate.best_of.figures import chosen_ids, group_sizes
from pipelines.evaluate.registry import METRICS, metric_class
from pipelines.tables.schema import Row

RANKS = [(2.0,), (9.0,), None, (9.0,), (1.0,), (0.5,), (3.0,), None]


@pytest.mark.parametrize(
    ("keep", "choice", "kept"),
    [
        (1, "best", [1]),  # of equals the first
        (3, "best", [1, 3, 6]),
        (8, "best", [0, 1, 3, 4, 5, 6]),  # what was not judged is never kept
        (1, "tournament", [3]),  # of equals the second, as published
        (4, "tournament", [1, 3, 4, 6]),  # a winner of each pair, though 2.0 is better than 1.0
        (2, "tournament", [3, 6]),
    ],
)
def test_what_is_kept(keep: int, choice: str, kept: list[int]) -> None:
    assert choose(RANKS, keep, choice) == kept  # type: ignore[arg-type]


def test_a_tournament_keeps_the_best_of_each_run_of_neighbours_and_none_that_was_not_judged() -> None:
    draw = random.Random(0)
    for keep in (1, 2, 4):
        ranks = [(draw.random(),) for _ in range(16)]
        size = 16 // keep
        assert play(ranks, keep) == [max(range(at, at + size), key=lambda i: ranks[i]) for at in range(0, 16, size)]
    assert play([None, None, (1.0,), None], 2) == [2] and choose([None, None], 1, "best") == []


def test_the_candidates_of_each_prompt_are_taken_in_whole_groups() -> None:
    judged = {f"{number:06d}": (float(value),) for number, value in enumerate([1, 5, 2, 3, 0, 9, 8, 7, 6, 4, 11, 10])}
    del judged["000001"]
    config = BestOfConfig(name="x")
    assert group_sizes(6, 1) == [1, 2, 4, 6] and group_sizes(64, 4) == [1, 4, 8, 16, 32, 64]
    numbers = {size: [int(picture) for picture in chosen_ids(judged, 6, size, config)] for size in (1, 2, 4, 6)}
    assert numbers == {1: [0, *range(2, 12)], 2: [0, 3, 5, 6, 8, 10], 4: [3, 6], 6: [5, 10]}


@pytest.mark.parametrize("judge", JUDGES)
def test_every_judge_ranks_a_picture(judge: str) -> None:
    numbers = {"clip_score": 1.0, "dpg": 1.0, "image_reward": 1.0, "hps": 1.0, "pick_score": 1.0, "aesthetic": 1.0}
    caption = "a large red solid star in the center of a white background"
    good: Row = {**numbers, "yes": True, "log_prob": -0.1, "correct": True, "faults": [], "asked": caption, "seen": caption}
    bad: Row = dict.fromkeys(numbers, 0.5) | {
        "yes": False,
        "log_prob": -0.01,
        "correct": False,
        "faults": ["a"],
        "asked": caption,
        "seen": caption,
    }
    bad["seen"] = caption.replace("red", "blue")
    rank = metric_class(judge).rank
    assert rank(good) > rank(bad)


def test_metrics_of_sets_rank_no_picture_and_are_refused_as_judges() -> None:
    for name in set(METRICS) - set(JUDGES):
        assert metric_class(name).rank({}) == ()
        with pytest.raises(ValueError, match=f"judge: {name} judges no single picture: take one of clip_score"):
            BestOfConfig(name="x", judge=name)
        with pytest.raises(ValueError, match=f"metrics: {name} judges no single picture"):
            BestOfConfig(name="x", metrics=("shapes", name))
    with pytest.raises(ValueError, match="judge: clip is no metric"):
        BestOfConfig(name="x", judge="clip")
    for config, candidates, told in [
        (BestOfConfig(name="x", keep=4), 3, "keep=4 of sample.images_per_prompt=3: draw more"),
        (BestOfConfig(name="x"), 1, "at least 2"),
        (BestOfConfig(name="x", choice="tournament"), 12, "images_per_prompt=12: both must be powers of two"),
    ]:
        with pytest.raises(ValueError, match=told):
            config.check(candidates)
