"""Configuration of the training stream: tables and their weights, captions, noise levels, validation."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.score.config import SelectionConfig

UNIT = 1_000_000
"""Parts into which a draw is divided: weights are counted in whole ones of them, so that no rounding ever adds up."""


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Which samples are drawn, and with which captions.

    Args:
        selection: which of a sample's captions is drawn, anew in each epoch.
        caption_dropout: share of samples that get the null caption instead, for classifier-free guidance.
        held_out_share: share of the samples that are never drawn, by their ids: the loss on them tells what was learnt.
        shuffle_shards: shards that are read, and shuffled row by row, together; all of them are in memory at once.
        prefetch: micro-batches made ready ahead; changes no value.
    """

    NO_VALUE: ClassVar = ("prefetch",)

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    caption_dropout: float = 0.1
    held_out_share: float = 0.0
    shuffle_shards: int = 4
    prefetch: int = 4

    def __post_init__(self) -> None:
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
        distribution: of sigma before the shift.
        mean, std: of the logit of sigma, for "logit_normal".
        shift: towards noise, as larger images need (published: 3.0; 4.0 for 0.6B at 1024 px; 6.0 at 4096 px). Pictures are
            drawn with it too. None: that of the pipeline that training starts from, 3.0 for a preset.
    """

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float | None = None


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Which samples the validation loss is of.

    Args:
        latents: path of a table in the training's dataset; None: the share of the training's own tables that
            `data.held_out_share` holds out; without one there is no validation.
        every: steps from one validation to the next; the last step has one too.
        num_samples: the first of the table; of several tables, by turns.
        sigmas: noise levels, at each of which every sample is judged.
        seed: of the noise and the captions.
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
    """A table of a mixture.

    Args:
        latents: its path in its dataset, such as latents/dc-ae-512.
        weight: how often each of its samples is drawn in an epoch. 1: once. 2.5: twice, and in every other epoch a third time,
            half of the samples in each. 0.1: once in ten epochs, a tenth of them in each.
        dataset_uri: the dataset that it is in; None: the training's own.
    """

    latents: str
    weight: float = 1.0
    dataset_uri: str | None = None

    def __post_init__(self) -> None:
        if not 1 / UNIT <= self.weight < math.inf:
            raise ValueError(f"weight={self.weight} of {self.latents} must be a positive number: draws of a sample in an epoch")
