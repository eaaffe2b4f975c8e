"""The Shapes world: drawn scenes whose every attribute is known, and captions that can be read back exactly.

It stands in for photographs where the truth must be known: the demo, the tests, and the training of the tiny
checkpoints in `sana_model/zoo`. Row i is the same image and the same scene on every machine.
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
"""What the shipped transformer has seen; it learns the others in the demo."""
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
"""Each with its converse: "a left of b" is "b right of a"."""
BASE_SIZE = 64  # pixels; the geometry of drawing.py is for this size
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
    """One drawn object. None: not said (in a parsed caption only)."""

    shape: str
    color: str
    fill: str | None = None


@dataclass(frozen=True)
class Scene:
    """What an image shows. One object has a size and a position; two have a relation, of the first to the second.

    None: not said (in a parsed caption only). Relations are kept as "left of" and "above".
    """

    things: tuple[Thing, ...]
    background: str | None = None
    size: str | None = None
    position: str | None = None
    relation: str | None = None


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """Which scenes there are. `pair_share` of them have two objects; `colors` are those that objects may have."""

    seed: int = 0
    image_size: int = BASE_SIZE
    colors: tuple[str, ...] = tuple(COLORS)
    pair_share: float = 0.3

    def __post_init__(self) -> None:
        unknown = set(self.colors) - set(COLORS)
        if unknown or not self.colors:
            raise ValueError(f"colors={self.colors} must be some of {', '.join(COLORS)}")


def sample_scene(index: int, config: ShapesConfig = ShapesConfig()) -> Scene:
    """The scene of row `index`."""
    return sample_scene_from(row_generator(index, config), config)


def row_generator(index: int, config: ShapesConfig) -> np.random.Generator:
    return np.random.default_rng([config.seed, index])


def sample_scene_from(rng: np.random.Generator, config: ShapesConfig) -> Scene:
    def pick(values: Sequence[str]) -> str:
        return values[int(rng.integers(len(values)))]

    def thing() -> Thing:
        return Thing(pick(SHAPES), pick(config.colors), pick(FILLS))

    background = pick(tuple(BACKGROUNDS))
    if rng.random() < config.pair_share:
        first, second = thing(), thing()
        while second == first:  # alike, they would leave nothing for the relation to say
            second = thing()
        return Scene((first, second), background, relation=pick(tuple(RELATIONS)))
    return Scene((thing(),), background, pick(SIZES), pick(tuple(POSITIONS)))


def hard_negatives(scene: Scene, rng: np.random.Generator, count: int) -> list[Scene]:
    """`count` different scenes that differ from `scene` in one attribute, or in which object has it.

    An attribute that `scene` leaves out (None) stays out. Raises ValueError if there are not so many.
    """
    candidates = sorted(set(_one_change_away(scene)) - {scene}, key=repr)
    if len(candidates) < count:
        raise ValueError(f"count={count}: only {len(candidates)} scenes are one change away from {scene}")
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
    """Of two objects, the same words in another order: the relation changed or turned round, attributes exchanged."""
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
    return [field.name for field in fields(thing) if getattr(thing, field.name) is not None]


def all_singles(colors: Sequence[str] = tuple(COLORS)) -> list[Scene]:
    """Every scene of one object, in a fixed order."""
    return [
        Scene((Thing(shape, color, fill),), background, size, position)
        for shape, color, fill, background, size, position in product(SHAPES, colors, FILLS, BACKGROUNDS, SIZES, POSITIONS)
    ]
