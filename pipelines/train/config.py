"""Training configuration."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pipelines.score.config import check_proportions
from pipelines.tables.schema import check_folder_name
from pipelines.train.engine.config import LoraConfig
from pipelines.train.loop.config import LoopConfig
from pipelines.train.stream.config import FlowConfig, StreamConfig, ValidationConfig, WeightedTable
from pipelines.train.stream.mixture import Source, find_sources, validation_sources
from sana_model.nn.config import PRESETS, NullCaption, TextEncoderConfig, TimeInput


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """Settings of the transformer's positions, which change with the resolution. They have no weights, so `init` still fits.

    Args:
        base_size: side, in tokens, of the square image that is trained on: 16 at 512 px. None: unchanged.
        scale: interpolation of the sincos positional embedding (published: no embedding at 512 and 1024 px, 1.0 at 2048 px,
            2.0 at 4096 px). None: unchanged.
    """

    base_size: int | None = None
    scale: float | None = None

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings as fields of `SanaConfig`, without those that stay unchanged."""
        named = {"base_size": self.base_size, "position_scale": self.scale}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """A grid of pictures, drawn with the average weights during the training: always the same prompts and the same noise.

    Args:
        prompts: one prompt for each picture; without prompts nothing is drawn.
        every: steps between two grids; the last step draws one too.
        num_steps: steps of the solver.
        guidance_scale: weight of classifier-free guidance.
        seed: seed of the noise of the first picture; the n-th picture has seed + n - 1.
        columns: pictures in a row of the grid.
    """

    prompts: list[str] = field(default_factory=list)
    every: int = 1000
    num_steps: int = 20
    guidance_scale: float = 4.5
    seed: int = 0
    columns: int = 8

    def __post_init__(self) -> None:
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number; 1 turns guidance off")
        for name in ("every", "num_steps", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """A training on one latents table, or on a mixture of several.

    Args:
        latents: path of the table in the dataset, such as latents/dc-ae-512; or a list of tables with weights.
        caption_embeds: name of the stored embeddings under caption_embeds/ of the dataset (of each dataset of a
            mixture), so that the text encoder is not needed on the training's device. None: captions are encoded in the step.
        init: the pipeline to start from: a folder, or a zoo://, hf:// or fsspec URI; ours, diffusers' or an NVlabs .pth. Or
            the short name of a published model (`python -m jobs.zoo published`).
        preset: without `init`, the shape of a new transformer, such as sana-0.6b; with `init`, the shape that it must have.
        text_encoder: path of the text encoder; needed without `init`, replaces that of `init` otherwise.
        autoencoder: path of the autoencoder; needed without `init`, replaces that of `init` otherwise.
        prompts: how captions become tokens; None: as in the pipeline of `init`, or as published if there is no `init`.
        positions: settings of the transformer that change with the resolution.
        time_input: how the transformer sees the noise level, see `TimeInput`; None: as the weights of `init` were trained, or
            "continuous" for a preset.
        null_caption: what it sees in place of a dropped caption, see `NullCaption`; None: as the weights of `init` were
            trained, or "own_mask" for a preset.
        data: whose captions compete, which of them are drawn, and for which images.
        flow: the noise levels to train at.
        lora: train adapters, and leave the weights of `init` as they are; None: train all weights.
        validation: the loss on samples that are not trained on.
        grid: pictures drawn during the training.
        seed: seed of the order of samples, of captions, noise and adapters, and of a new transformer.
    """

    NO_VALUE: ClassVar[tuple[str, ...]] = (*LoopConfig.NO_VALUE, "grid", "validation")

    SINCE: ClassVar = ("time_input", "null_caption")

    latents: str | list[WeightedTable]
    caption_embeds: str | None = None
    init: str | None = None
    preset: str | None = None
    text_encoder: str | None = None
    autoencoder: str | None = None
    prompts: TextEncoderConfig | None = None
    positions: PositionConfig = field(default_factory=PositionConfig)
    time_input: TimeInput | None = None
    null_caption: NullCaption | None = None
    data: StreamConfig
    flow: FlowConfig = field(default_factory=FlowConfig)
    lora: LoraConfig | None = None
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    grid: GridConfig = field(default_factory=GridConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        sources = self.sources("")  # raises ValueError if `latents` is wrong
        if self.caption_embeds is not None:
            check_folder_name("caption_embeds", self.caption_embeds)
        if self.data.selection.policy == "proportions":
            competing = dict.fromkeys(captioner for source in sources for captioner in source.captioners)
            check_proportions(self.data.selection.proportions, list(competing))
        if self.lora is not None and self.engine.zero_stage == 3:
            raise ValueError(
                "lora with zero_stage=3: frozen weights would be gathered in every step; set engine.zero_stage to 0, 1 or 2"
            )
        if self.init is None and self.preset is None:
            raise ValueError("init and preset are both missing: give a pipeline to go on from, or a shape to begin with")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset} is none of {', '.join(PRESETS)}")
        if self.init is None and (self.text_encoder is None or self.autoencoder is None):
            raise ValueError(f"preset={self.preset} is a transformer only: give text_encoder and autoencoder too")
        if self.keep_best == "validation_loss" and not (self.validation.latents or self.data.held_out_share):
            raise ValueError("keep_best=validation_loss needs validation.latents or data.held_out_share")

    @property
    def transformer_overrides(self) -> dict[str, Any]:
        """The settings that replace fields of the transformer's `SanaConfig`."""
        named = {"time_input": self.time_input, "null_caption": self.null_caption}
        return self.positions.overrides | {name: value for name, value in named.items() if value is not None}

    def sources(self, dataset_uri: str) -> list[Source]:
        """Return the tables to train on. Raises ValueError if none is named, or one twice."""
        return find_sources(dataset_uri, self.latents, self.data, caption_embeds=self.caption_embeds)

    def validation_sources(self, dataset_uri: str) -> list[Source]:
        """Return the tables to validate with; empty if there is no validation."""
        own = self.sources(dataset_uri)
        return validation_sources(dataset_uri, own, self.validation, self.data, caption_embeds=self.caption_embeds)
