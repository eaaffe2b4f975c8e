"""GenEval: whether pictures show the objects that their prompts name, in number, color and place."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pipelines.evaluate.geneval.config import GenEvalConfig
from pipelines.evaluate.geneval.prompts import PromptReader, request_of
from pipelines.evaluate.geneval.rules import (
    CORRECT_PICTURES,
    CORRECT_PROMPTS,
    Detection,
    Kept,
    Request,
    TaskCounts,
    Verdict,
    judge,
    keep_detections,
    wanted_objects,
)
from pipelines.evaluate.metric import Metric, iter_shards
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.table import Table

if TYPE_CHECKING:
    from PIL import Image


class GenEval(Metric[GenEvalConfig]):
    """Ghosh et al. 2023 (arXiv 2310.11513); published results are over 553 prompts with 4 pictures each.

    What a prompt asks for is taken from its metadata (`tag`, `include`, `exclude`) if the prompt set has them, and otherwise
    read from its wording ("a photo of two dogs"). Figures: `geneval`, the mean of the tasks' shares of correct pictures,
    `geneval.<task>` of each, and the shares of correct pictures and prompts.
    """

    name: ClassVar = "geneval"
    more_models: ClassVar = ("clip",)

    def __init__(self, config: GenEvalConfig):
        from pipelines.evaluate.geneval.colors import ColorNamer
        from pipelines.evaluate.geneval.detector import Detector
        from pipelines.workers.clip import ClipModel

        self.config = config
        self.detector = Detector(
            config.model,
            revision=config.revision,
            device=config.device,
            dtype=config.dtype,
            short_side=config.short_side,
            long_side=config.long_side,
            min_score=min(config.thresholds.detection, config.thresholds.counting),
        )
        clip = ClipModel(config.clip, revision=config.clip_revision, dtype=config.dtype, device=config.device)
        self.colors = ColorNamer(clip, config.colors, config.color_templates, config.background)
        self.reader = PromptReader(self.detector.names, config.colors)

    def prepare(self, row: Row) -> tuple["Image.Image", Any]:
        image: Image.Image = super().prepare(row)
        return image, self.detector.prepare(image)

    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        requests = [self._request(row) for row in rows]
        images = [row["picture"][0] for row in rows]
        found = self.detector.detect([row["picture"][1] for row in rows], [(image.height, image.width) for image in images])
        kept = [self._kept(objects, request) for objects, request in zip(found, requests, strict=True)]
        named = self._name_colors(images, kept, requests)
        return [
            request if isinstance(request, RowRefused) else self._row(own, request, colors)
            for request, own, colors in zip(requests, kept, named, strict=True)
        ]

    def _request(self, row: Row) -> Request | RowRefused:
        """What a picture's prompt asks for, or why that cannot be judged."""
        try:
            request = request_of(row["metadata"]) if "include" in row["metadata"] else self.reader.read(row["prompt"])
        except (ValueError, LookupError, TypeError) as error:
            return RowRefused("bad_metadata", f"not of GenEval's form (tag, include, exclude): {type(error).__name__}: {error}")
        if request is None:
            told = "neither its metadata nor its wording (a photo of a red cup and a green bench) name classes of the detector"
            return RowRefused("no_request", f"{told}: {row['prompt'][:200]!r}")
        if unknown := request.names - set(self.detector.names):
            return RowRefused("unknown_class", f"{self.config.model} does not know {', '.join(sorted(unknown))}")
        if unknown := {clause.color for clause in request.include if clause.color} - set(self.config.colors):
            return RowRefused("unknown_color", f"{', '.join(sorted(unknown))} is not among colors={list(self.config.colors)}")
        return request

    def _kept(self, objects: list[Detection], request: Request | RowRefused) -> Kept:
        return {} if isinstance(request, RowRefused) else keep_detections(objects, request.task, self.config.thresholds)

    def _name_colors(
        self, images: list["Image.Image"], kept: list[Kept], requests: list[Request | RowRefused]
    ) -> list[list[list[str] | None]]:
        """For each picture, of each clause of its request: the colors of its objects, or None where none are asked for."""
        asked: list[list[list[Detection] | None]] = [
            []
            if isinstance(request, RowRefused)
            else [wanted_objects(own, clause) if clause.color else None for clause in request.include]
            for own, request in zip(kept, requests, strict=True)
        ]
        flat = [
            (image, found) for image, groups in zip(images, asked, strict=True) for group in groups for found in group or ()
        ]
        names = iter(self.colors.name(flat))
        return [[None if group is None else [next(names) for _ in group] for group in groups] for groups in asked]

    def _row(self, kept: Kept, request: Request, colors: list[list[str] | None]) -> Row:
        verdict: Verdict = judge(kept, request, colors, self.config.thresholds)
        named = {
            id(found): color
            for clause, own in zip(request.include, colors, strict=True)
            for found, color in zip(wanted_objects(kept, clause) or (), own or (), strict=False)
        }
        objects = [found for group in kept.values() for found in group]
        return {
            "task": request.task,
            "correct": verdict.correct,
            "faults": list(verdict.faults),
            "objects": [
                {"name": found.name, "score": found.score, "box": list(found.box), "color": named.get(id(found))}
                for found in objects
            ],
        }

    @classmethod
    def rank(cls, row: Row) -> tuple[float, ...]:
        """Correct pictures first, then those with the fewest faults."""
        return float(row["correct"]), -float(len(row["faults"]))

    @classmethod
    def describe(cls, row: Row) -> list[str]:
        found = Counter(" ".join(filter(None, (one["color"], one["name"]))) for one in row["objects"])
        seen = ", ".join(f"{count} {name}" for name, count in found.items()) or "nothing"
        return [f"{row['task']}: {'correct' if row['correct'] else 'wrong'}", *row["faults"], f"found: {seen}"]

    @classmethod
    def scores(cls, table: Table) -> Iterator[tuple[str, str, float]]:
        prompts: dict[str, bool] = {}
        for shard in iter_shards(table, ["prompt", "task", "correct"]):
            for row in shard.to_pylist():
                for name in (row["task"], CORRECT_PICTURES):
                    yield f"{cls.name}.{name}", row["prompt"], float(row["correct"])
                prompts[row["prompt"]] = prompts.get(row["prompt"], False) or row["correct"]
        yield from ((f"{cls.name}.{CORRECT_PROMPTS}", prompt, float(correct)) for prompt, correct in prompts.items())

    @classmethod
    def means_of(cls, figures: Iterable[str]) -> dict[str, list[str]]:
        others = {f"{cls.name}.{name}" for name in (CORRECT_PICTURES, CORRECT_PROMPTS)}
        return {cls.name: [name for name in figures if name not in others]}

    @classmethod
    def summarize(cls, table: Table, config: GenEvalConfig) -> dict[str, float]:
        counts = TaskCounts()
        for shard in iter_shards(table, ["prompt", "task", "correct"]):
            for row in shard.to_pylist():
                counts.add(row["task"], row["prompt"], row["correct"])
        return {cls.name if name == "score" else f"{cls.name}.{name}": value for name, value in counts.figures().items()}
