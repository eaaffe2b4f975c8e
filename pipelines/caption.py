"""The caption stage: one VLM describes every image. Each captioner makes one table; another captioner is one more table."""

from collections.abc import Callable
from functools import partial

from pipelines.caption_config import CaptionerConfig, model_versions, value_settings
from pipelines.http_captioner import HttpCaptioner
from pipelines.models import pinned
from pipelines.schema import CAPTIONS, IMAGES, IMAGES_PATH, captions_path
from pipelines.stage import OnProgress, ShardWorker, StageResult, run_shards
from pipelines.tables import Identity, Table
from pipelines.transformers_captioner import TransformersCaptioner
from pipelines.vllm_captioner import run_vllm

WORKERS: dict[str, Callable[[CaptionerConfig], ShardWorker]] = {"transformers": TransformersCaptioner, "http": HttpCaptioner}


def caption_identity(dataset_uri: str, config: CaptionerConfig) -> Identity:
    """What the captions depend on: weights, prompt, engine and its settings, and what is looked for in a caption."""
    images = Table(dataset_uri, IMAGES_PATH, IMAGES).require()
    return Identity("caption", value_settings(config), model_versions(config), {IMAGES_PATH: images.fingerprint})


def run_caption(dataset_uri: str, config: CaptionerConfig, *, on_progress: OnProgress = lambda _: None) -> StageResult:
    """Caption every image of a dataset into `captions/<name>`.

    Raises as `run_shards` (StageError if the engine cannot go on), and MissingTableError if there are no images.
    """
    if config.engine != "http":
        config = pinned(config)
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    output = Table(dataset_uri, captions_path(config.name), CAPTIONS)
    identity = caption_identity(dataset_uri, config)
    if config.engine == "vllm":
        return run_vllm(output, identity, images, config, on_progress=on_progress)
    return run_shards(
        output,
        identity,
        images.list_shards(),
        read_shard=partial(images.read_shard, columns=config.columns),
        make_worker=partial(WORKERS[config.engine], config),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
    )
