"""`python -m jobs.train --config jobs/configs/train.yaml`: latents and a pipeline -> a trained pipeline."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jobs.common.config import to_dict
from jobs.common.job import run_job
from jobs.common.training_job import TrainingJobConfig, track_training
from pipelines.evaluate.checkpoint_config import CheckpointMetricsConfig
from pipelines.tables.table import absolute_uri
from pipelines.train.config import TrainConfig

if TYPE_CHECKING:
    from pipelines.reports.runs import Section
    from pipelines.train.judging import Judging
    from pipelines.train.run import TrainResult


@dataclass(frozen=True, kw_only=True)
class TrainJob(TrainingJobConfig):
    """Configuration of a training job.

    Args:
        train: the training.
        validation: pictures of a small prompt set, judged beside the training; None: none. (The loss on held-out samples is
            `train.validation`.)
    """

    train: TrainConfig
    validation: CheckpointMetricsConfig | None = None


def run(job: TrainJob) -> "TrainResult":
    """Train in one MLflow run. Raises as `run_train` and `track_training`."""
    from pipelines.train.run import run_train

    train = partial(run_train, job.dataset_uri, job.train, judging=make_judging(job))
    return track_training(job, "train", train, partial(make_report, job))


def make_judging(job: TrainJob) -> "Judging | None":
    """How the training's checkpoints are judged."""
    if (config := job.validation) is None:
        return None
    from pipelines.evaluate.checkpoints import judge_checkpoint, with_absolute_references
    from pipelines.train.judging import Judging

    own = with_absolute_references(config, absolute_uri(job.dataset_uri))
    return Judging(
        judge=partial(judge_checkpoint, own, job.output_uri),
        every=config.every,
        resources=config.resources,
        best=config.best,
        wait_seconds=config.wait_seconds,
    )


def show_preflight(job: TrainJob) -> None:
    """Print what the training will take."""
    from pipelines.train.preflight.run import format_preflight, run_preflight

    print(format_preflight(run_preflight(job.dataset_uri, job.train, device_gib=job.device_gib)), flush=True)


def make_report(job: TrainJob, result: "TrainResult") -> str:
    """The training's page."""
    from pipelines.reports.runs import Section, training_report

    first, *others = job.train.sources(job.dataset_uri)
    facts = {"Steps": result.num_steps, "Samples/s": f"{result.samples_per_second:.1f}"}
    sections = []
    if others:
        rows = [(source.table.uri, source.manifest.num_rows, f"{source.weight:g}") for source in (first, *others)]
        text = "A weight is how often each sample of the table is drawn in an epoch. Rows above are the first table's."
        sections = [Section(title="Tables", text=text, columns=("table", "rows", "weight"), rows=rows)]
    if result.judgements:
        sections.append(judgements_section(result))
    return training_report(
        first.table.dataset_uri,
        first.table.path,
        result.losses,
        result.grids,
        facts=facts,
        config=to_dict(job.train),
        sections=sections,
    )


def judgements_section(result: "TrainResult") -> "Section":
    """The part of the page with the figures of the judged checkpoints, and what they cost."""
    from pipelines.reports.runs import Section

    names = list(dict.fromkeys(name for one in result.judgements for name in one.figures))
    rows = [
        (
            f"{one.step} (the best)" if result.best is not None and one.step == result.best.step else f"{one.step}",
            *(one.figures.get(name, "") for name in names),
            f"{one.seconds['total']:.1f}" if "total" in one.seconds else "",
            one.where,
            f"{one.held_seconds:.2f}",
            "; ".join(f"{name}: {problem}" for name, problem in one.problems.items()),
        )
        for one in result.judgements
    ]
    text = (
        "Pictures of the validation's prompts, drawn with the average weights of a checkpoint and judged beside the training."
    )
    columns = ("step", *names, "seconds", "where", "steps held, s", "problems")
    return Section(title="Judged checkpoints", text=text, columns=columns, rows=rows)


def look_first(job: TrainJob) -> bool:
    """Refuse prompts that are not there; show the preflight of a dry run. True if that was all."""
    if job.validation is not None:
        from pipelines.draw.prompts import read_prompt_set

        read_prompt_set(job.validation.prompts)
    if job.dry_run:
        show_preflight(job)
    return job.dry_run


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(TrainJob, run, argv, name="train", look_first=look_first)


if __name__ == "__main__":
    sys.exit(main())
