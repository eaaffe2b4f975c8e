"""Captions: what is written can be read back exactly, and nothing else is read."""

import pytest

from pipelines.shapes.grammar import parse, phrasings, short_phrasings, write_caption
from pipelines.shapes.scenes import Scene, Thing, sample_scene

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
