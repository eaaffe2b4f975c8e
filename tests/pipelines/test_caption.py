"""The caption stage's actor, on the shipped captioners."""

from dataclasses import replace
from io import BytesIO

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.caption import Captioner, CaptionerConfig, SamplingConfig
from pipelines.shapes import ShapesConfig, draw_row, parse

CONFIG = CaptionerConfig(
    name="a", model="zoo://captioner-a", dtype="float32", batch_size=4, sampling=SamplingConfig(max_new_tokens=48)
)
FIRST = 10_000_500


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def images_table(contents: list[bytes]) -> pa.Table:
    rows = [
        {"id": f"id{number}", "image_bytes": content, "source_uri": f"photos/{number}.png"}
        for number, content in enumerate(contents)
    ]
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def scenes() -> pa.Table:
    return images_table([png(Image.fromarray(draw_row(FIRST + number)[1])) for number in range(10)])


@pytest.mark.parametrize("model", ["zoo://captioner-a", "zoo://captioner-b"])
def test_captions_are_of_the_grammar_and_most_attributes_are_right(scenes: pa.Table, model: str) -> None:
    rows, rejects, _ = Captioner(replace(CONFIG, model=model)).process(scenes)
    assert rejects == [] and [row["id"] for row in rows] == [f"id{number}" for number in range(10)]
    backgrounds = 0
    for number, row in enumerate(rows):
        assert row["finish_reason"] == "stop" and 8 < row["num_tokens"] < 48
        told = parse(row["caption"])
        backgrounds += told is not None and told.background == draw_row(FIRST + number, ShapesConfig())[0].background
    assert backgrounds >= 8


def test_a_bad_image_costs_its_row_and_no_other(scenes: pa.Table) -> None:
    captioner = Captioner(CONFIG)
    contents = scenes["image_bytes"].to_pylist()
    rows, rejects, _ = captioner.process(images_table([*contents[:3], b"no image at all", *contents[3:]]))
    assert [row["id"] for row in rows] == [f"id{number}" for number in range(11) if number != 3]
    assert [(row["id"], row["source_uri"], row["reject_reason"]) for row in rejects] == [
        ("id3", "photos/3.png", "not_an_image")
    ]
    alone, _, _ = captioner.process(scenes)
    assert [row["caption"] for row in rows] == [row["caption"] for row in alone]


def test_the_batch_changes_no_caption(scenes: pa.Table) -> None:
    together, _, _ = Captioner(replace(CONFIG, batch_size=10)).process(scenes)
    assert together == Captioner(replace(CONFIG, batch_size=1)).process(scenes)[0]


def test_a_caption_that_is_cut_says_so(scenes: pa.Table) -> None:
    rows, _, _ = Captioner(replace(CONFIG, sampling=SamplingConfig(max_new_tokens=3))).process(scenes.slice(0, 2))
    assert [(row["finish_reason"], row["num_tokens"]) for row in rows] == [("length", 3)] * 2


def test_images_of_any_size_are_taken(scenes: pa.Table) -> None:
    contents = [png(Image.new("RGB", size, "red")) for size in ((1, 1), (2000, 10), (640, 480))]
    rows, rejects, _ = Captioner(CONFIG).process(images_table(contents))
    assert len(rows) + len(rejects) == 3 and len(rows) >= 2


def test_sampling_draws_the_same_again(scenes: pa.Table) -> None:
    config = replace(CONFIG, sampling=SamplingConfig(temperature=1.5, max_new_tokens=48, seed=3))
    first, again = (Captioner(config).process(scenes)[0] for _ in range(2))
    assert first == again
    assert first != Captioner(CONFIG).process(scenes)[0]


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="prompt='  ' is empty"):
        replace(CONFIG, prompt="  ")
    with pytest.raises(ValueError, match="captioner name 'a/b'"):
        replace(CONFIG, name="a/b")
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        SamplingConfig(temperature=-1)
