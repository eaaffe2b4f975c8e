"""A training's checkpoint where a command takes a pipeline."""

from typing import TYPE_CHECKING

from jobs.common.config import from_dict
from pipelines.tables.table import absolute_uri
from pipelines.train.engine.checkpoint_places import is_checkpoint

if TYPE_CHECKING:
    from pipelines.draw.sampler import PipelineSource
    from pipelines.train.config import TrainConfig


def find_source(pipeline: str) -> "PipelineSource | None":
    """How the checkpoint that a pipeline's address names (.../checkpoints/step-001000, .../checkpoints/best) is loaded.

    None for any other pipeline. Raises FileNotFoundError or ValueError if it is not there or not whole.
    """
    if not is_checkpoint(pipeline):
        return None
    from pipelines.draw.checkpoints import checkpoint_source
    from pipelines.train.checkpoint_pipeline import find_checkpoint

    uri, training_uri = find_checkpoint(absolute_uri(pipeline))
    return checkpoint_source(read_training(training_uri), uri)


def read_training(training_uri: str) -> "TrainConfig":
    """The configuration of the training in a folder. Raises ValueError if an autoencoder is trained there."""
    from pipelines.train.config import TrainConfig
    from pipelines.train.loop.record import AUTOENCODER_DIR, read_config

    told = read_config(training_uri)
    if "parts" in told:
        raise ValueError(
            f"{training_uri} is the training of an autoencoder: when it has ended, python -m jobs.convert "
            f"{training_uri}/{AUTOENCODER_DIR} <output> --layout diffusers writes it in another layout"
        )
    return from_dict(TrainConfig, told)
