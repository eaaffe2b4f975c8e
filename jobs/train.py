"""`python -m jobs.train --config jobs/configs/train.yaml`: latents and a pipeline -> a trained pipeline."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from jobs.config import to_dict
from jobs.runner import JobConfig, StatusLine, run_job
from pipelines.report_run import training_report
from pipelines.tables import REPORT
from pipelines.tracking import TrackedRun, start_run
from pipelines.train import TrainResult, run_train
from pipelines.train_config import TrainConfig
from pipelines.train_progress import TrainProgress

RUN_ID = "mlflow_run_id"


@dataclass(frozen=True, kw_only=True)
class TrainJob(JobConfig):
    """Train the linear DiT on a latents table, by Ray Train and DeepSpeed.

    Args:
        train: on what, from where, and how.
        name: of the folder of the dataset that holds the training: its checkpoints, pictures and pipeline.
    """

    train: TrainConfig
    name: str = "train"

    def __post_init__(self) -> None:
        if self.on_stale != "refuse":
            raise ValueError(
                f"on_stale={self.on_stale!r}: a training is never deleted; give it another name, or delete its folder"
            )


def run(job: TrainJob) -> TrainResult:
    """Train in one MLflow run, which a training that goes on continues; the folder gets `report.html`."""
    folder = Path(job.dataset_uri, job.name)
    line = StatusLine()
    with ExitStack() as stack:

        def open_run() -> TrackedRun:
            run_id = (folder / RUN_ID).read_text() if (folder / RUN_ID).exists() else None
            tracked = start_run("train", to_dict(job), tracking=job.tracking, output_dir=job.dataset_uri, run_id=run_id)
            run = stack.enter_context(tracked)
            (folder / RUN_ID).write_text(run.run_id)
            opened.append(run)
            return run

        opened: list[TrackedRun] = []
        show = lambda progress: line.show(describe_progress(job.name, progress))  # noqa: E731
        result = run_train(job.dataset_uri, job.train, output_dir=str(folder), open_run=open_run, on_progress=show)
        for run in opened:
            log_result(job, run, result)
    line.clear()
    print(describe(job.name, result), flush=True)
    return result


def log_result(job: TrainJob, run: TrackedRun, result: TrainResult) -> None:
    run.log_metrics(
        {
            "loss_at_start": result.loss_start,
            "loss_at_end": result.loss_end,
            "startup_seconds": result.startup_seconds,
            "seconds": result.seconds,
        }
    )
    run.tag_tables(result.inputs)
    facts = {"Steps": result.num_steps, "Samples/s": f"{result.samples_per_second:.1f}"}
    html = training_report(
        job.dataset_uri, job.train.latents, result.losses, result.grids, facts=facts, config=to_dict(job.train)
    )
    Path(job.dataset_uri, job.name, REPORT).write_text(html)
    run.log_html(html, REPORT)


def describe_progress(name: str, progress: TrainProgress) -> str:
    return (
        f"{name:<22} step {progress.step}/{progress.num_steps}  loss {progress.loss:.4f}  "
        f"{progress.samples_per_second:.1f} samples/s  {progress.seconds_left:.0f} s left"
    )


def describe(name: str, result: TrainResult) -> str:
    """One line on what a training did."""
    figures = f"{result.num_steps} steps, loss {result.loss_start:.3f} -> {result.loss_end:.3f}"
    if result.was_done:
        return f"{name:<22} {figures}: all there already, nothing to do"
    return f"{name:<22} {figures}, {result.seconds:.0f} s, {result.samples_per_second:.1f} samples/s"


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(TrainJob, run, argv, prog="python -m jobs.train", description="Train the linear DiT on latents.")


if __name__ == "__main__":
    sys.exit(main())
