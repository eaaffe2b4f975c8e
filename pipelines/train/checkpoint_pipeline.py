"""The pipeline of a checkpoint: that with which the training began, with the trained weights in its transformer."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pipelines.storage.files import upload_folder
from pipelines.train.config import TrainConfig
from pipelines.train.engine.checkpoint_places import CHECKPOINTS_DIR, is_checkpoint, list_checkpoints
from pipelines.train.engine.checkpoints import BadCheckpointError, Checkpoint, read_weights
from pipelines.train.engine.judgements import find_named
from pipelines.train.engine.lora import add_lora, merge_lora
from pipelines.train.models import load_start
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage


def find_checkpoint(source: str) -> tuple[str, str]:
    """The checkpoint that a URI names, and the folder of its training.

    Args:
        source: a checkpoint, which may be `.../checkpoints/best`; or the folder of a training, for its newest whole one.

    Raises BadCheckpointError if it is not whole; FileNotFoundError if there is none.
    """
    source = source.rstrip("/")
    if is_checkpoint(source):
        uri = find_named(source)
        return Checkpoint.open(uri).uri, uri.rpartition(f"/{CHECKPOINTS_DIR}/")[0]
    problems = []
    for uri in list_checkpoints(f"{source}/{CHECKPOINTS_DIR}"):
        try:
            return Checkpoint.open(uri).uri, source
        except BadCheckpointError as error:
            problems.append(str(error))
    if problems:
        raise BadCheckpointError(f"none of the checkpoints in {source} is whole: {problems[0]}")
    raise FileNotFoundError(
        f"{source} holds no checkpoint: give the folder of a training, or one of its "
        "checkpoints/step-...; a model that was not trained here is converted by python -m jobs.convert"
    )


def load_checkpoint_pipeline(
    config: TrainConfig, uri: str, *, average: bool = True, dtype: torch.dtype | None = None
) -> TextToImage:
    """Load the pipeline of a checkpoint, on the CPU; adapters are merged into the weights.

    Args:
        config: the training's.
        uri: of the checkpoint.
        average: take the moving average of the weights, else those of the last step.
        dtype: of the weights, but float16 gives the text encoder bfloat16; None: float32 for the transformer, and that of their
            files for the other models.

    Raises BadCheckpointError if the checkpoint is not whole; as `load_start`.
    """
    pipeline = load_start(config)
    pipeline.transformer = with_weights(pipeline.transformer, config, read_weights(uri, average=average))
    if dtype is not None:
        pipeline.to(dtype)
        pipeline.text_encoder.to(torch.bfloat16 if dtype is torch.float16 else dtype)
    return pipeline


def with_weights(start: SanaTransformer, config: TrainConfig, weights: dict[str, Tensor]) -> SanaTransformer:
    """The transformer of `start`, that of `load_start`, with the weights that were trained; adapters are merged into its own.

    `start` itself is changed.
    """
    if config.lora is not None:
        add_lora(start, config.lora, seed=config.seed)
        weights = merge_lora(start.state_dict() | weights, config.lora)
    with torch.device("meta"):
        transformer = SanaTransformer(start.config)
    transformer.load_state_dict(weights, assign=True)
    for name, tensor in start.logvar.items():
        setattr(transformer, name, tensor)
    return transformer.eval()


def write_checkpoint_pipeline(config: TrainConfig, uri: str, target_uri: str) -> None:
    """Write the pipeline of a checkpoint, with the average weights, into a folder (any fsspec URI). Raises StorageError."""
    pipeline = load_checkpoint_pipeline(config, uri)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(Path(folder))
        upload_folder(folder, target_uri)
