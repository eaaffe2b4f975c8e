"""Pictures: the same for the same row, in the colors that their scene names."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.shapes.drawing import draw_row, write_folder
from pipelines.shapes.grammar import parse
from pipelines.shapes.scenes import BACKGROUNDS, COLORS, ShapesConfig, sample_scene


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


def test_write_folder_puts_the_truth_beside_the_image_but_not_as_its_caption(tmp_path: Path) -> None:
    write_folder(tmp_path, 5, 3)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000000005.png", "000000006.png", "000000007.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "000000006.png")), draw_row(6)[1])
    beside = json.loads((tmp_path / "000000006.json").read_text())
    assert set(beside) == {"truth"} and parse(beside["truth"]) == sample_scene(6)
