"""Reports on what is known of images alone: the scores of one scorer, and which images look alike."""

from collections import Counter
from dataclasses import asdict

import numpy as np
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from pipelines.reports.charts import histograms, number
from pipelines.reports.page import page_head, table_page
from pipelines.reports.pictures import alt_text, no_picture, read_image_bytes, thumbnail
from pipelines.reports.rejects import read_rejects
from pipelines.reports.templates import render
from pipelines.score.config import NEAR_DUPLICATES
from pipelines.score.duplicates import HASH_BITS
from pipelines.tables.sampling import DEFAULT_SCOPE, ReportScope, read_light, sample_rows, spread
from pipelines.tables.schema import (
    IMAGE_SCORES,
    IMAGES,
    IMAGES_PATH,
    Row,
    image_scores_path,
)
from pipelines.tables.table import Table


def image_scores_report(dataset_uri: str, scorer: str, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of `image_scores/<scorer>`: how the scores lie, the lowest and the highest with their images, rejects.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, image_scores_path(scorer), IMAGE_SCORES)
    light = read_light(table, ["id", "score"], sample)
    scores = light.rows["score"].to_numpy()
    shown = _extremes(table, sample)
    contents = read_image_bytes(dataset_uri, [(row["shard"], row["id"]) for row in shown])
    for row in shown:
        row["picture"] = _picture(contents, row["id"], f"score {row['score']:.3f}")
    facts = {"Rows": light.rows.num_rows, "Mean": number(float(scores.mean())) if len(scores) else "–"}
    manifest = table.require()
    return render(
        "image_scores.html.jinja",
        head=page_head(
            table,
            manifest,
            title=f"Image scores by {scorer}",
            about="A number for each image. Nothing is left out here: thresholds are set where the images are read.",
            facts=facts,
            origin=asdict(manifest.identity()),
        ),
        scope=light.scope,
        chart=histograms({"": scores}, title="Scores", x_label="score"),
        lowest=shown[: len(shown) // 2],
        highest=shown[len(shown) // 2 :][::-1],
        refused=read_rejects(table, sample),
    )


def duplicates_report(dataset_uri: str, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of `image_scores/near_duplicates`: how many images look alike, and pairs of them side by side.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, image_scores_path(NEAR_DUPLICATES), IMAGE_SCORES)
    light = read_light(table, ["score", "detail"], sample)
    found = light.rows.filter(pc.is_valid(light.rows["detail"]))
    pairs = _pairs(table, sample)
    distances = _distance(found["score"].to_numpy())
    for row in pairs:
        row["twin_shard"], _, row["twin"] = row["detail"].partition("/")
        row["distance"] = _distance(row["score"])
    wanted = [place for row in pairs for place in ((row["shard"], row["id"]), (row["twin_shard"], row["twin"]))]
    contents = read_image_bytes(dataset_uri, wanted)
    for row in pairs:
        row["left"] = _picture(contents, row["twin"], "stays")
        row["right"] = _picture(contents, row["id"], "its near duplicate")
    manifest = table.require()
    return render(
        "duplicates.html.jinja",
        head=page_head(
            table,
            manifest,
            title="Near duplicates",
            about="Images that look like another one, which stands for them.",
            facts={"Images": light.rows.num_rows, "Near duplicates": found.num_rows},
            origin=asdict(manifest.identity()),
        ),
        scope=light.scope,
        chart=histograms({"": distances}, title="Distance to the image that stays", x_label="bits of 64"),
        pairs=pairs,
    )


def _extremes(table: Table, sample: ReportScope) -> list[Row]:
    """The lowest and the highest scores of a few shards, ascending, with their shards."""
    shards = table.list_shards()
    rows: list[Row] = []
    for index in spread(len(shards), sample.picture_shards):
        rows += [row | {"shard": shards[index]} for row in table.read_shard(shards[index]).to_pylist()]
    rows.sort(key=lambda row: (row["score"], row["id"]))
    half = min(sample.num_images // 2, len(rows) // 2)
    return rows[:half] + rows[len(rows) - half :]


def _pairs(table: Table, sample: ReportScope) -> list[Row]:
    """Near duplicates with their shards, evenly from a few shards, the farthest first."""
    shards = table.list_shards()
    chosen = [shards[index] for index in spread(len(shards), sample.picture_shards)]
    rows: list[Row] = []
    for shard in chosen:
        content = table.read_shard(shard)
        content = content.filter(pc.is_valid(content["detail"]))
        places = np.array(spread(content.num_rows, -(-sample.num_images // len(chosen))), np.int64)
        rows += [row | {"shard": shard} for row in content.take(places).to_pylist()]
    return sorted(rows, key=lambda row: (row["score"], row["id"]))


def _distance(score: ArrayLike) -> np.ndarray:
    """Bits in which two hashes differ."""
    return np.round((1 - np.asarray(score)) * HASH_BITS).astype(int)


def _picture(contents: dict[str, bytes], image: str, alt: str) -> object:
    return thumbnail(contents[image], alt) if image in contents else no_picture("not in images/ any more")


def images_report(dataset_uri: str, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of `images`: sizes, formats, sample images with the captions they came with, rejects.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, IMAGES_PATH, IMAGES)
    light = read_light(table, ["width", "height", "format", "caption"], sample)
    width, height = (light.rows[name].to_numpy() for name in ("width", "height"))
    rows = [row for _, row in sample_rows(table, sample)]
    for row in rows:
        row["picture"] = thumbnail(row["image_bytes"], alt_text([row["caption"]], row["id"]))
    return table_page(
        "images.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title="Images",
        about="The images that everything else is made from: as they were found, each once.",
        charts=[
            histograms({"width": width, "height": height}, title="Width and height", x_label="pixels", colors={"height": "1"}),
            histograms({"": width * height / 1e6}, title="Size", x_label="megapixels"),
            histograms({"": width / height}, title="Aspect ratio", x_label="width / height"),
        ],
        formats=dict(Counter(light.rows["format"].to_pylist()).most_common()),
        num_captions=sum(bool(caption) for caption in light.rows["caption"].to_pylist()),
        samples=rows,
    )
