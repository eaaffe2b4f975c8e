"""The Shapes world: drawn scenes whose every attribute is known, and captions that can be read back exactly.

It stands in for photographs where the truth must be known: the demo, the tests, and the training of the tiny
checkpoints in `sana_model/zoo`. Row i is the same image and the same scene on every machine.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

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
BACKGROUNDS = {"white": (248, 248, 248), "gray": (135, 135, 135), "black": (12, 12, 12), "brown": (95, 62, 35)}

# Geometry for an image of 64 px; everything scales with the size.
BASE_SIZE = 64
RADIUS = {"small": 12.0, "large": 19.0}
OFFSET = {"small": 17.0, "large": 11.0}  # from the middle, for a position other than the center
PAIR_OFFSET = 15.0
STRIPE_PERIOD, STRIPE_WIDTH = 7.5, 4.5
HOLE = 0.55  # inner radius of an outlined shape, as a share of the outer
SUPERSAMPLING = 4


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


# One phrasing is used by one captioner or another, so that captions of an image differ in more than their errors.
SINGLE_PHRASINGS = (
    "a {size} {color} {fill} {shape} {position} of a {background} background",
    "on a {background} background , a {size} {color} {fill} {shape} {position}",
    "the picture shows a {size} {fill} {shape} in {color} {position} . the background is {background} .",
    "there is a {color} {shape} {position} . it is {size} and {fill} . the background is {background} .",
)
PAIR_PHRASINGS = (
    "a {color} {fill} {shape} {relation} a {color2} {fill2} {shape2} on a {background} background",
    "on a {background} background , a {color} {fill} {shape} is {relation} a {color2} {fill2} {shape2}",
    "the picture shows a {fill} {shape} in {color} {relation} a {fill2} {shape2} in {color2} . "
    "the background is {background} .",
    "there is a {color} {shape} {relation} a {color2} {shape2} . the first is {fill} and the second is {fill2} . "
    "the background is {background} .",
)
SHORT_PHRASINGS = (
    "a {color} {shape}",
    "a {color} {shape} on a {background} background",
    "a {color} {fill} {shape} on a {background} background",
)
SHORT_PAIR_PHRASINGS = ("a {color} {shape} {relation} a {color2} {shape2}",)

VALUES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "fill": FILLS,
    "size": SIZES,
    "position": tuple(POSITIONS),
    "relation": (*RELATIONS, *RELATIONS.values()),
    "background": tuple(BACKGROUNDS),
}


def sample_scene(index: int, config: ShapesConfig = ShapesConfig()) -> Scene:
    """The scene of row `index`."""
    return _sample_scene(_generator(index, config), config)


def draw_row(index: int, config: ShapesConfig = ShapesConfig()) -> tuple[Scene, np.ndarray]:
    """Scene and image (H, W, 3) uint8 of row `index`."""
    rng = _generator(index, config)
    scene = _sample_scene(rng, config)
    return scene, draw_scene(scene, rng, config.image_size)


def write_folder(
    folder: str | Path, first: int, count: int, config: ShapesConfig = ShapesConfig(), *, captioned: bool = False
) -> None:
    """Write rows as PNG files; what each shows (its `truth`, a complete caption) goes into a .json beside it.

    That is not its caption: only if `captioned` there is one, in a phrasing of its own. Files that are there already stay as
    they are.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        path = Path(folder, f"{index:09d}.png")
        if path.exists():
            continue
        scene, pixels = draw_row(index, config)
        facts = {"truth": write_caption(scene, phrasings(scene)[0])}
        if captioned:
            facts["caption"] = sample_caption(scene, np.random.default_rng(index))
        path.with_suffix(".json").write_text(json.dumps(facts))
        Image.fromarray(pixels).save(path)


def _generator(index: int, config: ShapesConfig) -> np.random.Generator:
    return np.random.default_rng([config.seed, index])


def _sample_scene(rng: np.random.Generator, config: ShapesConfig) -> Scene:
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


def draw_scene(scene: Scene, rng: np.random.Generator, image_size: int = BASE_SIZE) -> np.ndarray:
    """Draw a fully described scene, with small random shifts of place, size and colour: (H, W, 3) uint8."""
    scale = image_size * SUPERSAMPLING / BASE_SIZE
    side = image_size * SUPERSAMPLING
    assert scene.background is not None
    canvas = Image.new("RGB", (side, side), _shade(BACKGROUNDS[scene.background], rng))
    for thing, (x, y), radius in zip(scene.things, _centers(scene), _radii(scene), strict=True):
        dx, dy = rng.uniform(-1.5, 1.5, 2)
        radius *= rng.uniform(0.94, 1.04)
        mask = _mask(thing, (x + dx) * scale, (y + dy) * scale, radius * scale, side, scale)
        canvas.paste(_shade(COLORS[thing.color], rng), mask=mask)
    return np.asarray(canvas.reduce(SUPERSAMPLING))


def _centers(scene: Scene) -> list[tuple[float, float]]:
    middle = BASE_SIZE / 2
    if scene.relation is None:
        assert scene.size is not None and scene.position is not None
        (dx, dy), offset = POSITIONS[scene.position], OFFSET[scene.size]
        return [(middle + dx * offset, middle + dy * offset)]
    x, y = (PAIR_OFFSET, 0.0) if scene.relation == "left of" else (0.0, PAIR_OFFSET)
    return [(middle - x, middle - y), (middle + x, middle + y)]


