"""What is about the Shapes world alone: which attributes a picture shows, and whether its prompt asked for them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pipelines.shapes.grammar import phrasings, write_caption
from pipelines.shapes.scenes import Scene, all_singles
from pipelines.workers.clip import ClipModel

ATTRIBUTES = ("shape", "color", "background")


class AttributeJudge:
    """Reads one-object pictures: of all scenes of the Shapes world, the one whose caption CLIP likes best."""

    def __init__(self, clip: ClipModel):
        self.clip = clip
        self.scenes = all_singles()
        captions = [write_caption(scene, phrasings(scene)[0]) for scene in self.scenes]
        spans = (slice(start, start + 512) for start in range(0, len(captions), 512))
        self.embeds = torch.cat([clip.embed_texts(captions[span]) for span in spans])

    def read(self, images: Sequence[Image.Image]) -> list[Scene]:
        """The scene that each RGB picture shows."""
        best = (self.clip.embed_images(images) @ self.embeds.T).argmax(1)
        return [self.scenes[index] for index in best.tolist()]


def attribute(scene: Scene, name: str) -> str | None:
    """shape, color, fill, size, position or background of a scene of one object."""
    return getattr(scene.things[0] if name in ("shape", "color", "fill") else scene, name)


def attribute_accuracy(asked: Sequence[Scene], seen: Sequence[Scene], names: Sequence[str] = ATTRIBUTES) -> dict[str, float]:
    """Share of pictures right in each attribute that was asked for, and in `all` of them together."""
    pairs = list(zip(asked, seen, strict=True))
    right = np.array([[attribute(a, name) in (None, attribute(s, name)) for name in names] for a, s in pairs])
    return {**dict(zip(names, right.mean(0).tolist(), strict=True)), "all": float(right.all(1).mean())}
