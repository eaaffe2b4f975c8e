"""`python -m jobs.zoo clip|scenes|text_encoder|captioner|transformer|measure`: makes and measures the tiny checkpoints."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.common.exit_codes import ExitCode
from jobs.common.subcommands import Subcommand, run_subcommand
from pipelines.zoo.config import (
    MeasureConfig,
    ScenesConfig,
    TinyCaptionerConfig,
    TinyClipConfig,
    TinyTextEncoderConfig,
    TinyTransformerConfig,
)


def make_clip(config: TinyClipConfig) -> None:
    from pipelines.zoo.clip import train_clip

    train_clip(config)


def draw_scenes(config: ScenesConfig) -> None:
    from pipelines.shapes.drawing import write_folder

    write_folder(config.output_dir, config.first, config.num_rows)
    print(f"{config.num_rows:,} scenes are in {config.output_dir}")


def make_text_encoder(config: TinyTextEncoderConfig) -> None:
    from pipelines.zoo.text_encoder import train_text_encoder

    train_text_encoder(config)


def make_captioner(config: TinyCaptionerConfig) -> None:
    from pipelines.zoo.captioner_training import train_captioner

    train_captioner(config)


def make_transformer(config: TinyTransformerConfig) -> None:
    from pipelines.zoo.transformer import train_transformer

    train_transformer(config)


def measure(config: MeasureConfig) -> ExitCode:
    """Print every gate and whether it is kept; exit code 1 if one is missed."""
    from pipelines.zoo.gates import GATES, measure_zoo
    from sana_model.files.places import ZOO_DIR

    for path in (config.output, config.grid):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    figures = measure_zoo(config.zoo_dir or ZOO_DIR, grid=config.grid)
    Path(config.output).write_text(json.dumps(figures, indent=2) + "\n")
    missed = [gate for gate in GATES if not gate.is_kept(figures)]
    for gate in GATES:
        verdict = "MISSED" if gate in missed else "kept"
        print(f"{gate.name:<32} {figures[gate.name]:.3f}  in [{gate.lowest:g}, {gate.highest:g}]  {verdict}")
    return ExitCode.WRONG_INPUT if missed else ExitCode.DONE


@dataclass(frozen=True, kw_only=True)
class PublishedConfig:
    """Settings of the list of published models: there are none."""


def list_published(config: PublishedConfig) -> None:
    """Print every published model: its short name, id, kind, and what its weights were trained to see."""
    from sana_model.zoo.published import PUBLISHED

    line = "{:<38} {:<68} {:<12} {:<8} {:<9} {:<5}  {}"
    print(line.format("short name", "id on the hub", "kind", "size", "dtype", "shift", "time input, null caption; or a note"))
    for model in PUBLISHED:
        inputs = f"{model.config.time_input}, {model.config.null_caption}" if model.config else model.note
        size = f"{model.resolution} px" if model.resolution else ""
        shift = f"{model.flow_shift:g}" if model.config else ""
        dtype = "" if model.kind == "not read" else model.dtype
        print(line.format(model.short, model.id, model.kind, size, dtype, shift, inputs))


PARTS = {
    "published": Subcommand(line="List the published models by name.", config_class=PublishedConfig, run=list_published),
    "clip": Subcommand(
        line="Train the tiny CLIP, which scores captions and judges pictures.",
        config_class=TinyClipConfig,
        run=make_clip,
    ),
    "scenes": Subcommand(
        line="Draw the scenes that the tiny DC-AE is trained on, as files.", config_class=ScenesConfig, run=draw_scenes
    ),
    "text_encoder": Subcommand(line="Train the tiny Gemma-2.", config_class=TinyTextEncoderConfig, run=make_text_encoder),
    "captioner": Subcommand(line="Train one of the two tiny VLMs.", config_class=TinyCaptionerConfig, run=make_captioner),
    "transformer": Subcommand(
        line="Train the tiny linear DiT, and write the whole pipeline.",
        config_class=TinyTransformerConfig,
        run=make_transformer,
    ),
    "measure": Subcommand(
        line="Measure every gate on held-out scenes; exit code 1 if one is missed.", config_class=MeasureConfig, run=measure
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    return run_subcommand("zoo", PARTS, argv)


if __name__ == "__main__":
    sys.exit(main())
