"""Drawing with the checkpoint of a training, without exporting it."""

from functools import partial
from typing import TYPE_CHECKING

from pipelines.draw.sampler import PipelineSource
from pipelines.train.config import TrainConfig
from sana_model.files.kinds import is_sprint
from sana_model.files.places import resolve

if TYPE_CHECKING:
    import torch

    from sana_model.pipeline import TextToImage


def checkpoint_source(training: TrainConfig, checkpoint_uri: str) -> PipelineSource:
    """The average weights of a whole checkpoint, as `run_sample` takes them. Raises BadCheckpointError if it is not whole."""
    from pipelines.train.engine.checkpoints import AVERAGE, Checkpoint  # loads torch

    return PipelineSource(
        version=f"average {Checkpoint.open(checkpoint_uri).hash_of(AVERAGE)}",
        is_sprint=training.init is not None and is_sprint(resolve(training.init)),
        load=partial(_load, training, checkpoint_uri),
    )


def _load(training: TrainConfig, checkpoint_uri: str, dtype: "torch.dtype | None") -> "TextToImage":
    from pipelines.train.checkpoint_pipeline import load_checkpoint_pipeline

    return load_checkpoint_pipeline(training, checkpoint_uri, dtype=dtype)
