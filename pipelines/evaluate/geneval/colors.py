"""The color of an object, by CLIP: the object is cut out on gray, and compared with sentences about each color."""

from collections.abc import Sequence

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.evaluate.geneval.config import BACKGROUND, TEMPLATES
from pipelines.evaluate.geneval.rules import COLORS, Detection
from pipelines.workers.clip import ClipModel


def cut_out(image: Image.Image, detection: Detection, background: str | None = BACKGROUND) -> Image.Image:
    """The box of an object, with what its mask leaves out in the background's color; the whole box if either is None."""
    if detection.mask is not None and background is not None:
        blank = Image.new("RGB", image.size, background)
        image = Image.composite(image, blank, Image.fromarray(detection.mask))
    left, top, right, bottom = (round(side) for side in detection.box)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


class ColorNamer:
    """Names the colors of objects.

    Args:
        colors: that it chooses from.
        templates: sentences about a {color} and the object's {name}; the mean of their embeddings stands for the color.
        background: as `cut_out` takes it.
    """

    def __init__(
        self,
        clip: ClipModel,
        colors: Sequence[str] = COLORS,
        templates: Sequence[str] = TEMPLATES,
        background: str | None = BACKGROUND,
    ):
        self.clip, self.colors, self.templates, self.background = clip, tuple(colors), tuple(templates), background
        self._embeds: dict[str, Tensor] = {}

    def name(self, objects: Sequence[tuple[Image.Image, Detection]]) -> list[str]:
        """The color of each object in its RGB picture."""
        if not objects:
            return []
        seen = self.clip.embed_images([cut_out(image, detection, self.background) for image, detection in objects])
        return [
            self.colors[int((self._color_embeds(detection.name) @ embed).argmax())]
            for (_, detection), embed in zip(objects, seen, strict=True)
        ]

    def _color_embeds(self, name: str) -> Tensor:
        """A unit vector for each color of objects of this name: (colors, D)."""
        if name not in self._embeds:
            texts = [template.format(color=color, name=name) for color in self.colors for template in self.templates]
            embeds = self.clip.embed_texts(texts).view(len(self.colors), len(self.templates), -1)
            self._embeds[name] = F.normalize(embeds.mean(1), dim=-1)
        return self._embeds[name]
