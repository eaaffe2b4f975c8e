"""Figures of captioners and selection, against a table small enough to do by hand."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.demo.figures import caption_figures
from pipelines.score.config import SelectionConfig
from pipelines.tables.schema import IMAGES, IMAGES_PATH, SCORES
from pipelines.tables.table import Table

RED, BLUE = (f"a large {color} solid star in the center of a white background" for color in ("red", "blue"))


def write(folder: Path, images: dict[str, str | None], scores: dict[str, list[tuple[str, str, float]]]) -> None:
    base = {
        "image_bytes": b"",
        "format": "PNG",
        "width": 64,
        "height": 64,
        "phash": "0" * 16,
        "caption": None,
        "source_uri": "x",
    }
    rows = [
        {"id": name, **base, "caption": None, "metadata": None if truth is None else json.dumps({"truth": truth})}
        for name, truth in images.items()
    ]
    Table(str(folder), IMAGES_PATH, IMAGES).write_shard("00000", pa.Table.from_pylist(rows, IMAGES))
    scored = [
        {
            "id": name,
            "captions": [dict(zip(("captioner", "caption", "clip_score"), caption, strict=True)) for caption in captions],
        }
        for name, captions in scores.items()
    ]
    Table(str(folder), "scores/clip", SCORES).write_shard("00000", pa.Table.from_pylist(scored, SCORES))


def test_figures_by_hand(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"x": RED, "y": BLUE, "z": RED},
        {
            "x": [("a", RED, 30.0), ("b", BLUE, 20.0)],
            "y": [("a", RED, 10.0), ("b", BLUE, 40.0)],
            "z": [("a", BLUE, 50.0)],  # b has none, and a is wrong
        },
    )
    figures = caption_figures(str(tmp_path), "clip", SelectionConfig(policy="best"))
    assert list(figures) == ["a", "b", "random choice", "CLIP selection"]
    assert figures["a"].mean_score == pytest.approx(30.0) and figures["a"].exact_share == pytest.approx(1 / 3)
    assert figures["a"].selected_share == pytest.approx(2 / 3) and figures["b"].selected_share == pytest.approx(1 / 3)
    assert figures["b"].exact_share == pytest.approx(0.5)
    assert figures["random choice"].exact_share == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert figures["CLIP selection"].exact_share == pytest.approx(2 / 3)
    assert figures["CLIP selection"].mean_score == pytest.approx((30 + 40 + 50) / 3)


def test_without_truth_there_is_no_exactness(tmp_path: Path) -> None:
    write(tmp_path, {"x": None}, {"x": [("a", "a cat", 25.0)]})
    figures = caption_figures(str(tmp_path), "clip", SelectionConfig(policy="best"))
    assert all(figure.exact_share is None for figure in figures.values())
    assert figures["a"].selected_share == 1.0
