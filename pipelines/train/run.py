"""The train stage: a latents table and a pipeline -> a trained pipeline, by Ray Train and DeepSpeed."""

import logging
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer

from pipelines.storage.files import list_folder
from pipelines.storage.lease import DEFAULT_LEASE, LeaseConfig, hold
from pipelines.tables.errors import TrainingError, TrainingInputError, TrainingStopped
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.table import absolute_uri
from pipelines.tracking.runs import RunRequest, end_status
from pipelines.tracking.unsent import Entry
from pipelines.train.config import TrainConfig
from pipelines.train.desk import OnNotice, OnTrainProgress, open_desk
from pipelines.train.driver_run import DriverRun
from pipelines.train.engine.checkpoint_places import CHECKPOINTS_DIR
from pipelines.train.engine.judgements import BestCheckpoint, Judgement, find_named, read_best, read_judgements
from pipelines.train.judging import CheckpointJudge, Judging
from pipelines.train.record import GRIDS_DIR, PIPELINE_DIR, TrainingRecord, write_config
from pipelines.train.stream.captions import check_caption_embeds
from pipelines.train.stream.mixture import Source, check_complete
from pipelines.train.stream.stream import TrainingStream
from pipelines.train.task import TrainTask
from pipelines.workers.models import model_version


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a finished training.

    pipeline: folder of the trained pipeline, with the average weights.
    checkpoint: folder of the last checkpoint.
    losses: (step, mean loss since the entry before).
    loss_start, loss_end: mean loss of the first and of the last 20 steps.
    grids: (step, URI of the PNG file).
    inputs: name -> fingerprint of the tables.
    fingerprint: fingerprint of the training.
    samples_per_second: speed of the steps alone, since the last start.
    startup_seconds: time before the first step. seconds: time of the whole call.
    judgements: of the checkpoints that were judged, in order.
    best: the best of them, if one was to be chosen; its pipeline is in BEST_DIR of the output folder.
    was_done: the training had finished before this call.
    unsent: why something could not be sent to MLflow and waits in the output folder, for the next call to send; None: all was.
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
    judgements: list[Judgement] = field(default_factory=list)
    best: BestCheckpoint | None = None
    was_done: bool = False
    unsent: str | None = None


def train_identity(dataset_uri: str, config: TrainConfig) -> Identity:
    """Return all that the trained weights depend on.

    Raises MissingTableError if a table does not exist, or ValueError if one is not complete.
    """
    inputs = _inputs(dataset_uri, config.sources(dataset_uri))
    settings = value_settings(config)
    paths = {name: settings.pop(name) for name in ("init", "text_encoder", "autoencoder")}
    models = {name: model_version(path) for name, path in paths.items() if path is not None}
    return Identity("train", settings, models, inputs)


def _inputs(dataset_uri: str, sources: Sequence[Source]) -> dict[str, str]:
    """Return name -> fingerprint of the tables of `sources`. Raises like `train_identity`."""
    inputs: dict[str, str] = {}
    for source in sources:
        inputs |= {table.name_in(dataset_uri): made.fingerprint for table, made in check_complete(source)}
    return inputs


def run_train(
    dataset_uri: str,
    config: TrainConfig,
    *,
    output_dir: str,
    run_request: RunRequest | None = None,
    lease: LeaseConfig = DEFAULT_LEASE,
    judging: Judging | None = None,
    on_progress: OnTrainProgress = lambda progress: None,
    on_notice: OnNotice = lambda notice: None,
) -> TrainResult:
    """Train in `output_dir`, or resume the training that was begun there from its last checkpoint.

    Args:
        dataset_uri: the dataset, any fsspec URI.
        config: the training.
        output_dir: any fsspec URI, or a folder that all nodes see.
        run_request: the MLflow run that the workers log to; None: no MLflow.
        lease: how other trainings are kept from `output_dir`.
        judging: how checkpoints are judged beside the training; None: they are not.
        on_progress: called from another thread with each report.
        on_notice: called from another thread with messages for a person.

    Raises:
        MissingTableError, ValueError: a table is missing, or tables and configuration do not fit together.
        StaleTableError: `output_dir` holds a training with other settings.
        TrackingError: MLflow will never take the run.
        LeaseHeldError: another job is training there.
        StorageError: `output_dir` cannot be written.
        TrainingStopped: SIGTERM came and a checkpoint was saved; the next call resumes from it.
        TrainingInputError: models, tables and configuration do not fit together, as the workers found.
        TrainingError: the training failed; the next call resumes from the last checkpoint.
    """
    start = time.time()
    config = _with_absolute_paths(config)
    dataset_uri, output_uri = absolute_uri(dataset_uri), absolute_uri(output_dir)
    identity = train_identity(dataset_uri, config)
    with hold(output_uri, lease):
        record = TrainingRecord.claim(output_uri, identity)
        if record.result is not None and list_folder(f"{output_uri}/{PIPELINE_DIR}"):
            unsent = DriverRun(run_request, output_uri, on_notice).send()
            return replace(_to_result(record, was_done=True), unsent=unsent)
        write_config(output_uri, config)
        check_tables(dataset_uri, config)
        return _train(record, config, dataset_uri, start, run_request, judging, on_progress, on_notice)


