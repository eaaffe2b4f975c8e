"""The stage: images tables -> a trained autoencoder, by Ray Train and DeepSpeed."""

from dataclasses import dataclass, replace
from typing import Any

from pipelines.storage.lease import DEFAULT_LEASE, LeaseConfig
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.table import absolute_if_here, absolute_uri
from pipelines.tracking.runs import RunRequest
from pipelines.train.loop.desk import OnNotice, OnTrainProgress
from pipelines.train.loop.launch import Launch, TrainingResult
from pipelines.train.loop.record import AUTOENCODER_DIR
from pipelines.train.loop.task import TrainTask
from pipelines.train_autoencoder.config import TrainAutoencoderConfig
from pipelines.workers.models import find_model, find_place, naming


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderResult(TrainingResult):
    """The result of a finished training of an autoencoder.

    autoencoder: folder of the autoencoder with the average weights.
    scaling_factor: of its latents. latent_mean, latent_std: of the unscaled latents of the fixed pictures.
    psnr: mean over the fixed pictures, dB; None if none are held out.
    """

    autoencoder: str
    scaling_factor: float
    latent_mean: float
    latent_std: float
    psnr: float | None = None


def train_autoencoder_identity(dataset_uri: str, config: TrainAutoencoderConfig) -> Identity:
    """Return all that the trained weights depend on.

    Raises MissingTableError if a table does not exist, ValueError if one is not complete, FileNotFoundError or ValueError if a
    model does not exist.
    """
    from pipelines.train_autoencoder.stream import find_sources

    sources = find_sources(dataset_uri, config.data)
    found = [one for source in sources for one in source.check_complete()]
    inputs = {table.name_in(dataset_uri): made.fingerprint for table, made in found}
    settings = value_settings(config)
    settings["data"] = settings["data"] | {"sources": [source.times for source in sources]}  # `inputs` says which they are
    models = {}
    if (init := settings.pop("init")) is not None:
        with naming("init"):
            models["init"] = find_place(init).version
    if (perceptual := config.losses.perceptual) is not None:
        with naming("losses.perceptual.model"):
            is_file = perceptual.kind == "lpips"
            network = find_place(perceptual.model) if is_file else find_model(perceptual.model, perceptual.revision)
        models["perceptual"] = network.version
        settings["losses"]["perceptual"] = {
            name: value for name, value in settings["losses"]["perceptual"].items() if name not in ("model", "revision")
        }
    return Identity("train_autoencoder", settings, models, inputs)


def run_train_autoencoder(
    dataset_uri: str,
    config: TrainAutoencoderConfig,
    *,
    output_dir: str,
    run_request: RunRequest | None = None,
    lease: LeaseConfig = DEFAULT_LEASE,
    on_progress: OnTrainProgress = lambda progress: None,
    on_notice: OnNotice = lambda notice: None,
) -> TrainAutoencoderResult:
    """Train in `output_dir`, or resume the training that was begun there from its last checkpoint.

    Args:
        dataset_uri: the dataset, any fsspec URI.
        config: the training.
        output_dir: any fsspec URI, or a folder that all nodes see.
        run_request: the MLflow run that the workers log to; None: no MLflow.
        lease: how other trainings are kept from `output_dir`.
        on_progress: called from another thread with each report.
        on_notice: called from another thread with messages for a person.

    Raises as `run_train` does: MissingTableError, ValueError, StaleTableError, TrackingError, LeaseHeldError, StorageError,
    TrainingStopped, TrainingInputError or TrainingError.
    """
    config = _with_absolute_paths(config)
    dataset_uri, output_uri = absolute_uri(dataset_uri), absolute_uri(output_dir)
    launch = Launch(
        config=config,
        identity=train_autoencoder_identity(dataset_uri, config),
        dataset_uri=dataset_uri,
        output_uri=output_uri,
        result_dir=AUTOENCODER_DIR,
        work=_work,
        run_request=run_request,
        lease=lease,
        on_progress=on_progress,
        on_notice=on_notice,
    )
    fields = launch.run(lambda: check_tables(dataset_uri, config))
    return TrainAutoencoderResult(autoencoder=f"{output_uri}/{AUTOENCODER_DIR}", **fields)


def check_tables(dataset_uri: str, config: TrainAutoencoderConfig) -> None:
    """Check on the driver what needs no worker.

    Raises MissingTableError if a table is missing; ValueError if one is empty, there are more workers than shards, no image is
    large enough, or there is no picture to measure on.
    """
    from pipelines.train_autoencoder.pictures import check_pictures
    from pipelines.train_autoencoder.stream import CropStream, find_sources

    sizes = {"micro_batch_size": config.micro_batch_size, "world_size": config.num_workers}
    CropStream(find_sources(dataset_uri, config.data), config.data, seed=config.seed, **sizes)
    check_pictures(dataset_uri, config)


def _with_absolute_paths(config: TrainAutoencoderConfig) -> TrainAutoencoderConfig:
    """Make the local paths of a configuration absolute, since Ray's workers run in other folders."""

    perceptual = config.losses.perceptual
    if perceptual is not None:
        perceptual = replace(perceptual, model=absolute_if_here(perceptual.model) or perceptual.model)
    validation_uri = config.validation.dataset_uri
    sources = tuple(
        replace(source, dataset_uri=None if source.dataset_uri is None else absolute_uri(source.dataset_uri))
        for source in config.data.sources
    )
    return replace(
        config,
        init=absolute_if_here(config.init),
        resume_from=absolute_if_here(config.resume_from),
        data=replace(config.data, sources=sources),
        losses=replace(config.losses, perceptual=perceptual),
        validation=replace(config.validation, dataset_uri=None if validation_uri is None else absolute_uri(validation_uri)),
    )


def _work(task: TrainTask[TrainAutoencoderConfig]) -> dict[str, Any]:
    from pipelines.train.loop.worker import train_as_worker  # loads what a driver does without
    from pipelines.train_autoencoder.worker import AutoencoderWorker

    return train_as_worker(AutoencoderWorker, task)
