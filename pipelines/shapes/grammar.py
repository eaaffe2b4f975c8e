"""Captions of scenes: written in one of several phrasings, and parsed back exactly."""

import re

import numpy as np

from pipelines.shapes.scenes import RELATIONS, VALUES, Scene, Thing

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


def phrasings(scene: Scene) -> tuple[str, ...]:
    """The templates that name every attribute of a scene with as many objects."""
    return SINGLE_PHRASINGS if len(scene.things) == 1 else PAIR_PHRASINGS


def short_phrasings(scene: Scene) -> tuple[str, ...]:
    """The templates that leave attributes out."""
    return SHORT_PHRASINGS if len(scene.things) == 1 else SHORT_PAIR_PHRASINGS


def write_caption(scene: Scene, phrasing: str, *, converse: bool = False) -> str:
    """Write the caption of a scene in a phrasing.

    Args:
        phrasing: a template, one of `phrasings(scene)` or `short_phrasings(scene)`.
        converse: name the second of two objects first ("b right of a" instead of "a left of b").
    """
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


def full_caption(scene: Scene) -> str:
    """The caption that names every attribute of a scene, in the first phrasing."""
    return write_caption(scene, phrasings(scene)[0])


def sample_caption(scene: Scene, rng: np.random.Generator, *, short_share: float = 0.0) -> str:
    """Write a caption in a random phrasing; with probability `short_share` it leaves attributes out."""
    choices = short_phrasings(scene) if rng.random() < short_share else phrasings(scene)
    return write_caption(scene, choices[rng.integers(len(choices))], converse=bool(rng.integers(2)))


def parse(caption: str) -> Scene | None:
    """Parse a caption in any of the phrasings; case, spaces and a final full stop do not matter.

    Returns the scene, in which attributes that the caption leaves out are None; or None if the caption is not in the grammar.
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
    """The regular expression that matches a phrasing, with a named group for each attribute."""

    def group(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"(?P<{name}>{'|'.join(VALUES[name.rstrip('2')])})"

    text = re.escape(phrasing.strip(" .")).replace(r"\{", "{").replace(r"\}", "}").replace(r"\ ", " ")
    text = re.sub(r"\ba ", "an? ", text)
    return re.compile(re.sub(r"\{(\w+)\}", group, text))


_PATTERNS = [
    _to_pattern(phrasing) for phrasing in (*SINGLE_PHRASINGS, *PAIR_PHRASINGS, *SHORT_PHRASINGS, *SHORT_PAIR_PHRASINGS)
]


def vocabulary() -> list[str]:
    """Every word and punctuation mark of the grammar, sorted."""
    templates = (*SINGLE_PHRASINGS, *PAIR_PHRASINGS, *SHORT_PHRASINGS, *SHORT_PAIR_PHRASINGS)
    text = " ".join([*templates, *(word for values in VALUES.values() for word in values), "an"])
    return sorted(set(re.findall(r"[a-z]+|[.,]", re.sub(r"\{\w+\}", " ", text))))
