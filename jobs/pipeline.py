"""`python -m jobs.pipeline --config jobs/configs/pipeline.yaml`: every stage, from raw images to judged pictures."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from jobs import caption, evaluate, extract, ingest, sample, score, train
from jobs.common.job import JobConfig, run_job
from jobs.common.timings import Timings, print_section
from pipelines.caption.config import CaptionerConfig
from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.evaluate.checkpoint_config import CheckpointMetricsConfig
from pipelines.evaluate.config import ClipScoreConfig, EvaluateConfig, ShapesJudgeConfig
from pipelines.extract.config import ExtractConfig
from pipelines.ingest.config import IngestConfig
from pipelines.score.config import ScorerConfig
from pipelines.storage.errors import is_expected
from pipelines.tables.schema import LATENTS
from pipelines.tables.table import Table
from pipelines.train.config import TrainConfig

if TYPE_CHECKING:
    from pipelines.train.run import TrainResult

Stage = TypeVar("Stage", bound=JobConfig)


@dataclass(frozen=True, kw_only=True)
class TrainingStagesJob(JobConfig):
    """Configuration of the stages from raw images to a trained pipeline.

    Args:
        ingest: what to read, and what to refuse.
        captioners: the VLMs, one after another.
        scorer: the CLIP, and whose captions it scores. It judges the pictures too.
        extract: the autoencoder and the resolution.
        train: the training on the latents that `extract` makes.
    """

    ingest: IngestConfig
    captioners: list[CaptionerConfig]
    scorer: ScorerConfig
    extract: ExtractConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        names = [captioner.name for captioner in self.captioners]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"captioners={names}: {sorted(repeated)} name a table more than once")
        if self.train.data.clip not in (None, self.scorer.name):
            raise ValueError(f"train.data.clip={self.train.data.clip} is not scorer.name={self.scorer.name}")
        extracted = Table(self.dataset_uri, self.extract.path, LATENTS)
        own = [source for source in self.train.sources(self.dataset_uri) if source.table.dataset_uri == self.dataset_uri]
        competing = {captioner for source in own for captioner in source.captioners}
        if unscored := competing - set(self.scorer.captioners) if self.train.data.clip else set():
            raise ValueError(f"captioners {sorted(unscored)} compete in train, and scorer.captioners does not name them")
        if extracted.uri not in [source.table.uri for source in own]:
            raise ValueError(f"train.latents={self.train.latents} is not what extract makes, {self.extract.path}")


@dataclass(frozen=True, kw_only=True)
class StagesJob(TrainingStagesJob):
    """Configuration of every stage.

    Args:
        validation: see `TrainJob`.
        draw: how pictures are drawn.
    """

    validation: CheckpointMetricsConfig | None = None
    draw: DrawConfig = field(default_factory=DrawConfig)


@dataclass(frozen=True, kw_only=True)
class PipelineJob(StagesJob):
    """Configuration of all stages as one job.

    Args:
        prompts: what the trained pipeline draws at the end: a list, or a text file with one prompt on each line.
        name: name of the tables of these pictures and of their judgement.
    """

    prompts: list[str] | str
    name: str = "trained"


def run(job: PipelineJob) -> None:
    """Run all stages. Stops at the first that fails; a captioner that no later stage needs is reported at the end."""
    timings = Timings()
    failures = make_training_table(job, job.ingest, timings)
    trained = train_pipeline(job, timings)
    draw_and_judge(job, job.name, trained.pipeline, job.prompts, step=trained.num_steps, timings=timings)
    print_section(timings.section())
    print(f"\npipeline  {trained.pipeline}", flush=True)
    raise_first(failures)


def make_training_table(job: TrainingStagesJob, source: IngestConfig, timings: Timings) -> dict[str, Exception]:
    """Run the stages from raw images to latents. Returns the failures of captioners that `scorer` does not name."""
    timings.measure("ingest", lambda: ingest.run(stage_job(ingest.IngestJob, job, ingest=source)))
    failures = caption_all(job, timings)
    raise_first({name: error for name, error in failures.items() if name in job.scorer.captioners})
    selection = job.train.data.selection
    timings.measure("score", lambda: score.run(stage_job(score.ScoreJob, job, scorer=job.scorer, selection=selection)))
    timings.measure("extract", lambda: extract.run(stage_job(extract.ExtractJob, job, extract=job.extract)))
    return failures


def caption_all(job: TrainingStagesJob, timings: Timings) -> dict[str, Exception]:
    """Run every captioner, also after one has failed. Returns the failures by name."""
    from ray.exceptions import RayError

    failures: dict[str, Exception] = {}
    for captioner in job.captioners:
        stage = stage_job(caption.CaptionJob, job, captioner=captioner)
        try:
            timings.measure(f"caption {captioner.name}", partial(caption.run_captioner, stage))
        except Exception as error:
            if not is_expected(error) and not isinstance(error, RayError):
                raise
            failures[captioner.name] = error
            print(f"{f'caption {captioner.name}':<22} failed: {error}", file=sys.stderr, flush=True)
    return failures


def raise_first(failures: Mapping[str, Exception]) -> None:
    """Raise the first failure, if there is one: it decides the job's exit code."""
    for error in failures.values():
        raise error


def train_pipeline(job: StagesJob, timings: Timings) -> "TrainResult":
    """Run the train stage."""
    settings: dict[str, Any] = {"train": job.train, "validation": job.validation, "on_stale": "refuse"}
    return timings.measure("train", lambda: train.run(stage_job(train.TrainJob, job, **settings)))


def draw_and_judge(
    job: StagesJob,
    name: str,
    pipeline: str,
    prompts: list[str] | str,
    *,
    step: int,
    timings: Timings,
    metrics: tuple[str, ...] = ("clip_score",),
) -> None:
    """Run the sample and evaluate stages with one pipeline. The scorer's CLIP judges the pictures."""
    settings = SampleConfig(name=name, pipeline=pipeline, prompts=prompts, draw=job.draw)
    clip: dict[str, Any] = {own: getattr(job.scorer, own) for own in ("model", "revision", "resources")}
    judge = EvaluateConfig(name=name, metrics=metrics, clip_score=ClipScoreConfig(**clip), shapes=ShapesJudgeConfig(**clip))
    timings.measure(f"sample {name}", lambda: sample.run(stage_job(sample.SampleJob, job, sample=settings, step=step)))
    timings.measure(f"evaluate {name}", lambda: evaluate.run(stage_job(evaluate.EvaluateJob, job, evaluate=judge)))


def stage_job(job_class: Callable[..., Stage], job: TrainingStagesJob, **settings: object) -> Stage:
    """The job of one stage, on the same dataset, Ray and MLflow."""
    shared = {field.name: getattr(job, field.name) for field in fields(JobConfig)}
    return job_class(**shared | settings)


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(PipelineJob, run, argv, name="pipeline")


if __name__ == "__main__":
    sys.exit(main())
