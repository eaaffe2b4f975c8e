"""The caption stage: one VLM describes every image. Each captioner makes one table; another captioner is one more table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from ray.exceptions import RayError

from pipelines.caption_config import CaptionerConfig, model_versions, value_settings
from pipelines.caption_rows import CaptioningError
from pipelines.http_captioner import HttpCaptioner
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

    Raises as `make_shards`, MissingTableError if there are no images, and CaptioningError if the engine cannot go on.
    """
    images = Table(dataset_uri, IMAGES_PATH, IMAGES)
    output = Table(dataset_uri, captions_path(config.name), CAPTIONS)
    identity = caption_identity(dataset_uri, config)
    with _naming_the_cause():
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


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    """A CaptioningError that an actor raised, out of the layers that Ray put around it."""
    try:
        yield
    except RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, CaptioningError):
                raise CaptioningError(*cause.args) from error
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise
