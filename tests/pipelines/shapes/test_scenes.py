"""Scenes: which ones are drawn, and the wrong scenes beside a right one."""

import numpy as np
import pytest

from pipelines.shapes.grammar import parse, phrasings, write_caption
from pipelines.shapes.scenes import KNOWN_COLORS, ShapesConfig, hard_negatives, sample_scene


def test_hard_negatives_are_different_wrong_scenes_of_the_same_kind() -> None:
    rng = np.random.default_rng(0)
    for index in range(200):
        scene = sample_scene(index)
        rivals = hard_negatives(scene, rng, 9)
        assert len({*rivals, scene}) == 10
        for rival in rivals:
            assert len(rival.things) == len(scene.things)
            assert all(parse(write_caption(rival, phrasing)) == rival for phrasing in phrasings(rival))


def test_hard_negatives_leave_out_what_the_caption_leaves_out() -> None:
    told = parse("a red circle")
    assert told is not None
    rivals = hard_negatives(told, np.random.default_rng(0), 9)
    assert all(rival.size is None and rival.background is None and rival.things[0].fill is None for rival in rivals)
    with pytest.raises(ValueError, match="count=50: only 10 scenes"):
        hard_negatives(told, np.random.default_rng(0), 50)


def test_colors_can_be_held_back() -> None:
    config = ShapesConfig(colors=KNOWN_COLORS)
    seen = {thing.color for index in range(300) for thing in sample_scene(index, config).things}
    assert seen == set(KNOWN_COLORS)
    with pytest.raises(ValueError, match="mauve"):
        ShapesConfig(colors=("red", "mauve"))
