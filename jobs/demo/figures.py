"""Figures of a dataset's captioners and of the selection: mean scores and, where the truth is known, exact captions."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.score.candidates import Candidates
from pipelines.score.config import SelectionConfig
from pipelines.score.selection import Caption, choose_caption
from pipelines.shapes.drawing import read_truth
from pipelines.shapes.grammar import parse
from pipelines.tables.schema import IMAGES, IMAGES_PATH
from pipelines.tables.table import Table

RANDOM, SELECTED = "random choice", "CLIP selection"


@dataclass(frozen=True, kw_only=True)
class CaptionFigures:
    """Figures of a captioner, or of a way to choose among the captioners; None where there is no value."""

    mean_score: float | None
    selected_share: float | None = None
    """Share of the images that train on this captioner's caption."""
    exact_share: float | None = None
    """Share of the captions that say all attributes of the drawn scene right."""


@dataclass(frozen=True)
class _Scored:
    captions: list[Caption]
    exact: list[bool] | None
    chosen: int | None


def caption_figures(candidates: Candidates, selection: SelectionConfig, *, seed: int = 0) -> dict[str, CaptionFigures]:
    """Figures of each captioner, of "random choice" (expected values) and of "CLIP selection" (one draw for each image)."""
    scores: dict[str, _Mean] = defaultdict(_Mean)
    exact: dict[str, _Mean] = defaultdict(_Mean)
    chosen: Counter[str] = Counter()
    num_images = 0
    for image in _scored_images(candidates, selection, seed):
        num_images += 1
        own_scores = [caption["clip_score"] for caption in image.captions]
        for index, caption in enumerate(image.captions):
            name = caption["captioner"]
            scores[name].add(own_scores[index])
            chosen[name] += index == image.chosen
            if image.exact is not None:
                exact[name].add(image.exact[index])
        scores[RANDOM].add(float(np.mean(own_scores)))
        if image.exact:
            exact[RANDOM].add(float(np.mean(image.exact)))
        if image.chosen is not None:
            scores[SELECTED].add(own_scores[image.chosen])
            if image.exact:
                exact[SELECTED].add(image.exact[image.chosen])
    return {
        name: CaptionFigures(
            mean_score=scores[name].value,
            selected_share=chosen[name] / num_images if name in chosen else None,
            exact_share=exact[name].value,
        )
        for name in [*sorted(chosen), RANDOM, SELECTED]
    }


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


def _scored_images(candidates: Candidates, selection: SelectionConfig, seed: int) -> Iterator[_Scored]:
    images = Table(candidates.dataset_uri, IMAGES_PATH, IMAGES)
    for shard in candidates.list_scored():
        truths = {row["id"]: read_truth(row["metadata"]) for row in images.read_shard(shard, ["id", "metadata"]).to_pylist()}
        for row_id, captions in candidates.read(shard).items():
            truth = truths[row_id]
            choice = choose_caption(captions, selection, seed=seed, epoch=0, sample_id=row_id)
            exact = None if truth is None else [parse(caption["caption"]) == truth for caption in captions]
            yield _Scored(captions, exact, None if choice is None else captions.index(choice))
