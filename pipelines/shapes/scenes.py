"""The Shapes world: drawn scenes with known attributes, and captions that can be parsed back exactly.

It replaces photographs where one must know what an image shows: in the demo, in tests, and in the training of the tiny
checkpoints in `sana_model/zoo`. Row i is the same scene and the same image on every machine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 34, 40),
    "green": (30, 150, 55),
    "blue": (40, 70, 225),
    "yellow": (245, 222, 40),
    "purple": (125, 40, 165),
    "orange": (250, 130, 20),
    "pink": (255, 135, 195),
    "cyan": (40, 205, 225),
}
KNOWN_COLORS = tuple(COLORS)[:6]
"""The colors that the shipped transformer was trained on; it learns the others in the demo."""
NEW_COLORS = tuple(COLORS)[6:]
FILLS = ("solid", "outlined", "striped")
SIZES = ("small", "large")
POSITIONS = {
    "in the center": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
RELATIONS = {"left of": "right of", "above": "below"}
"""Each relation with its converse: "a left of b" is "b right of a"."""
BASE_SIZE = 64  # pixels a side; lengths in drawing.py are for this size
BACKGROUNDS = {"white": (248, 248, 248), "gray": (135, 135, 135), "black": (12, 12, 12), "brown": (95, 62, 35)}
VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "fill": FILLS,
    "size": SIZES,
    "position": tuple(POSITIONS),
    "relation": (*RELATIONS, *RELATIONS.values()),
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True)
class Thing:
    """One drawn object. `fill` is None only if a parsed caption leaves it out."""

    shape: str
    color: str
    fill: str | None = None


@dataclass(frozen=True)
class Scene:
    """The content of an image: one object with a size and a position, or two and the relation of the first to the second.

    An attribute that does not apply, or that a parsed caption leaves out, is None. `relation` is "left of" or "above".
    """

    things: tuple[Thing, ...]
    background: str | None = None
    size: str | None = None
    position: str | None = None
    relation: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """How scenes are drawn at random.

    Args:
        seed: together with the row's index, the seed of each row.
        image_size: pixels a side.
        colors: the colors that objects may have, from COLORS.
        pair_share: the share of scenes with two objects.
    """

    seed: int = 0
    image_size: int = BASE_SIZE
    colors: tuple[str, ...] = tuple(COLORS)
    pair_share: float = 0.3

    def __post_init__(self) -> None:
        unknown = set(self.colors) - set(COLORS)
        if unknown or not self.colors:
            raise ValueError(f"colors={self.colors} must be at least one of {', '.join(COLORS)}")


def sample_scene(index: int, config: ShapesConfig = ShapesConfig()) -> Scene:
    """The scene of row `index`."""
    return sample_scene_from(row_generator(index, config), config)


def row_generator(index: int, config: ShapesConfig) -> np.random.Generator:
    """The generator of row `index`: it draws the scene first, then the shifts of its image."""
    return np.random.default_rng([config.seed, index])


def sample_scene_from(rng: np.random.Generator, config: ShapesConfig) -> Scene:
    """A random scene in which every attribute is set."""

    def pick(values: Sequence[str]) -> str:
        return values[int(rng.integers(len(values)))]

    def thing() -> Thing:
        return Thing(pick(SHAPES), pick(config.colors), pick(FILLS))

    background = pick(tuple(BACKGROUNDS))
    if rng.random() < config.pair_share:
        first, second = thing(), thing()
        while second == first:  # between two equal objects a relation says nothing
            second = thing()
        return Scene((first, second), background, relation=pick(tuple(RELATIONS)))
    return Scene((thing(),), background, pick(SIZES), pick(tuple(POSITIONS)))


def hard_negatives(scene: Scene, rng: np.random.Generator, count: int) -> list[Scene]:
    """Draw `count` different scenes that differ from `scene` in one attribute, or as in `regrouped`.

    Attributes that are None stay None. Raises ValueError if there are fewer than `count` such scenes.
    """
    candidates = sorted(set(_one_change_away(scene)) - {scene}, key=repr)
    if len(candidates) < count:
        raise ValueError(f"count={count}: only {len(candidates)} scenes are one change away from {scene}; ask for fewer")
    return [candidates[index] for index in rng.choice(len(candidates), count, replace=False)]


def _one_change_away(scene: Scene) -> Iterator[Scene]:
    for name in ("background", "size", "position"):
        if getattr(scene, name) is not None:
            yield from (replace(scene, **{name: value}) for value in VALUES[name])  # type: ignore[arg-type]
    for index, thing in enumerate(scene.things):
        others = scene.things[:index], scene.things[index + 1 :]
        for name in _said(thing):
            for value in VALUES[name]:
                yield replace(scene, things=(*others[0], replace(thing, **{name: value}), *others[1]))
    yield from regrouped(scene)


def regrouped(scene: Scene) -> list[Scene]:
    """Scenes whose captions use nearly the same words: another relation, objects swapped, or an attribute exchanged.

    Empty for a scene of one object.
    """
    if scene.relation is None:
        return []
    first, second = scene.things
    others = [
        replace(scene, relation="above" if scene.relation == "left of" else "left of"),
        replace(scene, things=(second, first)),
    ]
    for name in _said(first):
        given = replace(first, **{name: getattr(second, name)}), replace(second, **{name: getattr(first, name)})
        others.append(replace(scene, things=given))
    return [other for other in others if other != scene]


def _said(thing: Thing) -> list[str]:
    """The names of the attributes that are not None."""
    return [field.name for field in fields(thing) if getattr(thing, field.name) is not None]


def all_singles() -> list[Scene]:
    """Every scene of one object, in a fixed order."""
    return [
        Scene((Thing(shape, color, fill),), background, size, position)
        for shape, color, fill, background, size, position in product(SHAPES, COLORS, FILLS, BACKGROUNDS, SIZES, POSITIONS)
    ]
