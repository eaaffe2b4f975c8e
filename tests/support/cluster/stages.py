"""The stages as Ray jobs: the command that is submitted for each, and what each makes."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from pipelines.storage.files import list_folder
from pipelines.tables.schema import (
    CAPTIONS,
    IMAGES,
    IMAGES_PATH,
    LATENTS,
    SAMPLES,
    SCORES,
    captions_path,
    evaluations_path,
    evaluations_schema,
    image_embeds_path,
    image_embeds_schema,
    latents_path,
    samples_path,
    scores_path,
)
from pipelines.tables.table import Table

RAW = "s3://bucket/raw"
NUM_IMAGES, ROWS_PER_SHARD = 384, 16
NUM_SHARDS = math.ceil((NUM_IMAGES + 1) / ROWS_PER_SHARD)  # and a file that is no image
NUM_STEPS, CHECKPOINT_EVERY = 150, 25
CAPTIONERS = {"llava": "zoo://captioner-a", "llava-next": "zoo://captioner-b"}
LATENTS_PATH = latents_path("dc-ae-tiny", 64)
PROMPTS = ["a large red solid circle in the center of a black background", "a blue solid square on a white background"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One job of the chain, or the part of a job that makes one table.

    Args:
        name: of its MLflow run.
        job: the command under `jobs`; the first word of the name unless given.
        settings: of the job, by dotted name.
        path, schema: of the table that it makes; without them it is the training.
        process: in the names of the processes that do its work.
        parts_before_fault: shards, or steps, that are there before a fault comes.
    """

    name: str
    settings: Mapping[str, object]
    path: str = ""
    schema: pa.Schema | None = None
    job: str = ""
    process: str = "ray::MapWorker"
    parts_before_fault: int = 3

    def command(self, dataset_uri: str, experiment: str) -> list[str]:
        values = {"dataset_uri": dataset_uri, "tracking.experiment": experiment, **self.settings}
        return [
            "python",
            "-m",
            f"jobs.{self.job or self.name.split()[0]}",
            *(f"--{name}={value}" for name, value in values.items()),
        ]

    def table(self, dataset_uri: str) -> Table:
        assert self.schema is not None
        return Table(dataset_uri, self.path, self.schema)

    def count_done(self, dataset_uri: str) -> int:
        """Count the shards that are written, or the training's logged steps."""
        if self.schema is None:
            return max((int(name.split("-")[2]) for name in list_folder(self.parts_uri(dataset_uri))), default=0)
        return len(self.table(dataset_uri).list_shards())

    def parts_uri(self, dataset_uri: str) -> str:
        """The folder that they are written to."""
        return f"{dataset_uri}/{self.path or 'train/drawn'}"

    @property
    def num_parts(self) -> int:
        return NUM_STEPS if self.schema is None else NUM_SHARDS


def _actors(part: str, resource: str) -> dict[str, object]:
    """Resources for two actors on two hosts: no host has more than one of the custom resource."""
    return {f"{part}.resources.num_actors": 2, f"{part}.resources.custom": json.dumps({resource: 1})}


def _caption(name: str, model: str) -> Stage:
    settings = {
        "captioner.name": name,
        "captioner.model": model,
        "captioner.dtype": "float32",
        "captioner.batch_size": ROWS_PER_SHARD,
        "captioner.sampling.max_new_tokens": 48,
        **_actors("captioner", "captioning"),
    }
    return Stage(name=f"caption {name}", settings=settings, path=captions_path(name), schema=CAPTIONS)


def _score(captioner: str) -> Stage:
    settings = {
        "scorer.name": "clip",
        "scorer.model": "zoo://clip",
        "scorer.captioners": json.dumps([captioner]),
        **_actors("scorer", "encoding"),
    }
    return Stage(name=f"score {captioner}", settings=settings, path=scores_path("clip", captioner), schema=SCORES)


INGEST = Stage(
    name="ingest",
    settings={"ingest.source": RAW, "ingest.rows_per_shard": ROWS_PER_SHARD, **_actors("ingest", "encoding")},
    path=IMAGES_PATH,
    schema=IMAGES,
)
CAPTION, CAPTION_NEXT = (_caption(name, model) for name, model in CAPTIONERS.items())
EMBED = Stage(
    name="embed images clip",
    job="embed_images",
    settings={"clip.name": "clip", "clip.model": "zoo://clip", **_actors("clip", "encoding")},
    path=image_embeds_path("clip"),
    schema=image_embeds_schema(-1),
)
SCORE, SCORE_NEXT = (_score(name) for name in CAPTIONERS)
EXTRACT = Stage(
    name="extract",
    settings={
        "extract.name": "dc-ae-tiny",
        "extract.autoencoder": "zoo://pipeline/autoencoder",
        "extract.resolution": 64,
        **_actors("extract", "encoding"),
    },
    path=LATENTS_PATH,
    schema=LATENTS,
)
TRAIN = Stage(
    name="train",
    settings={
        "train.latents": LATENTS_PATH,
        "train.data.captioners": json.dumps(list(CAPTIONERS)),
        "train.data.clip": "clip",
        "train.init": "zoo://pipeline",
        "train.num_steps": NUM_STEPS,
        "train.micro_batch_size": 4,
        "train.global_batch_size": 8,
        "train.num_workers": 2,
        "train.resources.custom": '{"training": 1}',
        "train.engine.zero_stage": 2,
        "train.engine.dtype": "fp32",
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.log_every": 1,
        "train.record_samples": "true",
        "train.max_failures": 20,
    },
    process="ray::RayTrainWo",
    parts_before_fault=CHECKPOINT_EVERY + 5,
)
DATA_STAGES = [INGEST, CAPTION, CAPTION_NEXT, EMBED, SCORE, SCORE_NEXT, EXTRACT]


def last_stages(dataset_uri: str) -> list[Stage]:
    """Return the stages that draw with the trained pipeline and judge the pictures."""
    sample = {
        "sample.name": "trained",
        "sample.pipeline": f"{dataset_uri}/train/pipeline",
        "sample.prompts": json.dumps(PROMPTS),
        "sample.draw.num_steps": 4,
    }
    evaluate = {"evaluate.name": "trained", "evaluate.clip_score.model": "zoo://clip"}
    path, schema = evaluations_path("trained", "clip_score"), evaluations_schema("clip_score")
    return [
        Stage(name="sample trained", settings=sample, path=samples_path("trained"), schema=SAMPLES),
        Stage(name="evaluate trained", settings=evaluate, path=path, schema=schema),
    ]
