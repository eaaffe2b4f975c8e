"""What a training knows of its checkpoints' pictures: figures by metrics, and which checkpoint is the best.

Two files lie beside the checkpoints: `judgements.json` with an entry for each checkpoint that was to be judged, and
`best.json`, which names the best one. The training's driver alone writes them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipelines.storage.files import read_file, write_file
from pipelines.train.engine.checkpoint_places import BEST, checkpoint_uri
from sana_model.files.json_files import parse_json

JUDGEMENTS, BEST_FILE = "judgements.json", "best.json"
SKIPPED = "skipped"
"""The key among the problems of a checkpoint that was passed over."""


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """Which of the judged checkpoints is the best.

    Args:
        figure: its name in MLflow, such as clip_score, fid or accuracy.all.
        direction: whether the highest or the lowest value is the best.
    """

    figure: str
    direction: Literal["highest", "lowest"]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The judgement of one checkpoint.

    step: of the checkpoint.
    figures: by their names; without those that could not be computed.
    problems: why something could not be judged, by the metric's name; "pictures": none were drawn; "skipped": not even tried.
    seconds: of each part: "pictures" (loading the pipeline, drawing) and each metric, with its model's loading; and "total".
    where: the node, and the devices, that judged.
    held_seconds: how long the training's steps were held to hand over the checkpoint.
    """

    step: int
    figures: Mapping[str, float] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    where: str = ""
    held_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint:
    """The best of the checkpoints, as `best.json` names it."""

    step: int
    figure: str
    direction: str
    value: float


def read_judgements(root_uri: str) -> dict[int, Judgement]:
    """The judgements beside the checkpoints in a folder, by step. Raises StorageError; ValueError if the file is damaged."""
    entries = _read(f"{root_uri}/{JUDGEMENTS}") or []
    judgements = [_make(Judgement, entry, f"{root_uri}/{JUDGEMENTS}") for entry in entries]
    return {judgement.step: judgement for judgement in judgements}


def write_judgements(root_uri: str, judgements: Iterable[Judgement]) -> None:
    """Write the judgements beside the checkpoints. Raises StorageError."""
    entries = [asdict(judgement) for judgement in sorted(judgements, key=lambda judgement: judgement.step)]
    write_file(f"{root_uri}/{JUDGEMENTS}", (json.dumps(entries, indent=2) + "\n").encode())


def read_best(root_uri: str) -> BestCheckpoint | None:
    """The best of the checkpoints in a folder, if one was chosen. Raises StorageError; ValueError if the file is damaged."""
    found = _read(f"{root_uri}/{BEST_FILE}")
    return None if found is None else _make(BestCheckpoint, found, f"{root_uri}/{BEST_FILE}")


def write_best(root_uri: str, best: BestCheckpoint) -> None:
    """Let `best.json` name this checkpoint. Raises StorageError."""
    write_file(f"{root_uri}/{BEST_FILE}", (json.dumps(asdict(best), indent=2) + "\n").encode())


def choose_best(judgements: Iterable[Judgement], config: BestConfig) -> BestCheckpoint | None:
    """The best of the judged checkpoints, the earliest of several; None if none has the figure."""
    sign = 1 if config.direction == "highest" else -1
    values = {one.step: one.figures[config.figure] for one in judgements if config.figure in one.figures}
    if not values:
        return None
    step = max(values, key=lambda step: (sign * values[step], -step))
    return BestCheckpoint(step=step, figure=config.figure, direction=config.direction, value=values[step])


def find_named(uri: str) -> str:
    """The URI of a checkpoint: `<folder>/best` is that which `best.json` names; any other is returned as it is.

    Raises FileNotFoundError if none was chosen.
    """
    root_uri, _, name = uri.rstrip("/").rpartition("/")
    if name != BEST:
        return uri
    best = read_best(root_uri)
    if best is None:
        raise FileNotFoundError(
            f"{uri}: no checkpoint was chosen as the best there; a training with validation.best chooses one"
        )
    return checkpoint_uri(root_uri, best.step)


def _read(uri: str) -> Any:
    try:
        return parse_json(read_file(uri), uri)
    except FileNotFoundError:
        return None


def _make(kind: type[Any], entry: Any, uri: str) -> Any:
    try:
        return kind(**entry)
    except TypeError as error:
        raise ValueError(f"{uri} is damaged ({error}): move it away") from error
