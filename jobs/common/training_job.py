"""Running a training as a job: its folder, one MLflow run that a resumed training continues, progress in one line, a report."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jobs.common.config import to_dict
from jobs.common.job import JobConfig
from jobs.common.ray import raise_if_stopped
from jobs.common.resources import telling_what_is_awaited
from jobs.common.status_line import StatusLine
from pipelines.storage.errors import StorageError
from pipelines.storage.files import list_folder, write_file
from pipelines.storage.lease import LeaseConfig
from pipelines.tables.schema import TABLE_SCHEMAS, check_folder_name
from pipelines.tables.table import REJECTS_FOLDER, REPORT, absolute_uri

if TYPE_CHECKING:
    from pipelines.tracking.runs import RunRequest
    from pipelines.train.loop.desk import OnNotice, OnTrainProgress, TrainProgress
    from pipelines.train.loop.launch import TrainingResult

Result = TypeVar("Result", bound="TrainingResult", covariant=True)


@dataclass(frozen=True, kw_only=True)
class TrainingJobConfig(JobConfig):
    """Configuration that every training's job shares.

    Args:
        name: name of the training's folder in the dataset, which holds its checkpoints, pictures and result.
        dry_run: print what it will take (weights, memory, steps, the dataset against the batch), and start nothing.
        device_gib: memory of each GPU in GiB, for `dry_run` to compare with.
    """

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

    @property
    def output_uri(self) -> str:
        """The training's folder."""
        return f"{absolute_uri(self.dataset_uri)}/{self.name}"


class Train(Protocol[Result]):
    """A training's `run_...` function, given its dataset and configuration."""

    def __call__(
        self,
        *,
        output_dir: str,
        run_request: "RunRequest",
        lease: LeaseConfig,
        on_progress: "OnTrainProgress",
        on_notice: "OnNotice",
    ) -> Result: ...


def track_training(job: TrainingJobConfig, stage: str, train: Train[Result], make_report: Callable[[Any], str]) -> Result:
    """Train in one MLflow run, which a resumed training continues; the folder gets `report.html`.

    Args:
        stage: name of the MLflow run.
        train: the training.
        make_report: its page, from its result.

    Raises as `train`, and StorageError if all is done but something could not be sent to MLflow.
    """
    from jobs.common.prometheus import TrainMetrics
    from pipelines.tracking.runs import RunRequest
    from pipelines.tracking.unsent import Entry, send_or_keep

    raise_if_stopped()
    output_uri = job.output_uri
    run_request = RunRequest.make(stage, to_dict(job), tracking=job.tracking, output_dir=job.dataset_uri, key=output_uri)
    line = StatusLine()

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

    with (
        TrainMetrics(job.dataset_uri, job.name) as metrics,
        telling_what_is_awaited(job, job.name, line.say),
        line.running(f"{job.name:<22} looks at its data and starts its workers"),
    ):
        result = train(
            output_dir=output_uri,
            run_request=run_request,
            lease=job.lease,
            on_progress=show,
            on_notice=lambda notice: line.say(f"{job.name:<22} {notice}"),
        )
    if not result.was_done or REPORT not in list_folder(output_uri):  # the job may have ended while the page was made
        html = make_report(result)
        unsent = send_or_keep(run_request, output_uri, [Entry("html", [REPORT, html])], say=line.say)
        result = replace(result, unsent=unsent)
        write_file(f"{output_uri}/{REPORT}", html.encode())  # last: a job that ended before it makes and sends the page again
    line.clear()
    print(describe_result(job.name, result), flush=True)
    print(f"{'':<22} the page: {output_uri}/{REPORT}", flush=True)
    if result.unsent is not None:
        raise StorageError(f"the training is finished, but {result.unsent}; the same command sends them, once MLflow answers")
    return result


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


def describe_result(name: str, result: "TrainingResult") -> str:
    """The line when the training has ended."""
    figures = f"{result.num_steps} steps, loss {result.loss_start:.3f} -> {result.loss_end:.3f}"
    if result.was_done:
        return f"{name:<22} {figures}: all there already, nothing to do"
    return f"{name:<22} {figures}, {result.seconds:.0f} s, {result.samples_per_second:.1f} samples/s"
