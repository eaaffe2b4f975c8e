"""Running a training from the driver: its record, its MLflow run, its workers by Ray Train, and its result."""

import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ray.train import FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer

from pipelines.storage.files import list_folder
from pipelines.storage.lease import DEFAULT_LEASE, LeaseConfig, hold
from pipelines.tables.errors import TrainingError, TrainingInputError, TrainingStopped
from pipelines.tables.identity import Identity
from pipelines.tracking.runs import RunRequest, end_status
from pipelines.tracking.unsent import Entry
from pipelines.train.loop.config import LoopConfig
from pipelines.train.loop.desk import OnLook, OnNotice, OnTrainProgress, ToJudge, open_desk
from pipelines.train.loop.driver_run import DriverRun
from pipelines.train.loop.record import GRIDS_DIR, TrainingRecord, write_config
from pipelines.train.loop.rendezvous import OneAddressConfig
from pipelines.train.loop.task import TrainTask

Work = Callable[[TrainTask[Any]], dict[str, Any]]
"""What each worker does; a function of a module, which Ray sends to the workers."""


class Judge(Protocol):
    """Judges checkpoints beside the training, on the driver."""

    def begin(self, run_request: RunRequest | None) -> None:
        """Log to this MLflow run from now on. None: no MLflow."""

    def poll(self, asked: list[ToJudge]) -> None:
        """Take note of what is to be judged, without waiting for anything."""

    def finish(self) -> Sequence[Entry]:
        """Wait for what is to come, and do what is left. Returns entries that MLflow has not got."""

    def abandon(self) -> None:
        """End at once: the training has failed."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of a finished training.

    checkpoint: folder of the last checkpoint.
    losses: (step, mean loss since the entry before).
    loss_start, loss_end: mean loss of the first and of the last 20 steps.
    grids: (step, URI of the PNG file).
    inputs: name -> fingerprint of the tables.
    fingerprint: fingerprint of the training.
    samples_per_second: speed of the steps alone, since the last start.
    startup_seconds: time before the first step. seconds: time of the whole call.
    was_done: the training had finished before this call.
    unsent: why something could not be sent to MLflow and waits in the output folder, for the next call to send; None: all was.
    """

    checkpoint: str
    num_steps: int
    loss_start: float
    loss_end: float
    losses: list[tuple[int, float]]
    grids: list[tuple[int, str]]
    inputs: dict[str, str]
    fingerprint: str
    samples_per_second: float
    startup_seconds: float
    seconds: float
    was_done: bool = False
    unsent: str | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A training to run on workers.

    Args:
        config: the training.
        identity: all that the trained weights depend on.
        dataset_uri: the dataset, any fsspec URI.
        output_uri: the output folder, any fsspec URI that all nodes see.
        result_dir: the folder within it that holds what was trained; without it a training has not finished.
        work: what each worker does.
        judge: judges checkpoints beside the training; None: nobody does. Called once the output folder is claimed.
        judge_every: steps between two checkpoints to judge.
        more_inputs: name -> fingerprint of tables that are read, and that the trained weights do not depend on.
        run_request: the MLflow run that the workers log to; None: no MLflow.
        lease: how other trainings are kept from the output folder.
        on_progress: called from another thread with each report.
        on_notice: called from another thread with messages for a person.
    """

    config: LoopConfig
    identity: Identity
    dataset_uri: str
    output_uri: str
    result_dir: str
    work: Work
    judge: Callable[[], Judge] | None = None
    judge_every: int | None = None
    more_inputs: Callable[[], Mapping[str, str]] = field(default=lambda: {})
    run_request: RunRequest | None = None
    lease: LeaseConfig = DEFAULT_LEASE
    on_progress: OnTrainProgress = lambda progress: None
    on_notice: OnNotice = lambda notice: None

    def run(self, check: Callable[[], None]) -> dict[str, Any]:
        """Train, or resume the training that was begun there from its last checkpoint.

        `check`: called before any worker starts, unless the training has finished; it raises what the driver can find wrong.

        Returns the fields of a `TrainingResult`, and further figures of the workers. Raises StaleTableError, TrackingError,
        LeaseHeldError, StorageError, TrainingStopped or TrainingError.
        """
        start = time.time()
        with hold(self.output_uri, self.lease):
            record = TrainingRecord.claim(self.output_uri, self.identity)
            if record.result is not None and list_folder(f"{self.output_uri}/{self.result_dir}"):
                unsent = DriverRun(self.run_request, self.output_uri, self.on_notice).send()
                return _to_fields(record) | {"was_done": True, "unsent": unsent}
            write_config(self.output_uri, self.config)
            check()
            return self._train(record, start)

    def _train(self, record: TrainingRecord, start: float) -> dict[str, Any]:
        """Start or resume the training on its workers, and wait for its end. Raises TrainingStopped or TrainingError."""
        run = DriverRun(self.run_request, self.output_uri, self.on_notice)
        judge = self.judge() if self.judge is not None else None
        on_look: OnLook = judge.poll if judge is not None else lambda to_judge: None
        unsent: Sequence[Entry] = ()
        run.begin()
        if judge is not None:
            judge.begin(self.run_request)
        try:
            with open_desk(self.on_progress, self.on_notice, on_stop=run.mark_killed, on_look=on_look) as desk:
                task = TrainTask(
                    config=self.config,
                    dataset_uri=self.dataset_uri,
                    inputs={**record.identity.inputs, **self.more_inputs()},
                    output_uri=self.output_uri,
                    run_request=self.run_request,
                    desk=desk,
                    judge_every=self.judge_every,
                )
                figures = _figures(_fit(task, self.work))
            if judge is not None:
                unsent = judge.finish()
        except BaseException as error:
            if judge is not None:
                judge.abandon()
            run.end("KILLED" if isinstance(error, TrainingStopped) else end_status(error))
            raise
        figures["startup_seconds"] = figures.pop("started_at") - start
        figures["seconds"] = time.time() - start
        run.keep(*unsent, *_last_entries(record, figures))  # first: once the record is finished, no later start knows them
        return _to_fields(record.finish(figures)) | {"unsent": run.send()}


def _last_entries(record: TrainingRecord, figures: Mapping[str, Any]) -> list[Entry]:
    """What MLflow is told of a finished training."""
    metrics = {name: figures[name] for name in ("loss_start", "loss_end", "startup_seconds", "seconds")}
    tables = dict(record.identity.inputs)
    return [Entry("metrics", metrics, record.identity.config["num_steps"]), Entry("tables", tables), Entry("end", "FINISHED")]


def _to_fields(record: TrainingRecord) -> dict[str, Any]:
    """The fields of a `TrainingResult`, and the workers' further figures, of a training that has finished."""
    assert record.result is not None
    folder = f"{record.output_uri}/{GRIDS_DIR}"
    names = [name for name in list_folder(folder) if name.startswith("step-")]
    return record.result | {
        "losses": [(step, loss) for step, loss in record.result["losses"]],
        "num_steps": record.identity.config["num_steps"],
        "grids": [(int(name.removeprefix("step-").removesuffix(".png")), f"{folder}/{name}") for name in names],
        "inputs": dict(record.identity.inputs),
        "fingerprint": record.identity.fingerprint,
    }


