"""The metric of the drawn Shapes world: which attributes a picture shows, and whether its prompt asked for them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image

from pipelines.evaluate.config import ShapesJudgeConfig
from pipelines.evaluate.metric import Metric, iter_shards
from pipelines.shapes.grammar import full_caption, parse
from pipelines.shapes.scenes import Scene, all_singles
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.workers.clip import ClipModel

ATTRIBUTES = ("shape", "color", "background")
"""The attributes that are judged unless others are named."""
OBJECT_ATTRIBUTES = ("shape", "color", "fill")
"""The attributes of an object; the others (size, position, background) are those of the scene."""
CAPTIONS_PER_CALL = 512


class ShapesJudge(Metric[ShapesJudgeConfig]):
    """What each picture of one object shows, as a CLIP of the drawn Shapes world reads it. Its figures are shares from 0 to 1:
    `accuracy.<attribute>` of the pictures that show it as asked, `accuracy.all` of those that show shape, color and background
    as asked. Pictures whose prompts ask for something else than one object are left out.

    See `attribute_accuracy`.
    """

    name: ClassVar = "shapes"

    def __init__(self, config: ShapesJudgeConfig):
        from pipelines.workers.clip import ClipModel

        self.clip = ClipModel(config.model, revision=config.revision, dtype=config.dtype, device=config.device)
        self.judge_of_attributes: AttributeJudge | None = None  # made when the first prompt needs it

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        prompts = [row["prompt"] for row in rows]
        seen: list[str | None] = [None] * len(rows)
        if any(asks_for_one_object(prompt) for prompt in prompts):
            self.judge_of_attributes = self.judge_of_attributes or AttributeJudge(self.clip)
            seen = self.judge_of_attributes.describe(prompts, [row["picture"] for row in rows])
        return [{"asked": prompt if caption else None, "seen": caption} for prompt, caption in zip(prompts, seen, strict=True)]

    @classmethod
    def describe(cls, row: Row) -> list[str]:
        if row["asked"] is None:
            return ["asks for something else than one object"]
        wrong = [name for name, value in accuracy_figures([row]).items() if not value and name != "accuracy.all"]
        told = ", ".join(name.partition(".")[2] for name in wrong)
        return [f"shows {row['seen']}", f"wrong: {told}" if wrong else "all as asked"]

    @classmethod
    def summarize(cls, table: Table, config: ShapesJudgeConfig) -> dict[str, float]:
        return accuracy_figures(read_judgements(table))

    @classmethod
    def scores(cls, table: Table) -> Iterator[tuple[str, str, float]]:
        for row in read_judgements(table):
            yield from ((figure, row["asked"], value) for figure, value in accuracy_figures([row]).items())

    @classmethod
    def rank(cls, row: Row) -> tuple[float, ...]:
        """The number of attributes that are right; 0 for a prompt that asks for something else."""
        figures = accuracy_figures([row]) if row["asked"] else {}
        return (sum(figures.get(f"accuracy.{name}", 0.0) for name in ATTRIBUTES),)


def read_judgements(table: Table) -> list[Row]:
    """The rows "asked" and "seen" of a table of this metric whose prompts ask for one object."""
    return [row for shard in iter_shards(table, ["asked", "seen"]) for row in shard.to_pylist() if row["asked"]]


class AttributeJudge:
    """Reads pictures of one object: finds the scene of the Shapes world whose caption gets the highest CLIP score."""

    def __init__(self, clip: "ClipModel"):
        import torch

        self.clip = clip
        self.scenes = all_singles()
        captions = [full_caption(scene) for scene in self.scenes]
        starts = range(0, len(captions), CAPTIONS_PER_CALL)
        self.embeds = torch.cat([clip.embed_texts(captions[start : start + CAPTIONS_PER_CALL]) for start in starts])

    def read(self, images: Sequence[Image.Image]) -> list[Scene]:
        """The scene that each RGB picture shows."""
        return self.read_embeds(self.clip.embed_images(images))

    def read_embeds(self, embeds: "Tensor") -> list[Scene]:
        """The scene that each picture shows, from the CLIP's embeddings of the pictures, (B, D)."""
        best = (embeds @ self.embeds.T).argmax(1)
        return [self.scenes[index] for index in best.tolist()]

    def describe(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[str | None]:
        """A caption of what each RGB picture shows; None if its prompt does not ask for a scene of one object."""
        seen = self.read(images)
        return [
            full_caption(scene) if asks_for_one_object(prompt) else None for prompt, scene in zip(prompts, seen, strict=True)
        ]


def asks_for_one_object(prompt: str) -> bool:
    """Whether a prompt is a caption of the Shapes world that names exactly one object."""
    scene = parse(prompt)
    return scene is not None and len(scene.things) == 1


def asks_for_color(prompt: str, colors: Sequence[str]) -> bool:
    """Whether a prompt asks for one object of the Shapes world, in one of these colors."""
    scene = parse(prompt)
    return scene is not None and len(scene.things) == 1 and scene.things[0].color in colors


def accuracy_figures(rows: Iterable[Row]) -> dict[str, float]:
    """`accuracy.<attribute>` for rows of `read_judgements`, as in `attribute_accuracy`; empty if there are none."""
    scenes = [(parse(row["asked"]), parse(row["seen"])) for row in rows]
    pairs = [(asked, seen) for asked, seen in scenes if asked is not None and seen is not None]
    if not pairs:
        return {}
    accuracy = attribute_accuracy([asked for asked, _ in pairs], [seen for _, seen in pairs])
    return {f"accuracy.{name}": value for name, value in accuracy.items()}


def attribute_accuracy(asked: Sequence[Scene], seen: Sequence[Scene], names: Sequence[str] = ATTRIBUTES) -> dict[str, float]:
    """The share of pictures, from 0 to 1, that show each attribute as asked, and under `all` the share that show every one.

    An attribute that a prompt leaves out counts as right.

    Args:
        asked, seen: for each picture, the scene that its prompt asks for and the scene that it shows; at least one picture.
        names: of the attributes: shape, color, fill, size, position or background.
    """
    pairs = list(zip(asked, seen, strict=True))
    right = np.array([[_attribute(a, name) in (None, _attribute(s, name)) for name in names] for a, s in pairs])
    return {**dict(zip(names, right.mean(0).tolist(), strict=True)), "all": float(right.all(1).mean())}


def _attribute(scene: Scene, name: str) -> str | None:
    """An attribute of a scene of one object; None if a caption left it out."""
    return getattr(scene.things[0] if name in OBJECT_ATTRIBUTES else scene, name)