def _train(
    record: TrainingRecord,
    config: TrainConfig,
    dataset_uri: str,
    start: float,
    run_request: RunRequest | None,
    judging: Judging | None,
    on_progress: OnTrainProgress,
    on_notice: OnNotice,
) -> TrainResult:
    """Start or resume the training on its workers, and wait for its end. Raises TrainingStopped or TrainingError."""
    output_uri, run = record.output_uri, DriverRun(run_request, record.output_uri, on_notice)
    judge = CheckpointJudge(judging, config, output_uri, on_notice)
    run.begin()
    judge.begin(run_request)
    try:
        with open_desk(on_progress, on_notice, on_stop=run.mark_killed, on_look=judge.poll) as desk:
            task = TrainTask(
                config=config,
                dataset_uri=dataset_uri,
                inputs={**record.identity.inputs, **_inputs(dataset_uri, config.validation_sources(dataset_uri))},
                output_uri=output_uri,
                run_request=run_request,
                desk=desk,
                judge_every=judging.every if judging is not None else None,
            )
            figures = _figures(_fit(task))
        unsent = judge.finish()
        judge.write_best_pipeline()
    except BaseException as error:
        judge.abandon()
        run.end("KILLED" if isinstance(error, TrainingStopped) else end_status(error))
        raise
    figures["startup_seconds"] = figures.pop("started_at") - start
    result = _to_result(record.finish({**figures, "seconds": time.time() - start}), was_done=False)
    return replace(result, unsent=run.send(*unsent, *_last_entries(result)))


def _last_entries(result: TrainResult) -> list[Entry]:
    """What MLflow is told of a finished training."""
    names = ("loss_start", "loss_end", "startup_seconds", "seconds")
    metrics = {name: getattr(result, name) for name in names}
    return [Entry("metrics", metrics, result.num_steps), Entry("tables", result.inputs), Entry("end", "FINISHED")]


def check_tables(dataset_uri: str, config: TrainConfig) -> None:
    """Check on the driver what needs no worker.

    Raises MissingTableError if a table is missing; ValueError if one is empty, there are more workers than shards, or stored
    embeddings are not those of the training's text encoder.
    """
    sources = config.sources(dataset_uri)
    sizes = {"micro_batch_size": config.micro_batch_size, "world_size": config.num_workers}
    TrainingStream(sources, config.data, seed=config.seed, **sizes)
    if config.caption_embeds is not None:
        from pipelines.train.models import find_text_encoder

        text_encoder, prompts = find_text_encoder(config)
        for source in [*sources, *config.validation_sources(dataset_uri)]:
            check_caption_embeds(source, text_encoder=text_encoder, prompts=prompts)


def _figures(ended: Result) -> dict[str, Any]:
    """Return the figures that rank 0 returned. Raises TrainingError, or one of its kinds, if the training did not finish."""
    figures = dict(ended.return_value)  # type: ignore[attr-defined]  # mypy takes it for the Result of Ray Train 1
    if "stopped" in figures:
        raise TrainingStopped(f"stopped at step {figures['stopped']}, with a checkpoint: run it again to resume from there")
    if "error" in figures:
        raise (TrainingInputError if figures["wrong_input"] else TrainingError)(figures["error"])
    return figures


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Make the local paths of a configuration absolute, since Ray's workers run in other folders; name the best checkpoint."""

    def absolute(path: str | None) -> str | None:
        return absolute_uri(path) if path is not None and Path(path).exists() else path

    latents = config.latents
    if not isinstance(latents, str):
        latents = [
            replace(table, dataset_uri=None if table.dataset_uri is None else absolute_uri(table.dataset_uri))
            for table in latents
        ]
    return replace(
        config,
        latents=latents,
        init=absolute(config.init),
        resume_from=absolute(find_named(config.resume_from) if config.resume_from is not None else None),
        text_encoder=absolute(config.text_encoder),
        autoencoder=absolute(config.autoencoder),
    )


def _fit(task: TrainTask) -> Result:
    """Run the workers with Ray Train until they end. Raises TrainingError if they fail for good."""
    config = task.config
    resources = config.resources
    name = f"train-{uuid.uuid4().hex[:12]}"
    trainer = TorchTrainer(
        partial(_run_worker, task),  # type: ignore[arg-type]  # it may return a value, whatever Ray's annotation says
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


def _run_worker(task: TrainTask) -> dict[str, Any]:
    from pipelines.train.worker import train_worker  # loads what a driver does without

    return train_worker(task)


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


def _to_result(record: TrainingRecord, *, was_done: bool) -> TrainResult:
    assert record.result is not None
    folder = f"{record.output_uri}/{GRIDS_DIR}"
    names = [name for name in list_folder(folder) if name.startswith("step-")]
    checkpoints = f"{record.output_uri}/{CHECKPOINTS_DIR}"
    figures = record.result | {"losses": [(step, loss) for step, loss in record.result["losses"]]}
    return TrainResult(
        pipeline=f"{record.output_uri}/{PIPELINE_DIR}",
        num_steps=record.identity.config["num_steps"],
        grids=[(int(name.removeprefix("step-").removesuffix(".png")), f"{folder}/{name}") for name in names],
        inputs=dict(record.identity.inputs),
        fingerprint=record.identity.fingerprint,
        judgements=[judgement for _, judgement in sorted(read_judgements(checkpoints).items())],
        best=read_best(checkpoints),
        was_done=was_done,
        **figures,
    )
