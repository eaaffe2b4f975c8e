"""Drawing and judging: pictures depend on their seed alone; the judge reads drawn scenes; figures by hand."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.draw.sample import Sampler, read_prompts
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import PictureJudge, summarize
from pipelines.evaluate.shapes import attribute_accuracy
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import parse, phrasings, write_caption
from pipelines.shapes.scenes import Scene, ShapesConfig, Thing
from pipelines.tables.schema import EVALUATIONS
from pipelines.tables.table import Table
from pipelines.workers.images import image_grid, to_png

DRAW = DrawConfig(num_steps=4, guidance_scale=2.5, batch_size=4, dtype="float32")
CONFIG = SampleConfig(name="test", pipeline="zoo://pipeline", prompts=["a red circle"], draw=DRAW)


def prompts_table(prompts: list[str], seeds: list[int]) -> pa.Table:
    return pa.table({"id": [f"{number:06d}" for number in range(len(prompts))], "prompt": prompts, "seed": seeds})


def test_a_picture_depends_on_its_prompt_and_seed_and_not_on_its_batch() -> None:
    prompts = ["a red circle", "a blue square", "a green star", "a red circle", "a red circle"]
    together, _, _ = Sampler(CONFIG).process(prompts_table(prompts, [1, 2, 3, 1, 4]))
    alone = Sampler(replace(CONFIG, draw=replace(DRAW, batch_size=1))).process(prompts_table(prompts[:1], [1]))[0]

    def difference(first: bytes, second: bytes) -> int:
        a, b = (np.asarray(Image.open(BytesIO(content))).astype(int) for content in (first, second))
        return int(abs(a - b).max())

    pictures = [row["image_bytes"] for row in together]
    assert difference(pictures[0], alone[0]["image_bytes"]) <= 1
    assert difference(pictures[0], pictures[3]) <= 1
    assert difference(pictures[0], pictures[4]) > 20


def test_the_judge_reads_drawn_scenes_and_leaves_other_prompts_alone() -> None:
    rows, wanted = [], []
    for number in range(30):
        scene, pixels = draw_row(10_000_800 + number, ShapesConfig(pair_share=0.0))
        prompt = write_caption(scene, phrasings(scene)[0])
        rows.append({"id": f"{number}", "prompt": prompt, "seed": 0, "image_bytes": to_png(Image.fromarray(pixels))})
        wanted.append(scene)
    rows.append({**rows[0], "id": "30", "prompt": "a photograph of a cat"})
    judged, _, _ = PictureJudge(EvaluateConfig(name="test", model="zoo://clip", batch_size=8)).process(
        pa.Table.from_pylist(rows)
    )
    assert judged[30]["asked"] is None and judged[30]["seen"] is None
    seen = [parse(row["seen"]) for row in judged[:30]]
    accuracy = attribute_accuracy(wanted, seen)  # type: ignore[arg-type]
    assert accuracy["all"] >= 0.85 and accuracy["color"] >= 0.9


def test_accuracy_by_hand() -> None:
    def scene(shape: str, color: str, background: str | None) -> Scene:
        return Scene((Thing(shape, color, "solid"),), background, "large", "in the center")

    asked = [scene("star", "red", "white"), scene("star", "blue", None)]
    seen = [scene("star", "red", "black"), scene("circle", "blue", "gray")]
    assert attribute_accuracy(asked, seen) == {"shape": 0.5, "color": 1.0, "background": 0.5, "all": 0.0}


def test_summary_by_color(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "evaluations/x", EVALUATIONS)
    red, cyan = (f"a large {color} solid star in the center of a white background" for color in ("red", "cyan"))
    rows = [
        {"id": "0", "prompt": red, "clip_score": 30.0, "asked": red, "seen": red},
        {"id": "1", "prompt": cyan, "clip_score": 10.0, "asked": cyan, "seen": red},
        {"id": "2", "prompt": "a cat", "clip_score": 20.0, "asked": None, "seen": None},
    ]
    table.write_shard("00000", pa.Table.from_pylist(rows, EVALUATIONS))
    whole = summarize(table)
    assert whole["clip_score"] == pytest.approx(20.0) and whole["accuracy.color"] == 0.5 and whole["accuracy.shape"] == 1.0
    assert summarize(table, colors=["cyan"]) == {
        "clip_score": 10.0, "accuracy.shape": 1.0, "accuracy.color": 0.0, "accuracy.background": 1.0, "accuracy.all": 0.0
    }  # fmt: skip
    assert summarize(table, colors=["green"]) == {}


def test_prompts_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\n\n  a blue star  \n")
    assert read_prompts(str(path)) == ["a red circle", "a blue star"]
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(["", " "])
    with pytest.raises(FileNotFoundError):
        read_prompts(str(tmp_path / "absent.txt"))


def test_a_grid_holds_every_picture() -> None:
    images = [Image.new("RGB", (10, 8), color) for color in ("red", "green", "blue")]
    grid = image_grid(images, columns=2)
    assert grid.size == (22, 18)
    assert [grid.getpixel(place) for place in ((0, 0), (12, 0), (0, 10))] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    with pytest.raises(ValueError, match="empty"):
        image_grid([])
