"""Metrics: what every one of them promises, and the two that judge drawn scenes."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchmetrics.multimodal import CLIPScore
from transformers import AutoModel, AutoProcessor

from pipelines.evaluate.config import ClipScoreConfig, EvaluateConfig, ShapesJudgeConfig
from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.metric_config import MetricConfig
from pipelines.evaluate.registry import METRICS, metric_class
from pipelines.evaluate.run import MetricWorker
from pipelines.evaluate.shapes import attribute_accuracy
from pipelines.shapes.drawing import draw_row
from pipelines.shapes.grammar import parse, phrasings, write_caption
from pipelines.shapes.scenes import Scene, ShapesConfig
from pipelines.tables.errors import StaleTableError
from pipelines.tables.identity import Identity
from pipelines.tables.schema import EVALUATIONS, METRIC_COLUMNS, Row, evaluations_schema
from pipelines.tables.table import Table
from pipelines.workers.images import to_png
from pipelines.workers.models import pretrained
from tests.support.old_forms import write_old_manifest

LIGHT = """
import sys
from pipelines.evaluate.registry import METRICS, metric_class
for name in METRICS:
    metric_class(name)
heavy = sorted({"torch", "transformers", "torchvision", "scipy"} & set(sys.modules))
assert not heavy, heavy
"""


def drawn_rows(count: int) -> tuple[list[Row], list[Scene]]:
    """Rows of samples that show exactly what their prompts ask for, and the scenes."""
    rows, scenes = [], []
    for number in range(count):
        scene, pixels = draw_row(10_000_800 + number, ShapesConfig(pair_share=0.0))
        prompt = write_caption(scene, phrasings(scene)[0])
        rows.append({"id": f"{number}", "prompt": prompt, "seed": 0, "image_bytes": to_png(Image.fromarray(pixels))})
        scenes.append(scene)
    return rows, scenes


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_section_and_columns_and_is_called_as_its_table(name: str) -> None:
    config = EvaluateConfig(name="x", metrics=(name,)).chosen[name]
    assert isinstance(config, MetricConfig) and metric_class(name).name == name and METRIC_COLUMNS[name]
    assert metric_table("data", "x", name).schema == evaluations_schema(name) != EVALUATIONS


def test_all_metrics_import_in_this_environment_and_load_no_model_library() -> None:
    run = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_metrics_that_are_unknown_doubled_or_none_are_refused() -> None:
    for metrics, told in {
        ("fdi",): "no metric 'fdi'; there are clip_score",
        ("shapes",) * 2: "must differ",
        (): "names none",
    }.items():
        with pytest.raises(ValueError, match=told):
            EvaluateConfig(name="x", metrics=metrics)


def test_the_judge_reads_drawn_scenes_and_leaves_other_prompts_alone() -> None:
    rows, wanted = drawn_rows(30)
    rows.append({**rows[0], "id": "30", "prompt": "a photograph of a cat"})
    judged, _, _ = MetricWorker("shapes", ShapesJudgeConfig(batch_size=8)).process(pa.Table.from_pylist(rows))
    assert judged[30] == {"id": "30", "prompt": "a photograph of a cat", "asked": None, "seen": None}
    seen = [parse(row["seen"]) for row in judged[:30]]
    accuracy = attribute_accuracy(wanted, seen)  # type: ignore[arg-type]
    assert accuracy["all"] >= 0.85 and accuracy["color"] >= 0.9


def test_a_clip_score_depends_on_no_batch_and_a_picture_that_is_none_is_a_reject() -> None:
    rows, _ = drawn_rows(5)
    rows.insert(2, {**rows[0], "id": "broken", "image_bytes": rows[0]["image_bytes"][:80]})
    scores = []
    for batch_size in (1, 4):
        judged, rejects, _ = MetricWorker("clip_score", ClipScoreConfig(model="zoo://clip", batch_size=batch_size)).process(
            pa.Table.from_pylist(rows)
        )
        assert [row["id"] for row in judged] == list("01234") and [row["id"] for row in rejects] == ["broken"]
        scores.append([row["clip_score"] for row in judged])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


class PooledClip:
    """A transformers 5 CLIP as torchmetrics expects it: its features are tensors."""

    def __init__(self, model: Any):
        self.model, self.config = model, model.config

    def to(self, device: object) -> "PooledClip":
        return self

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


@torch.inference_mode()
def test_the_clip_score_is_that_of_torchmetrics() -> None:
    rows, _ = drawn_rows(6)
    ours = MetricWorker("clip_score", ClipScoreConfig(model="zoo://clip")).process(pa.Table.from_pylist(rows)).rows
    path, _ = pretrained("zoo://clip")
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    peer = CLIPScore(lambda: (PooledClip(AutoModel.from_pretrained(path)), processor))  # type: ignore[arg-type]
    images = [torch.from_numpy(np.asarray(Image.open(BytesIO(row["image_bytes"])))).permute(2, 0, 1) for row in rows]
    peer.update(images, [row["prompt"] for row in rows])
    assert np.mean([row["clip_score"] for row in ours]) == pytest.approx(peer.compute().item(), rel=1e-5)


def test_a_long_prompt_is_cut_or_scored_in_chunks() -> None:
    rows, _ = drawn_rows(1)
    long = {**rows[0], "id": "1", "prompt": f"{rows[0]['prompt']}, " + "on a black background " * 40}
    judged = {}
    for how in ("cut", "chunks"):
        worker = MetricWorker("clip_score", ClipScoreConfig(model="zoo://clip", long_captions=how))
        judged[how] = [row["clip_score"] for row in worker.process(pa.Table.from_pylist([rows[0], long])).rows]
    assert (
        judged["cut"][0] == pytest.approx(judged["chunks"][0], abs=1e-4) and abs(judged["cut"][1] - judged["chunks"][1]) > 0.1
    )


def test_figures_are_means_over_all_shards(tmp_path: Path) -> None:
    table = metric_table(str(tmp_path), "x", "clip_score")
    for shard, scores in {"00000": [30.0, 10.0, 20.0], "00001": [40.0], "00002": []}.items():
        rows = [{"id": f"{shard}-{score}", "prompt": "a cat", "clip_score": score} for score in scores]
        table.write_shard(shard, pa.Table.from_pylist(rows, table.schema))
    metric = metric_class("clip_score")
    assert metric.summarize(table, ClipScoreConfig()) == {"clip_score": 25.0}
    assert metric.summarize(metric_table(str(tmp_path), "none", "clip_score"), ClipScoreConfig()) == {}


def test_a_table_of_the_time_when_all_judgements_were_in_one_is_refused(tmp_path: Path) -> None:
    write_old_manifest(Table(str(tmp_path), "evaluations/x", EVALUATIONS), "evaluate", {"model": "zoo://clip"})
    told = r"evaluations/x is of form 1, .* let jobs.evaluate make it anew with --on_stale rebuild"
    with pytest.raises(StaleTableError, match=told):
        metric_table(str(tmp_path), "x", "clip_score").claim(Identity("evaluate", {}, {}, {}))
