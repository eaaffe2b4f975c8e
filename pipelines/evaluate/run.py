"""The evaluate stage: how well pictures show what their prompts ask for."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.shapes import AttributeJudge, accuracy_figures, asks_for_color, asks_for_one_object
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import reject
from pipelines.tables.schema import EVALUATIONS, SAMPLES, Row, evaluations_path, samples_path
from pipelines.tables.table import Table
from pipelines.workers.models import find_model


def run_evaluate(
    dataset_uri: str, config: EvaluateConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Judge the pictures of `samples/<name>` and write the judgements to `evaluations/<name>`.

    Raises MissingTableError if there are no such pictures, and what `run_shards` raises.
    """
    samples = Table(dataset_uri, samples_path(config.name), SAMPLES)
    inputs = {samples.path: samples.require().fingerprint}
    model = find_model(config.model, config.revision)
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
        from pipelines.workers.clip import ClipModel

        self.config = config
        self.clip = ClipModel(config.model, revision=config.revision, device=config.device)
        self.attributes: AttributeJudge | None = None  # made when the first prompt needs it

    def process(self, table: pa.Table) -> ShardOutput:
        """Make one row of evaluations for each row of samples, or a reject where its score is not finite."""
        rows: list[Row] = []
        source = table.to_pylist()
        for start in range(0, len(source), self.config.batch_size):
            rows += self._judge(source[start : start + self.config.batch_size])
        refused = self.clip.not_finite("bad_score")
        rejects = [reject(row, refused) for row in rows if not math.isfinite(row["clip_score"])]
        return ShardOutput([row for row in rows if math.isfinite(row["clip_score"])], rejects)

    def _judge(self, batch: list[Row]) -> list[Row]:
        images = [Image.open(BytesIO(row["image_bytes"])).convert("RGB") for row in batch]
        prompts = [row["prompt"] for row in batch]
        scores = 100 * (self.clip.embed_images(images) * self.clip.embed_texts(prompts)).sum(-1)
        seen: list[str | None] = [None] * len(batch)
        if any(asks_for_one_object(prompt) for prompt in prompts):
            self.attributes = self.attributes or AttributeJudge(self.clip)
            seen = self.attributes.describe(prompts, images)
        return [
            {"id": row["id"], "prompt": prompt, "clip_score": score, "asked": prompt if caption else None, "seen": caption}
            for row, prompt, score, caption in zip(batch, prompts, scores.tolist(), seen, strict=True)
        ]


def summarize(table: Table, *, colors: Sequence[str] | None = None) -> dict[str, float]:
    """Figures over an evaluations table: the mean `clip_score`, and `accuracy_figures` if it has prompts of the Shapes world.

    Args:
        colors: if given, only prompts that ask for an object of one of these colors count; empty if there are none.
    """
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    if colors is not None:
        rows = [row for row in rows if asks_for_color(row, colors)]
    metrics = {"clip_score": float(np.mean([row["clip_score"] for row in rows]))} if rows else {}
    return metrics | accuracy_figures(rows)
