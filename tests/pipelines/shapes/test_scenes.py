"""The Shapes world: pictures and captions agree, and captions can be read back exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.shapes.drawing import draw_row, write_folder
from pipelines.shapes.grammar import parse, phrasings, short_phrasings, write_caption
from pipelines.shapes.scenes import BACKGROUNDS, COLORS, KNOWN_COLORS, Scene, ShapesConfig, Thing, hard_negatives, sample_scene

RED_CIRCLE = Scene((Thing("circle", "red", "solid"),), "white", "large", "in the center")


@pytest.mark.parametrize("converse", [False, True])
def test_every_complete_caption_is_read_back_exactly(converse: bool) -> None:
    for index in range(500):
        scene = sample_scene(index)
        for phrasing in phrasings(scene):
            caption = write_caption(scene, phrasing, converse=converse)
            assert parse(caption) == scene, caption
            assert parse(caption.upper().replace(" ", "  ") + ".") == scene


def test_a_short_caption_tells_a_part_and_nothing_else() -> None:
    for index in range(100):
        scene = sample_scene(index)
        for phrasing in short_phrasings(scene):
            told = parse(write_caption(scene, phrasing))
            assert told is not None
            assert [(thing.shape, thing.color) for thing in told.things] == [(t.shape, t.color) for t in scene.things]
            assert told.size is None and told.position is None
            assert told.background in (None, scene.background)


def test_captions_of_known_wording() -> None:
    caption = write_caption(RED_CIRCLE, phrasings(RED_CIRCLE)[0])
    assert caption == "a large red solid circle in the center of a white background"
    orange = Scene((Thing("star", "orange", "outlined"),), "black", "small", "at the top")
    assert "in orange" in write_caption(orange, phrasings(orange)[2])
    assert write_caption(orange, "a {color} {shape}") == "an orange star"
    pair = parse("a red solid circle right of a blue striped star on a gray background")
    assert pair == Scene((Thing("star", "blue", "striped"), Thing("circle", "red", "solid")), "gray", relation="left of")


@pytest.mark.parametrize("text", ["", "a cat", "a red circle and more", "a large red circle", "a red solid circl"])
def test_what_is_not_in_the_grammar_is_not_read(text: str) -> None:
    assert parse(text) is None


def test_a_row_is_the_same_image_every_time_and_rows_differ() -> None:
    config = ShapesConfig()
    scene, image = draw_row(17, config)
    again, same = draw_row(17, config)
    assert scene == again == sample_scene(17, config)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    assert np.array_equal(image, same)
    assert not np.array_equal(image, draw_row(18, config)[1])
    assert not np.array_equal(image, draw_row(17, ShapesConfig(seed=1))[1])
    digest = {row: int(draw_row(row, config)[1].astype(np.int64).sum()) for row in (0, 1, 2)}
    assert digest == {0: 910300, 1: 159062, 2: 755854}  # changing the drawing changes what the shipped models know


def test_pictures_show_the_colors_that_captions_name() -> None:
    for index in range(60):
        scene, image = draw_row(index, ShapesConfig(pair_share=0.0))
        assert scene.background is not None
        corner = image[0, 0].astype(int)
        nearest = min(BACKGROUNDS, key=lambda name: int(np.abs(corner - BACKGROUNDS[name]).sum()))
        assert nearest == scene.background
        distance = np.abs(image.astype(int) - COLORS[scene.things[0].color]).max(axis=-1)
        assert (distance < 12).sum() > 30


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


def test_write_folder_puts_the_truth_beside_the_image_but_not_as_its_caption(tmp_path: Path) -> None:
    write_folder(tmp_path, 5, 3)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000000005.png", "000000006.png", "000000007.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "000000006.png")), draw_row(6)[1])
    beside = json.loads((tmp_path / "000000006.json").read_text())
    assert set(beside) == {"truth"} and parse(beside["truth"]) == sample_scene(6)
