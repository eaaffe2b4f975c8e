"""Configurations of the scores that predict what people prefer."""

from dataclasses import dataclass
from typing import ClassVar

from pipelines.evaluate.metric_config import MetricConfig

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclass(frozen=True, kw_only=True)
class PickScoreConfig(MetricConfig):
    """PickScore: a CLIP that was trained on the choices of people (Pick-a-Pic).

    Args:
        processor: the model whose image processor and tokenizer are used; as published.
        processor_revision: of a hub id.
    """

    NO_VALUE: ClassVar = (*MetricConfig.NO_VALUE, "processor_revision")

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = CLIP_H
    processor_revision: str | None = None
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class HpsConfig(MetricConfig):
    """HPSv2.1: a CLIP ViT-H-14 that was trained on the choices of people, in open_clip's form.

    Args:
        model: its file of weights.
        processor: the model whose tokenizer is used.
        processor_revision: of a hub id.
    """

    NO_VALUE: ClassVar = (*MetricConfig.NO_VALUE, "processor_revision")

    model: str = "hf://xswu/HPSv2/HPS_v2.1_compressed.pt"
    processor: str = CLIP_H
    processor_revision: str | None = None
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class ImageRewardConfig(MetricConfig):
    """ImageReward: a BLIP that was trained on rankings by people.

    Args:
        model: its file of weights.
        tokenizer: of its text encoder.
        tokenizer_revision: of a hub id.
    """

    NO_VALUE: ClassVar = (*MetricConfig.NO_VALUE, "tokenizer_revision")

    model: str = "hf://THUDM/ImageReward/ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"
    tokenizer_revision: str | None = None
    batch_size: int = 32


@dataclass(frozen=True, kw_only=True)
class AestheticConfig(MetricConfig):
    """LAION's aesthetic predictor: how beautiful a picture is, from 1 to 10, whatever its prompt.

    Args:
        model: the CLIP whose embeddings the head reads.
        head: its file of weights.
    """

    model: str = "openai/clip-vit-large-patch14"
    head: str = "hf://camenduru/improved-aesthetic-predictor/sac+logos+ava1-l14-linearMSE.pth"
