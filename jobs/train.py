"""`python -m jobs.train --config jobs/configs/train.yaml`: latents and a pipeline -> a trained pipeline."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from jobs.common.config import to_dict
from jobs.common.job import JobConfig, run_job
from jobs.common.resources import telling_what_is_awaited
from jobs.common.status_line import StatusLine
from pipelines.evaluate.checkpoint_config import CheckpointMetricsConfig
from pipelines.storage.errors import StorageError
from pipelines.storage.files import write_file
from pipelines.tables.schema import TABLE_SCHEMAS, check_folder_name
from pipelines.tables.table import REJECTS_FOLDER, REPORT, absolute_uri
from pipelines.train.config import TrainConfig

if TYPE_CHECKING:
    from pipelines.reports.runs import Section
    from pipelines.train.desk import TrainProgress
    from pipelines.train.judging import Judging
    from pipelines.train.run import TrainResult


@dataclass(frozen=True, kw_only=True)
class TrainJob(JobConfig):
    """Configuration of a training job.

    Args:
        train: the training.
        validation: pictures of a small prompt set, judged beside the training; None: none. (The loss on held-out samples is
            `train.validation`.)
        name: name of the training's folder in the dataset, which holds its checkpoints, pictures and pipeline.
        dry_run: print what it will take (weights, memory, steps, the dataset against the batch), and start nothing.
        device_gib: memory of each GPU in GiB, for `dry_run` to compare with.
    """

    train: TrainConfig
    validation: CheckpointMetricsConfig | None = None
    name: str = "train"
    dry_run: bool = False
    device_gib: float = 80.0

    def __post_init__(self) -> None:
        check_folder_name("name", self.name)
        if self.name in (*TABLE_SCHEMAS, REJECTS_FOLDER):
            raise ValueError(f"name={self.name!r} is the folder of tables: give the training another")
        if self.on_stale != "refuse":
            raise ValueError(
                f"on_stale={self.on_stale!r}: a training is never deleted; give it another name, or delete its folder"
            )


def run(job: TrainJob) -> "TrainResult":
    """Train in one MLflow run, which a resumed training continues; the folder gets `report.html`.

    Raises as `run_train`, and StorageError if all is done but something could not be sent to MLflow.
    """
    from jobs.common.prometheus import TrainMetrics
    from pipelines.tracking.runs import RunRequest
    from pipelines.tracking.unsent import Entry, send_or_keep
    from pipelines.train.run import run_train

    output_uri = f"{absolute_uri(job.dataset_uri)}/{job.name}"
    run_request = RunRequest.make("train", to_dict(job), tracking=job.tracking, output_dir=job.dataset_uri, key=output_uri)
    line = StatusLine()
    metrics = TrainMetrics(job.dataset_uri)

    def show(progress: "TrainProgress") -> None:
        metrics.update(
            step=progress.step,
            num_steps=progress.num_steps,
            loss=progress.loss,
            samples_per_second=progress.samples_per_second,
            data_wait_share=progress.data_wait_share,
            checkpoint_time=progress.checkpoint_time,
        )
        line.show(describe_progress(job.name, progress))

    with telling_what_is_awaited(job, job.name, line.say):
        result = run_train(
            job.dataset_uri,
            job.train,
            output_dir=output_uri,
            run_request=run_request,
            lease=job.lease,
            judging=make_judging(job, output_uri),
            on_progress=show,
            on_notice=lambda notice: line.say(f"{job.name:<22} {notice}"),
        )
    if not result.was_done:
        html = make_report(job, result)
        write_file(f"{output_uri}/{REPORT}", html.encode())
        unsent = send_or_keep(run_request, output_uri, [Entry("html", [REPORT, html])], say=line.say)
        result = replace(result, unsent=unsent)
    line.clear()
    print(describe_result(job.name, result), flush=True)
    if result.unsent is not None:
        raise StorageError(f"the training is finished, but {result.unsent}; the same command sends them, once MLflow answers")
    return result


def make_judging(job: TrainJob, output_uri: str) -> "Judging | None":
    """How the training's checkpoints are judged."""
    from pipelines.evaluate.checkpoints import judge_checkpoint, with_absolute_references
    from pipelines.train.judging import Judging

    if (config := job.validation) is None:
        return None
    own = with_absolute_references(config, absolute_uri(job.dataset_uri))
    return Judging(
        judge=partial(judge_checkpoint, own, output_uri),
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


def describe_progress(name: str, progress: "TrainProgress") -> str:
    """The text of the status line while the training runs."""
    return (
        f"{name:<22} step {progress.step}/{progress.num_steps}  loss {progress.loss:.4f}  "
        f"{progress.samples_per_second:.1f} samples/s  {progress.data_wait_share:.1%} waiting for data  "
        f"{describe_time(progress.seconds_left)} left"
    )


def describe_time(seconds: float) -> str:
    """A duration for people: 2 h 05 min, 12 min, 30 s."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes > 9 else f"{seconds:.0f} s"


def describe_result(name: str, result: "TrainResult") -> str:
    """The line when the training has ended."""
    figures = f"{result.num_steps} steps, loss {result.loss_start:.3f} -> {result.loss_end:.3f}"
    if result.was_done:
        return f"{name:<22} {figures}: all there already, nothing to do"
    return f"{name:<22} {figures}, {result.seconds:.0f} s, {result.samples_per_second:.1f} samples/s"


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
