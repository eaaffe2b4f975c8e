"""GenEval's rules: whether the objects that a detector found are those that a prompt asks for. Pure functions.

Source: Ghosh et al., "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment" (arXiv 2310.11513), and the
code published with it. Boxes are (left, top, right, bottom) in pixels, y downwards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
COUNTING = "counting"
CORRECT_PICTURES, CORRECT_PROMPTS = "correct_pictures", "correct_prompts"
"""The figures that are shares of all pictures, and of all prompts: of a prompt any picture may be the correct one."""
NO_OFFSET = 1e-3  # pixels

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The published thresholds.

    Args:
        detection: objects must have a higher score.
        counting: the same, for prompts of the counting task.
        max_objects: of one class, those with the highest scores.
        max_overlap: an object that overlaps a better one of its class by this much (intersection over union) or more is
            dropped; 1 drops none.
        position: the share of both objects' sizes by which their centers must lie apart before the offset counts.
    """

    detection: float = 0.3
    counting: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position: float = 0.1

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("detection", "counting", "max_overlap", "position")}
        if wrong := {name: value for name, value in shares.items() if not 0 <= value <= 1}:
            raise ValueError(f"thresholds {wrong} must be in [0, 1]")
        if self.max_objects < 1:
            raise ValueError(f"max_objects={self.max_objects} must be at least 1")


@dataclass(frozen=True)
class Detection:
    """An object that a detector found. `mask` is (H, W) bool in pixels of the image; None if the detector makes none."""

    name: str
    score: float
    box: Box
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Clause:
    """Objects that a prompt asks for: `count` of the class `name`, each of `color` and each at `position` if these are given.

    `position` is one of POSITIONS and the index of the clause whose objects it refers to, which must come before.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for: all clauses of `include`, and for no clause of `exclude` that many objects or more."""

    task: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()

    def __post_init__(self) -> None:
        for index, clause in enumerate(self.include):
            if clause.position is not None and not 0 <= clause.position[1] < index:
                raise ValueError(
                    f"clause {index} has a place relative to clause {clause.position[1]}, which must come before it"
                )

    @property
    def names(self) -> set[str]:
        """The classes that it is about."""
        return {clause.name for clause in (*self.include, *self.exclude)}


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what was asked for, and each fault that was found."""

    correct: bool
    faults: tuple[str, ...] = ()


Kept = Mapping[str, Sequence[Detection]]
"""The detections that count, by class, the highest score first."""


def keep_detections(detections: Sequence[Detection], task: str, thresholds: Thresholds = Thresholds()) -> Kept:
    """Of each class the detections that count: over the task's threshold, at most `max_objects`, without overlaps."""
    least = np.float32(thresholds.counting if task == COUNTING else thresholds.detection)
    kept: dict[str, list[Detection]] = {}
    for name in dict.fromkeys(detection.name for detection in detections):
        own = [detection for detection in detections if detection.name == name]
        order = np.argsort([detection.score for detection in own], kind="stable")[::-1]
        best = [own[index] for index in order if np.float32(own[index].score) > least][: thresholds.max_objects]
        if best:
            kept[name] = _without_overlaps(best, thresholds.max_overlap)
    return kept