def _radii(scene: Scene) -> list[float]:
    return [RADIUS[scene.size or "small"]] * len(scene.things)


def _shade(color: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(channel + shift, 0, 255)) for channel, shift in zip(color, rng.integers(-9, 10, 3), strict=True))
    return r, g, b


def _mask(thing: Thing, x: float, y: float, radius: float, side: int, scale: float) -> Image.Image:
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    _draw_outline(pen, thing.shape, x, y, radius, 255)
    if thing.fill == "outlined":
        _draw_outline(pen, thing.shape, x, y, radius * HOLE, 0)
    elif thing.fill == "striped":
        top = y - radius
        for row in np.arange(top + STRIPE_WIDTH * scale, y + radius, STRIPE_PERIOD * scale):
            pen.rectangle((0, row, side, row + (STRIPE_PERIOD - STRIPE_WIDTH) * scale), fill=0)
    return mask


def _draw_outline(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: int) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "square":
        half = radius * 0.87
        pen.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    else:
        points = 3 if shape == "triangle" else 5
        reach = [radius * 1.15] if shape == "triangle" else [radius * 1.15, radius * 0.5]
        corners = []
        for index in range(points * len(reach)):
            angle = math.pi * (2 * index / (points * len(reach)) - 0.5)
            length = reach[index % len(reach)]
            corners.append((x + length * math.cos(angle), y + length * math.sin(angle) + 0.1 * radius))
        pen.polygon(corners, fill=fill)


def phrasings(scene: Scene) -> tuple[str, ...]:
    """The templates that say everything about a scene of this kind."""
    return SINGLE_PHRASINGS if len(scene.things) == 1 else PAIR_PHRASINGS


def short_phrasings(scene: Scene) -> tuple[str, ...]:
    """The templates that say a part."""
    return SHORT_PHRASINGS if len(scene.things) == 1 else SHORT_PAIR_PHRASINGS


def write_caption(scene: Scene, phrasing: str, *, converse: bool = False) -> str:
    """The caption of a scene in a phrasing; `converse` says of two objects the second first ("b right of a")."""
    first, second = scene.things[0], scene.things[-1]
    relation = scene.relation
    if converse and relation is not None:
        first, second, relation = second, first, RELATIONS[relation]
    caption = phrasing.format(
        shape=first.shape,
        color=first.color,
        fill=first.fill,
        shape2=second.shape,
        color2=second.color,
        fill2=second.fill,
        relation=relation,
        size=scene.size,
        position=scene.position,
        background=scene.background,
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", caption).replace(" ,", ",").replace(" .", ".")


def sample_caption(scene: Scene, rng: np.random.Generator, *, short_share: float = 0.0) -> str:
    """A caption in a random phrasing; with probability `short_share` one that says only a part."""
    choices = short_phrasings(scene) if rng.random() < short_share else phrasings(scene)
    return write_caption(scene, choices[rng.integers(len(choices))], converse=bool(rng.integers(2)))


def parse(caption: str) -> Scene | None:
    """The scene that a caption tells of, None for each attribute it leaves out; None if it is not in the grammar.

    Reads every phrasing, whatever the case, the spaces and the final full stop.
    """
    text = " ".join(re.findall(r"[a-z]+|[.,]", caption.lower())).strip(" .")
    for pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            return _to_scene(match.groupdict())
    return None


def _to_scene(found: dict[str, str]) -> Scene:
    things = [Thing(found["shape"], found["color"], found.get("fill"))]
    relation = found.get("relation")
    if relation is not None:
        things.append(Thing(found["shape2"], found["color2"], found.get("fill2")))
        if relation not in RELATIONS:
            things.reverse()
            relation = next(name for name, converse in RELATIONS.items() if converse == relation)
    return Scene(tuple(things), found.get("background"), found.get("size"), found.get("position"), relation)


def _to_pattern(phrasing: str) -> re.Pattern[str]:
    def group(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"(?P<{name}>{'|'.join(VALUES[name.rstrip('2')])})"

    text = re.escape(phrasing.strip(" .")).replace(r"\{", "{").replace(r"\}", "}").replace(r"\ ", " ")
    text = re.sub(r"\ba ", "an? ", text)
    return re.compile(re.sub(r"\{(\w+)\}", group, text))


_PATTERNS = [
    _to_pattern(phrasing) for phrasing in (*SINGLE_PHRASINGS, *PAIR_PHRASINGS, *SHORT_PHRASINGS, *SHORT_PAIR_PHRASINGS)
]


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


def vocabulary() -> list[str]:
    """Every word and sign of the grammar, sorted."""
    templates = (*SINGLE_PHRASINGS, *PAIR_PHRASINGS, *SHORT_PHRASINGS, *SHORT_PAIR_PHRASINGS)
    text = " ".join([*templates, *(word for values in VALUES.values() for word in values), "an"])
    return sorted(set(re.findall(r"[a-z]+|[.,]", re.sub(r"\{\w+\}", " ", text))))


def all_singles(colors: Sequence[str] = tuple(COLORS)) -> list[Scene]:
    """Every scene of one object, in a fixed order."""
    return [
        Scene((Thing(shape, color, fill),), background, size, position)
        for shape, color, fill, background, size, position in product(SHAPES, colors, FILLS, BACKGROUNDS, SIZES, POSITIONS)
    ]
