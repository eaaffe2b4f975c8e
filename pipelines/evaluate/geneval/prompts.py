"""What GenEval's prompts ask for: read from their wording, or from the metadata that are published with them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluate.geneval.rules import COLORS, POSITIONS, TASKS, Clause, Request

# fmt: off
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
"""The classes of COCO, in COCO's order, as GenEval's prompts call them."""
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class PromptReader:
    """Reads prompts in GenEval's wording, such as "a photo of a red cup and a green bench".

    Args:
        names: the classes that prompts may name.
        colors: the colors that they may name.
    """

    def __init__(self, names: Sequence[str] = NAMES, colors: Sequence[str] = COLORS):
        name, color = _one_of(names), _one_of(colors)
        self.singular = {f"{_plural(word)}": word for word in names}
        thing, colored = rf"an? ({name})", rf"an? ({color}) ({name})"
        self.forms = {
            "single_object": re.compile(f"a photo of {thing}"),
            "two_object": re.compile(f"a photo of {thing} and {thing}"),
            "counting": re.compile(f"a photo of ({_one_of(NUMBERS)}) ({_one_of(self.singular)})"),
            "colors": re.compile(f"a photo of {colored}"),
            "position": re.compile(f"a photo of {thing} ({_one_of(POSITIONS)}) {thing}"),
            "color_attr": re.compile(f"a photo of {colored} and {colored}"),
        }

    def read(self, prompt: str) -> Request | None:
        """What a prompt asks for; None if it is not in this wording."""
        for task, form in self.forms.items():
            if match := form.fullmatch(prompt.strip()):
                return self._request(task, match.groups())
        return None

    def _request(self, task: str, words: tuple[str, ...]) -> Request:
        if task == "counting":
            name, count = self.singular[words[1]], NUMBERS.index(words[0]) + 2
            return Request(task, (Clause(name, count),), (Clause(name, count + 1),))
        if task == "position":
            first, position, second = words
            return Request(task, (Clause(second, 1), Clause(first, 1, position=(position, 0))))
        if task in ("colors", "color_attr"):
            pairs = zip(words[::2], words[1::2], strict=True)
            return Request(task, tuple(Clause(name, 1, color) for color, name in pairs))
        return Request(task, tuple(Clause(name, 1) for name in words))


def _one_of(words: Sequence[str] | dict[str, str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


def _plural(name: str) -> str:
    """As the prompts were made: "buses", but also "scissorses" and "sandwichs"."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def request_of(metadata: Mapping[str, Any]) -> Request:
    """What a prompt asks for, from its object in the published `evaluation_metadata.jsonl`: `tag`, `include`, maybe `exclude`.

    Raises ValueError, LookupError or TypeError if it is not of this form.
    """
    if metadata["tag"] not in TASKS:
        raise ValueError(f"tag {metadata['tag']!r} is none of {', '.join(TASKS)}")
    return Request(
        metadata["tag"],
        tuple(_clause(clause) for clause in metadata["include"]),
        tuple(_clause(clause) for clause in metadata.get("exclude", [])),
    )


def _clause(content: Mapping[str, Any]) -> Clause:
    position = content.get("position")
    if position is not None and position[0] not in POSITIONS:
        raise ValueError(f"position {position[0]!r} is none of {', '.join(POSITIONS)}")
    color = content.get("color")
    return Clause(content["class"], int(content["count"]), color, (position[0], int(position[1])) if position else None)