def _without_overlaps(detections: list[Detection], max_overlap: float) -> list[Detection]:
    if max_overlap == 1:
        return detections
    kept: list[Detection] = []
    for detection in detections:
        if all(overlap(detection.box, better.box) < max_overlap for better in kept):
            kept.append(detection)
    return kept


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes whose right and bottom pixels count as inside; 0 if both are empty."""
    shared = _area(
        (max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3])),
    )
    union = _area(first) + _area(second) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def relations(box: Box, other: Box, threshold: float = Thresholds.position) -> set[str]:
    """Where `box` lies relative to `other`: those of POSITIONS that hold, none if the centers are too close.

    From the offset of the centers, `threshold` times the sum of both sizes is taken off in each direction; what is left must be
    over half of the whole offset's length.
    """
    corners = np.array([box, other], dtype=np.float64).reshape(2, 2, 2)  # box, corner, (x, y)
    centers, sizes = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    left_over = np.maximum(np.abs(offset) - threshold * sizes.sum(0), 0) * np.sign(offset)
    if (np.abs(left_over) < NO_OFFSET).all():
        return set()
    x, y = left_over / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, does in holds.items() if does}


def wanted_objects(kept: Kept, clause: Clause) -> list[Detection] | None:
    """The objects that a clause is checked on: its `count` best of its class; None if there are fewer."""
    found = list(kept.get(clause.name, ()))[: clause.count]
    return found if len(found) == clause.count else None


def judge(
    kept: Kept,
    request: Request,
    colors: Sequence[Sequence[str] | None],
    thresholds: Thresholds = Thresholds(),
) -> Verdict:
    """Check every clause of a request.

    Args:
        colors: for each clause of `include` the colors of its `wanted_objects`, in order; read only where the clause has a
            color and its objects are there.
    """
    faults: list[str] = []
    groups: list[list[Detection] | None] = []  # the objects of each clause; None if it does not hold
    for clause, named in zip(request.include, colors, strict=True):
        objects = wanted_objects(kept, clause)
        if objects is None:
            fault: str | None = f"expected {clause.count} {clause.name}, found {len(kept.get(clause.name, ()))}"
        else:
            fault = _color_fault(clause, named) or _position_fault(clause, objects, groups, thresholds.position)
        faults += [fault] if fault else []
        groups.append(None if fault else objects)
    for clause in request.exclude:
        found = len(kept.get(clause.name, ()))
        if found >= clause.count:
            faults.append(f"expected fewer than {clause.count} {clause.name}, found {found}")
    return Verdict(not faults, tuple(faults))


def _color_fault(clause: Clause, named: Sequence[str] | None) -> str | None:
    if clause.color is None:
        return None
    assert named is not None
    if list(named).count(clause.color) >= clause.count:
        return None
    return f"expected {clause.count} {clause.color} {clause.name}, found {', '.join(named)}"


def _position_fault(
    clause: Clause, objects: Sequence[Detection], groups: Sequence[Sequence[Detection] | None], threshold: float
) -> str | None:
    if clause.position is None:
        return None
    wanted, index = clause.position
    targets = groups[index]
    if targets is None:
        return f"nothing is there for {clause.name} to be {wanted}"
    for found in objects:
        for target in targets:
            true = relations(found.box, target.box, threshold)
            if wanted not in true:
                return f"expected {clause.name} {wanted} {target.name}, found {' and '.join(sorted(true)) or 'neither side'}"
    return None


@dataclass
class TaskCounts:
    """Counts of judged pictures, filled picture by picture. `pictures` and `correct` are by task."""

    pictures: dict[str, int] = field(default_factory=dict)
    correct: dict[str, int] = field(default_factory=dict)
    prompts: dict[str, bool] = field(default_factory=dict)  # whether any picture of the prompt is correct

    def add(self, task: str, prompt: str, correct: bool) -> None:
        self.pictures[task] = self.pictures.get(task, 0) + 1
        self.correct[task] = self.correct.get(task, 0) + correct
        self.prompts[prompt] = self.prompts.get(prompt, False) or correct

    def figures(self) -> dict[str, float]:
        """The share of correct pictures of each task, in the published order, and `score`, the mean over the tasks.

        `correct_pictures` and `correct_prompts` (any picture of the prompt is correct) are shares of all. Empty if nothing was
        counted.
        """
        if not self.pictures:
            return {}
        named = [*(task for task in TASKS if task in self.pictures), *sorted(set(self.pictures) - set(TASKS))]
        shares = {task: self.correct[task] / self.pictures[task] for task in named}
        return {
            "score": sum(shares.values()) / len(shares),
            **shares,
            CORRECT_PICTURES: sum(self.correct.values()) / sum(self.pictures.values()),
            CORRECT_PROMPTS: sum(self.prompts.values()) / len(self.prompts),
        }
