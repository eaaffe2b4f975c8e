"""The pages of `image_scores/...`: one scorer's scores, and the near duplicates."""

from dataclasses import asdict

import numpy as np
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from pipelines.reports.charts import histograms, number
from pipelines.reports.page import page_head
from pipelines.reports.pictures import image_thumbnail, read_image_bytes
from pipelines.reports.rejects import read_rejects
from pipelines.reports.templates import render
from pipelines.score.config import NEAR_DUPLICATES, SEMANTIC_DUPLICATES
from pipelines.score.hash_pairs import HASH_BITS
from pipelines.tables.sampling import DEFAULT_SCOPE, ReportScope, read_light, spread
from pipelines.tables.schema import IMAGE_SCORES, Row, image_scores_path
from pipelines.tables.table import Table


def image_scores_report(dataset_uri: str, scorer: str, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of `image_scores/<scorer>`, as HTML: a histogram, the images with the lowest and highest scores, and rejects.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, image_scores_path(scorer), IMAGE_SCORES)
    light = read_light(table, ["id", "score"], sample)
    scores = light.rows["score"].to_numpy()
    shown = _extremes(table, sample)
    contents = read_image_bytes(dataset_uri, [(row["shard"], row["id"]) for row in shown])
    for row in shown:
        row["picture"] = image_thumbnail(contents, row["id"], f"score {row['score']:.3f}")
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


def duplicates_report(dataset_uri: str, scorer: str = NEAR_DUPLICATES, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of a table of near duplicates, as HTML: how many images look alike, and pairs of them side by side.

    Args:
        scorer: name of the table under image_scores/: NEAR_DUPLICATES or SEMANTIC_DUPLICATES.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, image_scores_path(scorer), IMAGE_SCORES)
    light = read_light(table, ["score", "detail"], sample)
    scores = light.rows.filter(pc.is_valid(light.rows["detail"]))["score"].to_numpy()
    by_embedding = scorer == SEMANTIC_DUPLICATES
    pairs = _pairs(table, sample)
    for row in pairs:
        row["twin_shard"], _, row["twin"] = row["detail"].partition("/")
        row["told"] = f"cosine {row['score']:.3f}" if by_embedding else f"{_distance(row['score'])} of 64 bits differ"
    wanted = [place for row in pairs for place in ((row["shard"], row["id"]), (row["twin_shard"], row["twin"]))]
    contents = read_image_bytes(dataset_uri, wanted)
    for row in pairs:
        row["left"] = image_thumbnail(contents, row["twin"], "stays")
        row["right"] = image_thumbnail(contents, row["id"], "its near duplicate")
    if by_embedding:
        chart = histograms({"": scores}, title="Likeness to the image that stays", x_label="cosine of the embeddings")
    else:
        chart = histograms({"": _distance(scores)}, title="Distance to the image that stays", x_label="bits of 64")
    manifest = table.require()
    return render(
        "duplicates.html.jinja",
        head=page_head(
            table,
            manifest,
            title="Near duplicates by embedding" if by_embedding else "Near duplicates",
            about="Images that look like another one, which stands for them.",
            facts={"Images": light.rows.num_rows, "Near duplicates": len(scores)},
            origin=asdict(manifest.identity()),
        ),
        scope=light.scope,
        chart=chart,
        pairs=pairs,
    )


def _extremes(table: Table, sample: ReportScope) -> list[Row]:
    """The rows with the lowest and the highest scores of a few shards, ascending, each with the name of its `shard`."""
    shards = table.list_shards()
    rows: list[Row] = []
    for index in spread(len(shards), sample.picture_shards):
        rows += [row | {"shard": shards[index]} for row in table.read_shard(shards[index]).to_pylist()]
    rows.sort(key=lambda row: (row["score"], row["id"]))
    half = min(sample.num_images // 2, len(rows) // 2)
    return rows[:half] + rows[len(rows) - half :]


def _pairs(table: Table, sample: ReportScope) -> list[Row]:
    """Near duplicates, spread evenly over a few shards, the least alike first, each with the name of its `shard`."""
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
    """The number of bits in which two hashes differ, from a score (1: none; 0: all)."""
    return np.round((1 - np.asarray(score)) * HASH_BITS).astype(int)
