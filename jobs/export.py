"""`python -m jobs.export --source data/cats/train --output exported`: weights for diffusers, NVlabs or us.

Starts no Ray, and needs no GPU. Reads checkpoints of any ZeRO stage and number of workers, from any storage.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.common.checkpoints import read_training
from jobs.common.instruction import note_instruction
from jobs.common.job import run_command
from pipelines.tables.table import absolute_uri
from sana_model.files.layout import Layout

if TYPE_CHECKING:
    from sana_model.pipeline import TextToImage


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Configuration of an export.

    Args:
        source: a training's folder (any fsspec URI), or one of its checkpoints; `<folder>/checkpoints/best` is the best one.
        output: the folder to write; for nvlabs, the .pth file.
        layout: the code that is to read it.
        ema: take the average of the weights; else the trained weights themselves.
        init: where the pipeline that the training started from lies now, if it was moved.
    """

    source: str
    output: str
    layout: Layout = "diffusers"
    ema: bool = True
    init: str | None = None


def run(config: ExportConfig) -> None:
    """Write the weights, and print what they are."""
    pipeline = export(config)
    print(f"{config.output}: {config.layout}, {'average' if config.ema else 'trained'} weights")
    note_instruction(config.layout, pipeline.text_encoder.config)


def export(config: ExportConfig) -> "TextToImage":
    """Write the pipeline of a checkpoint, or of the newest whole one of a training's folder; adapters are merged.

    Raises FileNotFoundError or ValueError, of which BadCheckpointError is one, if something is not there or not whole.
    """
    from pipelines.train.checkpoint_pipeline import find_checkpoint, load_checkpoint_pipeline

    if config.source.startswith(("zoo://", "hf://")):
        raise ValueError(f"source={config.source} is no training: python -m jobs.convert changes the layout of such models")
    checkpoint, training_uri = find_checkpoint(absolute_uri(config.source))
    trained = read_training(training_uri)
    moved = trained if config.init is None else replace(trained, init=config.init)
    pipeline = load_checkpoint_pipeline(moved, checkpoint, average=config.ema)
    pipeline.save_pretrained(Path(config.output), layout=config.layout)
    return pipeline


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(ExportConfig, run, argv, name="export")


if __name__ == "__main__":
    sys.exit(main())
