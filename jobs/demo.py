"""`make demo`: the whole way once, from raw images to pictures drawn by a model trained on them, on this machine."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from jobs import caption, evaluate, extract, ingest, sample, score, train
from jobs.demo_report import Timings, print_summary, summarize_demo, write_demo_report
from jobs.runner import JobConfig, run_job
from pipelines.caption_config import CaptionerConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.extract_config import ExtractConfig
from pipelines.ingest import IngestConfig
from pipelines.sample import DrawConfig, SampleConfig
from pipelines.schema import SCORES, scores_path
from pipelines.score import ScorerConfig
from pipelines.select import choose_caption
from pipelines.shapes import NEW_COLORS, ShapesConfig, phrasings, sample_scene, write_caption, write_folder
from pipelines.tables import Table
from pipelines.train_config import TrainConfig

Stage = TypeVar("Stage", bound=JobConfig)
FIRST_SCENE = 30_000_000  # the demo draws its scenes where the shipped models never looked
FIRST_PROMPT = 40_000_000


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """The drawn scenes that stand in for photographs.

    Args:
        shapes: which scenes there are.
        num_images: how many are drawn.
        num_prompts: of the evaluation, before and after training; every other one asks for a color that is new to the model.
    """

    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    num_images: int = 1000
    num_prompts: int = 48


@dataclass(frozen=True, kw_only=True)
class DemoJob(JobConfig):
    """The configuration of every stage.

    Args:
        images: a folder of your own images (or tars, or Parquet); unless given, scenes of the Shapes world are drawn.
        world: the drawn scenes.
        ingest: its source is `images`, or the folder that the scenes are drawn into.
        captioners: the VLMs.
        scorer: the CLIP; all captioners compete.
        extract: the autoencoder and the resolution.
        train: how the shipped transformer goes on learning.
        draw: how pictures are drawn, before and after training.
    """

    images: str | None = None
    world: WorldConfig = field(default_factory=WorldConfig)
    ingest: IngestConfig
    captioners: list[CaptionerConfig]
    scorer: ScorerConfig
    extract: ExtractConfig
    train: TrainConfig
    draw: DrawConfig

    def __post_init__(self) -> None:
        if self.train.init is None:
            raise ValueError("train.init=None: the demo goes on from a pipeline, such as zoo://pipeline")


def run(job: DemoJob) -> None:
    """Every stage, then the closing table and the report."""
    timings = Timings()
    if job.images is None:
        timings.measure("draw scenes", lambda: draw_scenes(job))
    source = job.images or job.ingest.source
    timings.measure("ingest", lambda: ingest.run(_stage(ingest.IngestJob, job, ingest=replace(job.ingest, source=source))))
    for captioner in job.captioners:
        stage = _stage(caption.CaptionJob, job, captioner=captioner)
        timings.measure(f"caption {captioner.name}", partial(caption.run_captioner, stage))
    selection = job.train.data.selection
    timings.measure("score", lambda: score.run(_stage(score.ScoreJob, job, scorer=job.scorer, selection=selection)))
    timings.measure("extract", lambda: extract.run(_stage(extract.ExtractJob, job, extract=job.extract)))
    prompts = world_prompts(job.world) if job.images is None else photo_prompts(job)
    assert job.train.init is not None
    draw_and_judge(job, "before", job.train.init, prompts, step=0, timings=timings)
    trained = timings.measure("train", lambda: train.run(_stage(train.TrainJob, job, train=job.train, on_stale="refuse")))
    draw_and_judge(job, "after", trained.pipeline, prompts, step=trained.num_steps, timings=timings)
    summary = summarize_demo(job, trained, timings)
    report = write_demo_report(job, summary)
    print_summary(job, summary, report)


def _stage(job_class: Callable[..., Stage], job: DemoJob, **settings: object) -> Stage:
    """A stage's own job, on the demo's dataset and MLflow."""
    shared = {"ray": job.ray, "tracking": job.tracking, "lease": job.lease, "on_stale": job.on_stale}
    return job_class(dataset_uri=job.dataset_uri, **shared | settings)


def draw_scenes(job: DemoJob) -> None:
    world = job.world
    write_folder(job.ingest.source, FIRST_SCENE, world.num_images, world.shapes)
    print(f"{'draw scenes':<22} {world.num_images} images in {job.ingest.source}", flush=True)


def world_prompts(world: WorldConfig) -> list[str]:
    """One-object prompts: of the colors that are new to the model and of the others, by turns."""
    known = tuple(color for color in world.shapes.colors if color not in NEW_COLORS)
    prompts = []
    for number in range(world.num_prompts):
        colors = NEW_COLORS if number % 2 == 0 else known
        scene = sample_scene(FIRST_PROMPT + number, ShapesConfig(colors=colors, pair_share=0.0))
        prompts.append(write_caption(scene, phrasings(scene)[number // 2 % 2]))
    return prompts


def photo_prompts(job: DemoJob) -> list[str]:
    """The selected captions of the first images."""
    table = Table(job.dataset_uri, scores_path(job.scorer.name), SCORES)
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    chosen = [
        choose_caption(row["captions"], job.train.data.selection, seed=0, epoch=0, sample_id=row["id"])
        for row in rows[: job.world.num_prompts]
    ]
    return [caption["caption"] for caption in chosen if caption is not None]


def draw_and_judge(job: DemoJob, name: str, pipeline: str, prompts: list[str], *, step: int, timings: Timings) -> None:
    """The sample and evaluate stages with one pipeline."""
    settings = SampleConfig(name=name, pipeline=pipeline, prompts=prompts, draw=job.draw)
    judge = EvaluateConfig(name=name, clip=job.scorer.model, resources=job.scorer.resources)
    timings.measure(f"sample {name}", lambda: sample.run(_stage(sample.SampleJob, job, sample=settings, step=step)))
    timings.measure(f"evaluate {name}", lambda: evaluate.run(_stage(evaluate.EvaluateJob, job, evaluate=judge)))


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(DemoJob, run, argv, prog="python -m jobs.demo", description="From raw images to pictures, once.")


if __name__ == "__main__":
    sys.exit(main())
