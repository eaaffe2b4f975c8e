"""The train stage: a latents table and a pipeline -> a trained pipeline, by Ray Train and DeepSpeed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipelines.storage.lease import DEFAULT_LEASE, LeaseConfig
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.table import absolute_if_here, absolute_uri
from pipelines.tracking.runs import RunRequest
from pipelines.train.config import TrainConfig
from pipelines.train.engine.checkpoint_places import CHECKPOINTS_DIR
from pipelines.train.engine.judgements import BestCheckpoint, Judgement, find_named, read_best, read_judgements
from pipelines.train.judging import CheckpointJudge, Judging
from pipelines.train.loop.desk import OnNotice, OnTrainProgress
from pipelines.train.loop.launch import Launch, TrainingResult
from pipelines.train.loop.record import PIPELINE_DIR
from pipelines.train.loop.task import TrainTask
from pipelines.train.stream.captions import check_caption_embeds
from pipelines.train.stream.mixture import Source, check_complete
from pipelines.train.stream.stream import TrainingStream
from pipelines.workers.models import model_version


@dataclass(frozen=True, kw_only=True)
class TrainResult(TrainingResult):
    """The result of a finished training of the transformer.

    pipeline: folder of the pipeline with the average weights.
    judgements: of the checkpoints that were judged, in order.
    best: the best of them, if one was to be chosen; its pipeline is in BEST_DIR of the output folder.
    """

    pipeline: str
    judgements: list[Judgement] = field(default_factory=list)
    best: BestCheckpoint | None = None


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
        TrainingStopped: SIGTERM or Ctrl-C came and a checkpoint was saved; the next call resumes from it.
        TrainingInputError: models, tables and configuration do not fit together, as the workers found.
        TrainingError: the training failed; the next call resumes from the last checkpoint.
    """
    config = _with_absolute_paths(config)
    dataset_uri, output_uri = absolute_uri(dataset_uri), absolute_uri(output_dir)
    launch = Launch(
        config=config,
        identity=train_identity(dataset_uri, config),
        dataset_uri=dataset_uri,
        output_uri=output_uri,
        result_dir=PIPELINE_DIR,
        work=_work,
        judge=lambda: CheckpointJudge(judging, config, output_uri, on_notice),
        judge_every=judging.every if judging is not None else None,
        more_inputs=lambda: _inputs(dataset_uri, config.validation_sources(dataset_uri)),
        run_request=run_request,
        lease=lease,
        on_progress=on_progress,
        on_notice=on_notice,
    )
    fields = launch.run(lambda: check_tables(dataset_uri, config))
    checkpoints = f"{output_uri}/{CHECKPOINTS_DIR}"
    return TrainResult(
        pipeline=f"{output_uri}/{PIPELINE_DIR}",
        judgements=[judgement for _, judgement in sorted(read_judgements(checkpoints).items())],
        best=read_best(checkpoints),
        **fields,
    )


def _work(task: TrainTask[TrainConfig]) -> dict[str, Any]:
    from pipelines.train.loop.worker import train_as_worker  # loads what a driver does without
    from pipelines.train.worker import TrainWorker

    return train_as_worker(TrainWorker, task)


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


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Make the local paths of a configuration absolute, since Ray's workers run in other folders; name the best checkpoint."""

    latents = config.latents
    if not isinstance(latents, str):
        latents = [
            replace(table, dataset_uri=None if table.dataset_uri is None else absolute_uri(table.dataset_uri))
            for table in latents
        ]
    return replace(
        config,
        latents=latents,
        init=absolute_if_here(config.init),
        resume_from=absolute_if_here(find_named(config.resume_from) if config.resume_from is not None else None),
        text_encoder=absolute_if_here(config.text_encoder),
        autoencoder=absolute_if_here(config.autoencoder),
    )
