"""Configuration of the judgement of an autoencoder."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pipelines.evaluate.metric_config import MetricConfig

SMALLEST_SIZE = 11
"""Side in pixels of SSIM's window."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(MetricConfig):
    """How well an autoencoder gives pictures back: PSNR, SSIM, sharpness, a perceptual distance, rFID.

    Args:
        model: the autoencoder.
        size: side in pixels of the pictures' center squares, which are encoded and decoded.
        perceptual: a vision model of transformers, or with perceptual_kind "lpips" torchvision's file of VGG-16; null: none.
        perceptual_revision: of a hub id.
        perceptual_kind: "lpips": LPIPS, as published; "features": see `losses.perceptual` of `jobs.train_autoencoder`.
        inception: FID's Inception V3, whose features rFID compares, as published (`inception.model` of `jobs.evaluate`). null:
            those of `perceptual` if it is a vision model, and the figure is called rfd; otherwise there is none.
        inception_revision: of a hub id.
    """

    NO_VALUE: ClassVar[tuple[str, ...]] = (*MetricConfig.NO_VALUE, "perceptual_revision", "inception_revision")

    model: str = "hf://mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
    size: int = 256
    batch_size: int = 8
    perceptual: str | None = None
    perceptual_revision: str | None = None
    perceptual_kind: Literal["features", "lpips"] = "features"
    inception: str | None = None
    inception_revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < SMALLEST_SIZE:
            raise ValueError(f"size={self.size} must be at least {SMALLEST_SIZE} pixels, SSIM's window")
