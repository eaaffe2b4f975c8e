"""The caption stage: one VLM describes every image. Each captioner makes one table; another captioner is one more table."""

from collections.abc import Callable
from functools import partial

from pipelines.caption.config import CaptionerConfig
from pipelines.caption.http_engine import HttpCaptioner
from pipelines.caption.transformers_engine import TransformersCaptioner
from pipelines.caption.vllm_engine import run_vllm
from pipelines.stages.contract import OnProgress, ShardWorker, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, captions_path
from pipelines.tables.table import Table
from pipelines.workers.models import model_version, pinned

WORKERS: dict[str, Callable[[CaptionerConfig], ShardWorker]] = {"transformers": TransformersCaptioner, "http": HttpCaptioner}


def caption_identity(dataset_uri: str, config: CaptionerConfig) -> Identity:
    """What the captions depend on: weights, prompt, engine and its settings, and what is looked for in a caption."""
    images = Table(dataset_uri, IMAGES_PATH, IMAGES).require()
    own = {"vllm": config.vllm, "http": config.http}  # the settings of the other engine do not count
    settings = value_settings(config) | (value_settings(own[config.engine]) if config.engine in own else {})
    return Identity("caption", settings, model_versions(config), {IMAGES_PATH: images.fingerprint})


def run_caption(
    dataset_uri: str, config: CaptionerConfig, *, on_progress: OnProgress = lambda _: None, leases: Leases | None = None
) -> StageResult:
    """Caption every image of a dataset into `captions/<name>`.

    Raises as `run_shards` (StageError if the engine cannot go on), and MissingTableError if there are no images.
    """
    if config.engine != "http":
        config = pinned(config)
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    output = Table(dataset_uri, captions_path(config.name), CAPTIONS)
    identity = caption_identity(dataset_uri, config)
    if config.engine == "vllm":
        return run_vllm(output, identity, images, config, on_progress=on_progress, leases=leases)
    return run_shards(
        output,
        identity,
        images.list_shards(),
        read_shard=partial(images.read_shard, columns=config.columns),
        make_worker=partial(WORKERS[config.engine], config),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
    )


def model_versions(config: CaptionerConfig) -> dict[str, str]:
    """The captioner's weights, and the tokenizer that counts its captions. What a server runs can only be believed."""
    served = f"{config.model}@{config.revision or 'served'}"
    versions = {config.name: served if config.engine == "http" else model_version(config.model, config.revision)}
    if config.quality.budget_tokenizer:
        versions["budget_tokenizer"] = model_version(config.quality.budget_tokenizer)
    return versions
