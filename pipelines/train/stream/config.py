"""Configuration of the training stream: tables and their weights, captions, noise levels, validation."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.score.config import ImageFilter, SelectionConfig, check_captioners
from pipelines.tables.schema import check_folder_name

UNIT = 1_000_000
"""Weights of tables are counted in whole millionths of a draw, so that rounding errors never add up over the epochs."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Settings of the stream: which samples are drawn, and with which captions. No table depends on them.

    Args:
        captioners: whose captions compete: names of tables under captions/; "original" are the captions that came with the
            images. To add one or to drop one, change this list.
        clip: whose scores under scores/<clip>/ the selection policy compares; None: for policies that look at no score.
        image_filters: limits on the scores of images, by the name of a table under image_scores/: {aesthetic: {min: 5.0}}.
        selection: policy that picks one of a sample's captions, anew in each epoch.
        caption_dropout: share of samples that get the null caption instead, for classifier-free guidance.
        held_out_share: share of samples, chosen by their ids, that are kept for the validation loss and never trained on.
        shuffle_shards: number of shards that are held in memory together and shuffled row by row.
        prefetch: number of micro-batches prepared ahead; changes no value.
    """

    NO_VALUE: ClassVar = ("prefetch",)

    captioners: tuple[str, ...]
    clip: str | None = None
    image_filters: dict[str, ImageFilter] = field(default_factory=dict)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    caption_dropout: float = 0.1
    held_out_share: float = 0.0
    shuffle_shards: int = 4
    prefetch: int = 4

    def __post_init__(self) -> None:
        check_captioners(self.captioners)
        for setting, name in [("clip", self.clip), *(("image_filters", name) for name in self.image_filters)]:
            if name is not None:
                check_folder_name(setting, name)
        if self.clip is None and self.selection.needs_scores:
            raise ValueError(
                f"clip=None: selection.policy={self.selection.policy!r} with min_best_score={self.selection.min_best_score} "
                "compares scores; name the CLIP that made them, such as clip=clip-vit-l-14, or let selection.policy be random "
                "or proportions, and min_best_score null"
            )
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be between 0 and 1")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share={self.held_out_share} must be at least 0 and below 1")
        for name in ("shuffle_shards", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The noise levels to train at.

    Args:
        distribution: distribution of sigma before the shift.
        mean: mean of the logit of sigma, for "logit_normal".
        std: standard deviation of the logit of sigma, for "logit_normal".
        shift: moves sigma towards noise, which larger images need (published: 3.0; 4.0 for 0.6B at 1024 px; 6.0 at 4096 px).
            The solver uses it too when pictures are drawn. None: the shift of the pipeline in `init`, or 3.0 for a preset.
    """

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Settings of the validation: on which samples the loss is measured, and when.

    Args:
        latents: path of a table in the training's dataset. None: the samples of the training's own tables that
            `data.held_out_share` holds out; if that is 0 there is no validation.
        every: steps between two validations; the last step has one too.
        num_samples: number of samples: the first ones of the table, or taken in turn from several tables.
        sigmas: noise levels; the loss of every sample is measured at each of them.
        seed: seed of the noise and of the choice of captions.
    """

    latents: str | None = None
    every: int = 1000
    num_samples: int = 512
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.sigmas or not all(0 < sigma < 1 for sigma in self.sigmas):
            raise ValueError(f"sigmas={self.sigmas} must be one or more noise levels between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class WeightedTable:
    """One table of a mixture.

    Args:
        latents: path of the table in its dataset, such as latents/dc-ae-512.
        weight: how often each sample is drawn in an epoch. 1: once. 2.5: twice, and a third time in every other epoch (half of
            the samples in each). 0.1: once in ten epochs (a tenth of the samples in each).
        dataset_uri: the dataset that holds the table; None: the training's own.
        captioners: whose captions compete for its images; None: those of `data.captioners`.
    """

    latents: str
    weight: float = 1.0
    dataset_uri: str | None = None
    captioners: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.captioners is not None:
            check_captioners(self.captioners)
        if not 1 / UNIT <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} of {self.latents} must be a positive number: draws of a sample in an epoch")
