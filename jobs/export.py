"""`python -m jobs.export <training or checkpoint> <output>`: a training's weights, for diffusers, NVlabs' code or this one.

Starts no Ray, and needs no GPU. Reads checkpoints of any ZeRO stage and number of workers, from any storage.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from jobs.common.config import from_dict
from pipelines.storage.errors import StorageError
from pipelines.tables.table import absolute_uri
from pipelines.train.config import TrainConfig
from pipelines.train.engine.checkpoints import BadCheckpointError, Checkpoint, list_checkpoints, read_weights
from pipelines.train.engine.lora import add_lora, merge_lora
from pipelines.train.models import load_start
from pipelines.train.record import CHECKPOINTS_DIR, read_config
from sana_model.files.models import Layout
from sana_model.nn.config import DIFFUSERS_PROMPTS
from sana_model.nn.transformer import SanaTransformer
from sana_model.pipeline import TextToImage


def export(source: str, output: str, *, layout: str = "diffusers", ema: bool = True, init: str | None = None) -> TextToImage:
    """Write the pipeline of a checkpoint (or of the newest whole one of a training's folder) to `output`; adapters are merged.

    Args:
        ema: the average of the weights; else those that are trained.
        init: where the pipeline that the training started from lies now, if it was moved.

    Raises FileNotFoundError or ValueError, of which BadCheckpointError is one, if something is not there or not whole.
    """
    source = absolute_uri(source)
    checkpoint, training_uri = find_checkpoint(source)
    config = from_dict(TrainConfig, read_config(training_uri))
    pipeline = load_start(config if init is None else replace(config, init=init))
    pipeline.transformer = with_weights(pipeline.transformer, config, read_weights(checkpoint, average=ema))
    pipeline.save_pretrained(Path(output), layout=layout)
    return pipeline


def find_checkpoint(source: str) -> tuple[str, str]:
    """URIs of the checkpoint and of its training's folder. Raises BadCheckpointError or FileNotFoundError."""
    parent, _, name = source.rstrip("/").rpartition("/")
    if name.startswith("step-"):
        Checkpoint.open(source)
        return source, parent.rpartition("/")[0]
    problems = []
    for uri in list_checkpoints(f"{source}/{CHECKPOINTS_DIR}"):
        try:
            return Checkpoint.open(uri).uri, source
        except BadCheckpointError as error:
            problems.append(str(error))
    if problems:
        raise BadCheckpointError(f"none of the checkpoints in {source} is whole: {problems[0]}")
    raise FileNotFoundError(f"{source} holds no checkpoint: give the folder of a training, or one of its checkpoints/step-...")


def with_weights(start: SanaTransformer, config: TrainConfig, weights: dict[str, torch.Tensor]) -> SanaTransformer:
    """`start` with the weights of a checkpoint; adapters are added to its own."""
    if config.lora is not None:
        add_lora(start, config.lora, seed=config.seed)
        weights = merge_lora(start.state_dict() | weights, config.lora)
    with torch.device("meta"):
        transformer = SanaTransformer(start.config)
    transformer.load_state_dict(weights, assign=True)
    return transformer.eval()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", help="a training's folder, or one of its checkpoints: a path or an fsspec URI")
    parser.add_argument("output", help="the folder to write; for nvlabs, the .pth file")
    parser.add_argument(
        "--layout", choices=get_args(Layout), default="diffusers", help="whose it is to be (default: diffusers)"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the average of the weights (default), or with --no-ema those that are trained",
    )
    parser.add_argument("--init", help="where the pipeline that the training started from lies now, if it was moved")
    options = parser.parse_args(argv)
    try:
        pipeline = export(options.source, options.output, layout=options.layout, ema=options.ema, init=options.init)
    except (FileNotFoundError, ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output}: {options.layout}, {'average' if options.ema else 'trained'} weights")
    if options.layout == "diffusers" and pipeline.text_encoder.config != DIFFUSERS_PROMPTS:
        print("diffusers prompts with its own instruction: pass complex_human_instruction= for the one that was trained with")
    return 0


if __name__ == "__main__":
    sys.exit(main())
