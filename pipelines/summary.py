"""What a dataset's scores say of its captioners and of the selection; with known truth, how often captions are exact."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.schema import IMAGES, IMAGES_PATH, SCORES, scores_path
from pipelines.select import SelectionConfig, choose_caption
from pipelines.shapes import Scene, parse
from pipelines.stage import Row
from pipelines.tables import Table


@dataclass(frozen=True, kw_only=True)
class CaptionFigures:
    """Of a captioner, or of a way to choose among captioners' captions; None where there is nothing to tell."""

    mean_score: float | None
    selected_share: float | None = None
    """Share of the images that train on this captioner's caption."""
    exact_share: float | None = None
    """Share of the captions that say all attributes of the drawn scene right."""


@dataclass(frozen=True)
class _Scored:
    captions: list[Row]
    exact: list[bool] | None
    chosen: int | None


def caption_figures(dataset_uri: str, scorer: str, selection: SelectionConfig, *, seed: int = 0) -> dict[str, CaptionFigures]:
    """Figures by captioner, then of "random choice" (its expected values) and of "CLIP selection" (one draw for each image)."""
    images = list(_scored_images(dataset_uri, scorer, selection, seed))
    scores: dict[str, list[float]] = defaultdict(list)
    exact: dict[str, list[bool]] = defaultdict(list)
    chosen: Counter[str] = Counter()
    for image in images:
        for index, caption in enumerate(image.captions):
            scores[caption["captioner"]].append(caption["clip_score"])
            chosen[caption["captioner"]] += index == image.chosen
            if image.exact is not None:
                exact[caption["captioner"]].append(image.exact[index])
    figures = {
        name: CaptionFigures(
            mean_score=_mean(scores[name]), selected_share=chosen[name] / len(images), exact_share=_mean(exact[name])
        )
        for name in sorted(scores)
    }
    known = [image for image in images if image.exact is not None]
    picked = [(image, image.chosen) for image in images if image.chosen is not None]
    figures["random choice"] = CaptionFigures(
        mean_score=_mean([np.mean([caption["clip_score"] for caption in image.captions]) for image in images]),
        exact_share=_mean([np.mean(image.exact) for image in known if image.exact]),
    )
    figures["CLIP selection"] = CaptionFigures(
        mean_score=_mean([image.captions[index]["clip_score"] for image, index in picked]),
        exact_share=_mean([image.exact[index] for image, index in picked if image.exact]),
    )
    return figures


def _mean(values: Sequence[float | np.floating]) -> float | None:
    return float(np.mean(np.asarray(values))) if values else None


def _scored_images(dataset_uri: str, scorer: str, selection: SelectionConfig, seed: int) -> Iterator[_Scored]:
    images, table = Table(dataset_uri, IMAGES_PATH, IMAGES), Table(dataset_uri, scores_path(scorer), SCORES)
    for shard in table.list_shards():
        truths = {row["id"]: _truth(row["metadata"]) for row in images.read_shard(shard, ["id", "metadata"]).to_pylist()}
        for row in table.read_shard(shard).to_pylist():
            captions, truth = row["captions"], truths[row["id"]]
            choice = choose_caption(captions, selection, seed=seed, epoch=0, sample_id=row["id"])
            exact = None if truth is None else [parse(caption["caption"]) == truth for caption in captions]
            yield _Scored(captions, exact, None if choice is None else captions.index(choice))


def _truth(metadata: str | None) -> Scene | None:
    """The scene that `shapes.write_folder` noted beside the image."""
    truth = json.loads(metadata).get("truth") if metadata else None
    return parse(truth) if isinstance(truth, str) else None
