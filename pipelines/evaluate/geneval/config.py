"""Configuration of GenEval."""

from dataclasses import dataclass, field
from typing import ClassVar

from pipelines.evaluate.geneval.rules import COLORS, Thresholds
from pipelines.evaluate.metric_config import MetricConfig

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = "#999"


@dataclass(frozen=True, kw_only=True)
class GenEvalConfig(MetricConfig):
    """GenEval: whether a picture shows the objects that its prompt names, their number, colors and places.

    Args:
        model: the detector, a Mask2Former for instances. The default has the architecture of the published one (Swin-S, COCO),
            in transformers' form and with its authors' weights.
        clip: names the colors; as published, CLIP ViT-L/14 of OpenAI.
        clip_revision: of a hub id.
        thresholds: as published.
        colors: that objects may have.
        color_templates: sentences about a {color} and a {name}; the mean of their embeddings stands for the color.
        background: what is put around an object before its color is named, as Pillow writes colors; None leaves the picture's.
        short_side: pixels to which the detector scales a picture's shorter side.
        long_side: the most pixels of its longer side.
    """

    NO_VALUE: ClassVar = (*MetricConfig.NO_VALUE, "clip_revision")

    model: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    clip_revision: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    colors: tuple[str, ...] = COLORS
    color_templates: tuple[str, ...] = TEMPLATES
    background: str | None = BACKGROUND
    short_side: int = 800
    long_side: int = 1333
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 32 <= self.short_side <= self.long_side:
            raise ValueError(f"short_side={self.short_side} must be at least 32, and at most long_side={self.long_side}")
        if not self.colors or not self.color_templates:
            raise ValueError("colors and color_templates must each have at least one entry")
        if wrong := [one for one in self.color_templates if "{color}" not in one]:
            raise ValueError(f"color_templates: {wrong[0]!r} has no {{color}} in it")
