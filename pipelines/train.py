"""The train stage: a latents table and a pipeline -> a trained pipeline, by Ray Train and DeepSpeed."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer

from pipelines.checkpoints import TrainingRecord
from pipelines.data import TrainingStream
from pipelines.models import model_version
from pipelines.schema import LATENTS
from pipelines.tables import Identity, Table, absolute_uri
from pipelines.tracking import TrackedRun
from pipelines.train_config import TrainConfig, TrainingError
from pipelines.train_progress import OnTrainProgress, watch_progress
from pipelines.train_worker import GRIDS_DIR, PIPELINE_DIR, TrainTask, train_worker

CHECKPOINTS_DIR = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a training ended.

    pipeline: folder of the trained pipeline, with the average weights. checkpoint: folder of the last one.
    grids: (step, PNG file). losses: (step, mean loss since the point before); loss_start and loss_end are means over the
    first and last 20 steps. inputs: path and fingerprint of the table. seconds: of all of it; startup_seconds: of it, before
    the first step. samples_per_second: in the steps. was_done: nothing was left to do.
    """

    pipeline: str
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


def train_identity(dataset_uri: str, config: TrainConfig) -> Identity:
    """What the trained weights depend on. Raises MissingTableError, or ValueError if the table is not complete."""
    table = Table(dataset_uri, config.latents, LATENTS)
    manifest = table.require()
    if not manifest.complete:
        raise ValueError(f"{table.uri} is not complete: let its stage finish first, or samples would come and go")
    settings = asdict(config)
    for name in ("grid", "resources", "checkpoint_every", "keep_checkpoints", "log_every", "max_failures"):
        del settings[name]
    del settings["data"]["prefetch"]
    paths = {name: settings.pop(name) for name in ("init", "text_encoder", "autoencoder")}
    models = {name: model_version(path) for name, path in paths.items() if path is not None}
    return Identity("train", settings, models, {table.path: manifest.fingerprint})


def run_train(
    dataset_uri: str,
    config: TrainConfig,
    *,
    output_dir: str,
    open_run: Callable[[], TrackedRun] | None = None,
    on_progress: OnTrainProgress = lambda progress: None,
) -> TrainResult:
    """Train in `output_dir`, a folder that all nodes see, or go on with the training that was begun there.

    Args:
        open_run: called once there is something to do; the workers log to the run that it returns.
        on_progress: called from another thread.

    Raises:
        MissingTableError, ValueError: the table or the configuration will not do.
        StaleTableError: `output_dir` holds a training with other settings.
        TrainingError: it failed. Called again, it goes on from the last checkpoint.
    """
    start = time.time()
    config = _with_absolute_paths(config)
    dataset_uri, folder = absolute_uri(dataset_uri), _local_folder(output_dir)
    record = TrainingRecord.claim(folder, train_identity(dataset_uri, config), checkpoints=folder / CHECKPOINTS_DIR)
    if record.result is not None and (folder / PIPELINE_DIR).exists():
        return _to_result(record, was_done=True)
    table = Table(dataset_uri, config.latents, LATENTS)
    TrainingStream(  # raises here, on the driver, what it would raise in every worker
        table, config.data, micro_batch_size=config.micro_batch_size, seed=config.seed, world_size=config.num_workers
    )
    run = open_run() if open_run is not None else None
    task = TrainTask(config=config, table=table, output_dir=folder, run=run)
    with watch_progress(folder, on_progress):
        ended = _fit(task)
    figures = dict(ended.return_value)  # type: ignore[attr-defined]  # mypy takes it for the Result of Ray Train 1
    if "error" in figures:
        raise TrainingError(figures["error"])
    assert ended.checkpoint is not None
    figures["startup_seconds"] = figures.pop("started_at") - start
    record = record.finish({**figures, "checkpoint": ended.checkpoint.path, "seconds": time.time() - start})
    return _to_result(record, was_done=False)


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Ray's workers run in folders of their own."""

    def absolute(path: str | None) -> str | None:
        return absolute_uri(path) if path is not None and Path(path).exists() else path

    return replace(
        config,
        init=absolute(config.init),
        text_encoder=absolute(config.text_encoder),
        autoencoder=absolute(config.autoencoder),
    )


def _local_folder(output_dir: str) -> Path:
    if "://" in output_dir:
        raise ValueError(f"output_dir={output_dir} is a URI: give a folder, on a file system that all nodes share")
    return Path(output_dir).absolute()


def _fit(task: TrainTask) -> Result:
    """Raises TrainingError."""
    config = task.config
    resources = config.resources
    trainer = TorchTrainer(
        partial(train_worker, task),  # type: ignore[arg-type]  # it may return a value, whatever Ray's annotation says
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=resources.num_gpus > 0,
            resources_per_worker={"CPU": resources.num_cpus, **_gpus(resources.num_gpus), **resources.custom},
        ),
        run_config=RunConfig(
            name=CHECKPOINTS_DIR,
            storage_path=str(task.output_dir),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.keep_checkpoints),
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
    """A line for each worker that failed."""
    if not isinstance(error, WorkerGroupError):
        return f"the training failed: {error}"
    lines = []
    for rank, failure in sorted(error.worker_failures.items()):
        cause = getattr(failure, "_base_exc", failure)  # Ray Train wraps what the worker raised
        first_line, *_ = (str(cause).strip() or "no message").splitlines()  # the whole is in this error's __cause__
        lines.append(f"worker {rank}: {type(cause).__name__}: {first_line}")
    return "the training failed; run it again to go on from the last checkpoint\n  " + "\n  ".join(lines)


def _to_result(record: TrainingRecord, *, was_done: bool) -> TrainResult:
    assert record.result is not None
    grids = sorted((record.folder / GRIDS_DIR).glob("step-*.png"))
    figures = record.result | {"losses": [(step, loss) for step, loss in record.result["losses"]]}
    return TrainResult(
        pipeline=str(record.folder / PIPELINE_DIR),
        num_steps=record.identity.config["num_steps"],
        grids=[(int(path.stem.removeprefix("step-")), str(path)) for path in grids],
        inputs=dict(record.identity.inputs),
        fingerprint=record.identity.fingerprint,
        was_done=was_done,
        **figures,
    )
