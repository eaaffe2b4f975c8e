"""The caption stage: one VLM describes every image. Each captioner makes one table; another captioner is one more table."""

from dataclasses import replace
from functools import partial

from pipelines.caption.config import CaptionerConfig
from pipelines.stages.contract import OnProgress, ShardWorker, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, captions_path
from pipelines.tables.table import Table
from pipelines.workers.models import find_model
from sana_model.files.redact import redact_link


def make_captioner(config: CaptionerConfig) -> ShardWorker:
    """Make the worker of the engine `http` or `transformers`. Imports what it needs: the driver and other tasks do without."""
    if config.engine == "http":
        from pipelines.caption.http_engine import HttpCaptioner

        return HttpCaptioner(config)
    from pipelines.caption.transformers_engine import TransformersCaptioner

    return TransformersCaptioner(config)


def caption_identity(dataset_uri: str, config: CaptionerConfig, models: dict[str, str]) -> Identity:
    """Everything that the captions depend on: prompt, engine, checks, model versions (`models`) and images."""
    images = Table(dataset_uri, IMAGES_PATH, IMAGES).require()
    own = {"vllm": config.vllm, "http": config.http}  # settings of the other engines do not count
    settings = value_settings(config) | (value_settings(own[config.engine]) if config.engine in own else {})
    return Identity("caption", settings, models, {IMAGES_PATH: images.fingerprint})


def run_caption(
    dataset_uri: str, config: CaptionerConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Caption every image of a dataset into `captions/<name>`.

    Raises MissingTableError if there are no images, and as `run_shards` (StageError if the engine cannot continue).
    """
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    images.require()  # before any weights are fetched or hashed
    pinned, models = find_models(config)
    output = Table(dataset_uri, captions_path(config.name), CAPTIONS)
    identity = caption_identity(dataset_uri, config, models)
    if config.engine == "vllm":
        from pipelines.caption.vllm_engine import run_vllm

        return run_vllm(output, identity, images, pinned, on_progress=on_progress, leases=leases)
    return run_shards(
        output,
        identity,
        images.list_shards(),
        read_shard=partial(images.read_shard, columns=config.columns),
        make_worker=partial(make_captioner, pinned),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
    )


def find_models(config: CaptionerConfig) -> tuple[CaptionerConfig, dict[str, str]]:
    """The configuration for the workers, which names the commits of its models, and the models' versions for the identity.

    The models are the captioner's, of which a server's can only be believed, and the tokenizer that counts its captions.
    """
    pinned, versions = config, {}
    if config.engine == "http":
        versions[config.name] = f"{redact_link(config.model)}@{config.revision or 'served'}"
    else:
        model = find_model(config.model, config.revision)
        pinned = replace(config, model=model.path, revision=model.revision)
        versions[config.name] = model.version
    if config.quality.budget_tokenizer:
        tokenizer = find_model(config.quality.budget_tokenizer)
        pinned = replace(pinned, quality=replace(config.quality, budget_tokenizer=tokenizer.address))
        versions["budget_tokenizer"] = tokenizer.version
    return pinned, versions
