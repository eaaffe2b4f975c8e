"""The evaluate stage: how well pictures show what their prompts ask for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipelines.clip import ClipModel
from pipelines.models import model_version, pinned
from pipelines.schema import EVALUATIONS, SAMPLES, evaluations_path, samples_path
from pipelines.shapes import Scene, all_singles, parse, phrasings, write_caption
from pipelines.stage import OnProgress, Resources, Row, ShardOutput, StageResult, run_shards
from pipelines.tables import Identity, Table

ATTRIBUTES = ("shape", "color", "background")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Whose pictures are judged, and by whom.

    Args:
        name: of the tables under samples/ and evaluations/.
        model: a transformers CLIP or SigLIP: a local folder, a hub id, or a zoo://, hf:// or fsspec URI.
        revision: of a hub id.
        batch_size: pictures in one call of the model; changes no value.
        device: "cpu", "cuda"; None: the first GPU that Ray gave the actor, or else the CPU.
        resources: of the stage's actors.
    """

    name: str
    model: str
    revision: str | None = None
    batch_size: int = 64
    device: str | None = None
    resources: Resources = field(default_factory=Resources)


def run_evaluate(dataset_uri: str, config: EvaluateConfig, *, on_progress: OnProgress = lambda _: None) -> StageResult:
    """Judge the pictures of `samples/<name>` into `evaluations/<name>`.

    Raises as `run_shards`, and MissingTableError if there are no such pictures.
    """
    config = pinned(config)
    samples = Table(dataset_uri, samples_path(config.name), SAMPLES)
    inputs = {samples.path: samples.require().fingerprint}
    models = {"clip": model_version(config.model, config.revision)}
    identity = Identity("evaluate", {"model": config.model}, models, inputs)
    return run_shards(
        Table(dataset_uri, evaluations_path(config.name), EVALUATIONS),
        identity,
        samples.list_shards(),
        read_shard=samples.read_shard,
        make_worker=partial(PictureJudge, config),
        resources=config.resources,
        max_reject_share=0.0,
        on_progress=on_progress,
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


class AttributeJudge:
    """Reads one-object pictures: of all scenes of the Shapes world, the one whose caption CLIP likes best."""

    def __init__(self, clip: ClipModel):
        self.clip = clip
        self.scenes = all_singles()
        captions = [write_caption(scene, phrasings(scene)[0]) for scene in self.scenes]
        spans = (slice(start, start + 512) for start in range(0, len(captions), 512))
        self.embeds = torch.cat([clip.embed_texts(captions[span]) for span in spans])

    def read(self, images: Sequence[Image.Image]) -> list[Scene]:
        """The scene that each RGB picture shows."""
        best = (self.clip.embed_images(images) @ self.embeds.T).argmax(1)
        return [self.scenes[index] for index in best.tolist()]


def attribute(scene: Scene, name: str) -> str | None:
    """shape, color, fill, size, position or background of a scene of one object."""
    return getattr(scene.things[0] if name in ("shape", "color", "fill") else scene, name)


def attribute_accuracy(asked: Sequence[Scene], seen: Sequence[Scene], names: Sequence[str] = ATTRIBUTES) -> dict[str, float]:
    """Share of pictures right in each attribute that was asked for, and in `all` of them together."""
    pairs = list(zip(asked, seen, strict=True))
    right = np.array([[attribute(a, name) in (None, attribute(s, name)) for name in names] for a, s in pairs])
    return {**dict(zip(names, right.mean(0).tolist(), strict=True)), "all": float(right.all(1).mean())}


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
