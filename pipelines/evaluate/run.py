"""The evaluate stage: how well pictures show what their prompts ask for."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.shapes import AttributeJudge, attribute_accuracy
from pipelines.shapes.grammar import parse, phrasings, write_caption
from pipelines.shapes.scenes import Scene
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import EVALUATIONS, SAMPLES, Row, evaluations_path, samples_path
from pipelines.tables.table import Table
from pipelines.workers.clip import ClipModel
from pipelines.workers.models import find_model


def run_evaluate(
    dataset_uri: str, config: EvaluateConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Judge the pictures of `samples/<name>` into `evaluations/<name>`.

    Raises as `run_shards`, and MissingTableError if there are no such pictures.
    """
    model = find_model(config.model, config.revision)
    samples = Table(dataset_uri, samples_path(config.name), SAMPLES)
    inputs = {samples.path: samples.require().fingerprint}
    identity = Identity("evaluate", value_settings(config), {"clip": model.version}, inputs)
    return run_shards(
        Table(dataset_uri, evaluations_path(config.name), EVALUATIONS),
        identity,
        samples.list_shards(),
        read_shard=samples.read_shard,
        make_worker=partial(PictureJudge, replace(config, model=model.path, revision=model.revision)),
        resources=config.resources,
        max_reject_share=0.0,
        on_progress=on_progress,
        leases=leases,
    )


class PictureJudge:
    """Ray Data actor: pictures with their prompts -> CLIP scores, and what they show if the prompt is of the Shapes world."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.clip = ClipModel(config.model, revision=config.revision, device=config.device)
        self.attributes: AttributeJudge | None = None

    def process(self, table: pa.Table) -> ShardOutput:
        """A row of evaluations for each picture; no rejects."""
        rows: list[Row] = []
        source = table.to_pylist()
        for start in range(0, len(source), self.config.batch_size):
            rows += self._judge(source[start : start + self.config.batch_size])
        return ShardOutput(rows, [])

    def _judge(self, batch: list[Row]) -> list[Row]:
        images = [Image.open(BytesIO(row["image_bytes"])).convert("RGB") for row in batch]
        prompts = [row["prompt"] for row in batch]
        scores = 100 * (self.clip.embed_images(images) * self.clip.embed_texts(prompts)).sum(-1)
        asked = [scene if (scene := parse(prompt)) and len(scene.things) == 1 else None for prompt in prompts]
        seen: list[Scene] = []
        if any(asked):
            self.attributes = self.attributes or AttributeJudge(self.clip)
            seen = self.attributes.read(images)
        return [
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "clip_score": score,
                "asked": row["prompt"] if wanted else None,
                "seen": write_caption(seen[index], phrasings(seen[index])[0]) if wanted else None,
            }
            for index, (row, score, wanted) in enumerate(zip(batch, scores.tolist(), asked, strict=True))
        ]


def summarize(table: Table, *, colors: Sequence[str] | None = None) -> dict[str, float]:
    """Mean CLIP score of an evaluations table; and `accuracy.<attribute>` over its prompts from the Shapes world, if any.

    `colors` leaves only the prompts that ask for an object of such a color.
    """
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    asked, seen, scores = [], [], []
    for row in rows:
        scene = parse(row["asked"]) if row["asked"] else None
        if colors is not None and (scene is None or scene.things[0].color not in colors):
            continue
        scores.append(row["clip_score"])
        if scene is not None and (found := parse(row["seen"])) is not None:
            asked.append(scene)
            seen.append(found)
    metrics = {"clip_score": float(np.mean(scores))} if scores else {}
    if asked:
        metrics |= {f"accuracy.{name}": value for name, value in attribute_accuracy(asked, seen).items()}
    return metrics
