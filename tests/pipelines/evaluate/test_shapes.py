"""The share of attributes that were drawn right, by hand."""

from pathlib import Path

import pyarrow as pa

from pipelines.evaluate.config import ShapesJudgeConfig
from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.shapes import ShapesJudge, accuracy_figures, asks_for_color, attribute_accuracy, read_judgements
from pipelines.shapes.scenes import Scene, Thing


def test_accuracy_by_hand() -> None:
    def scene(shape: str, color: str, background: str | None) -> Scene:
        return Scene((Thing(shape, color, "solid"),), background, "large", "in the center")

    asked = [scene("star", "red", "white"), scene("star", "blue", None)]
    seen = [scene("star", "red", "black"), scene("circle", "blue", "gray")]
    assert attribute_accuracy(asked, seen) == {"shape": 0.5, "color": 1.0, "background": 0.5, "all": 0.0}


def test_figures_by_color(tmp_path: Path) -> None:
    table = metric_table(str(tmp_path), "x", "shapes")
    red, cyan = (f"a large {color} solid star in the center of a white background" for color in ("red", "cyan"))
    rows = [
        {"id": "0", "prompt": red, "asked": red, "seen": red},
        {"id": "1", "prompt": cyan, "asked": cyan, "seen": red},
        {"id": "2", "prompt": "a cat", "asked": None, "seen": None},
    ]
    table.write_shard("00000", pa.Table.from_pylist(rows, table.schema))
    whole = ShapesJudge.summarize(table, ShapesJudgeConfig())
    assert whole["accuracy.color"] == 0.5 and whole["accuracy.shape"] == 1.0
    judged = read_judgements(table)
    assert accuracy_figures([row for row in judged if asks_for_color(row["asked"], ["cyan"])]) == {
        "accuracy.shape": 1.0, "accuracy.color": 0.0, "accuracy.background": 1.0, "accuracy.all": 0.0
    }  # fmt: skip
    assert accuracy_figures([row for row in judged if asks_for_color(row["asked"], ["green"])]) == {}