def _figures(ended: Result) -> dict[str, Any]:
    """Return the figures that rank 0 returned. Raises TrainingError, or one of its kinds, if the training did not finish."""
    figures = dict(ended.return_value)  # type: ignore[attr-defined]  # mypy takes it for the Result of Ray Train 1
    if "stopped" in figures:
        raise TrainingStopped(f"stopped at step {figures['stopped']}, with a checkpoint: run it again to resume from there")
    if "error" in figures:
        raise (TrainingInputError if figures["wrong_input"] else TrainingError)(figures["error"])
    return figures


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to `open_desk`: Ray Train's own handler ends the workers without a checkpoint, and says nothing."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def _fit(task: TrainTask[Any], work: Work) -> Result:
    """Run the workers with Ray Train until they end. Raises TrainingError if they fail for good."""
    config = task.config
    resources = config.resources
    name = f"train-{uuid.uuid4().hex[:12]}"
    trainer = _Trainer(
        partial(work, task),  # type: ignore[arg-type]  # it may return a value, whatever Ray's annotation says
        torch_config=OneAddressConfig(),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=resources.num_gpus > 0,
            resources_per_worker={"CPU": resources.num_cpus, **_gpus(resources.num_gpus), **resources.custom},
        ),
        run_config=RunConfig(
            name=name,  # folder of Ray Train's own files; checkpoints are written by us, elsewhere
            storage_path=str(Path(tempfile.gettempdir(), "sana-ray-train")),
            failure_config=FailureConfig(max_failures=config.max_failures),
        ),
    )
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    try:
        return trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(_explain(error)) from error


def _gpus(num_gpus: float) -> dict[str, float]:
    return {"GPU": num_gpus} if num_gpus else {}


def _explain(error: TrainingFailedError) -> str:
    """Return the message for a failed training, with a line for each worker that failed."""
    if not isinstance(error, WorkerGroupError):
        return f"the training failed: {error}"
    lines = []
    for rank, failure in sorted(error.worker_failures.items()):
        cause = getattr(failure, "_base_exc", failure)  # Ray Train wraps what the worker raised
        first_line, *_ = (str(cause).strip() or "no message").splitlines()  # the full text is in __cause__
        lines.append(f"worker {rank}: {type(cause).__name__}: {first_line}")
    return "the training failed; run it again to go on from the last checkpoint\n  " + "\n  ".join(lines)
