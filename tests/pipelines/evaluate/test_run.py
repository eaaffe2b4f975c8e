"""Judging: the judge reads drawn scenes; figures by color."""

from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.run import PictureJudge, summarize
from pipelines.evaluate.shapes import attribute_accuracy
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import parse, phrasings, write_caption
from pipelines.shapes.scenes import ShapesConfig
from pipelines.tables.schema import EVALUATIONS
from pipelines.tables.table import Table
from pipelines.workers.images import to_png


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
