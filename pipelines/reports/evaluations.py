"""The pages of `evaluations/<pictures>/<metric>`: a metric's figures, and what it says of the best and the worst pictures."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.evaluate.compare import Figure, bootstrap
from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.pictures import Pictures
from pipelines.evaluate.registry import metric_class
from pipelines.reports.charts import histograms
from pipelines.reports.page import page_head
from pipelines.reports.pictures import Picture, no_picture, thumbnail
from pipelines.reports.rejects import read_rejects
from pipelines.reports.templates import render
from pipelines.tables.sampling import DEFAULT_SCOPE, ReportScope, read_light, spread
from pipelines.tables.schema import FEATURES, Row
from pipelines.tables.table import Table


def evaluation_report(
    dataset_uri: str,
    pictures: Pictures,
    metric: str,
    figures: Mapping[str, float],
    *,
    reference: Pictures | None = None,
    sample: ReportScope = DEFAULT_SCOPE,
) -> str:
    """The page of a metric's judgements, as HTML.

    Args:
        pictures: that were judged.
        figures: the metric's, by name.
        reference: what the pictures were compared with, if that was pictures too.

    Raises MissingTableError if there is no such table.
    """
    kind = metric_class(metric)
    table = metric_table(dataset_uri, pictures.name, metric)
    manifest = table.require()
    light = read_light(table, ["id", *kind.numbers()], sample)
    intervals = bootstrap(kind, table)
    worst, best = read_judged(table, pictures, metric, sample)
    galleries = {"Best": best, "Worst": worst} if best else {"Drawn": worst}
    if reference is not None and not best:
        galleries["Reference"] = _read_reference(reference, len(worst), sample)
    return render(
        "evaluation.html.jinja",
        head=page_head(
            table,
            manifest,
            title=f"{pictures.name} by {metric}",
            about=" ".join((kind.__doc__ or "").split("\n\n")[0].replace("`", "").split()),
            facts={"Pictures": light.rows.num_rows},
            origin=asdict(manifest.identity()),
        ),
        scope=light.scope,
        figures=[(name, f"{value:.4g}", Figure(value, *intervals.get(name, ())).interval) for name, value in figures.items()],
        charts=[
            histograms({"": light.rows[name].to_numpy()}, title=name, x_label=f"{name} of a picture") for name in kind.numbers()
        ],
        galleries=galleries,
        refused=read_rejects(table, sample),
    )


def read_judged(table: Table, pictures: Pictures, metric: str, sample: ReportScope) -> tuple[list[Row], list[Row]]:
    """The worst pictures of a few shards, the worst first, and the best ones, the best first.

    If the metric ranks none, or all alike: the first ones, and no best. Each has `prompt`, `picture` and `told`: what the
    metric says of it.
    """
    kind = metric_class(metric)
    shards = table.list_shards()
    columns = [field.name for field in table.schema if field.type != FEATURES.type]  # thousands of numbers a row
    rows: list[Row] = []
    for shard in (shards[index] for index in spread(len(shards), sample.picture_shards)):
        for row in table.read_shard(shard, columns).to_pylist():
            rows.append({**row, "shard": shard, "rank": kind.rank(row)})
    rows.sort(key=lambda row: (row["rank"], row["id"]))
    half = min(sample.num_images // 2, len(rows) // 2)
    ranked = any(row["rank"] for row in rows) and rows[0]["rank"] != rows[-1]["rank"]
    best = rows[len(rows) - half :][::-1] if half else rows
    worst, best = (rows[:half], best) if ranked else (rows[: max(half, 1)], [])
    shown = [*worst, *best]
    contents: dict[tuple[str, str], bytes] = {}
    for shard in {row["shard"] for row in shown}:
        content = pictures.read_shard(shard).select(["id", "image_bytes"])
        wanted = content.filter(pc.is_in(content["id"], pa.array([row["id"] for row in shown if row["shard"] == shard])))
        contents |= {(shard, row["id"]): row["image_bytes"] for row in wanted.to_pylist()}
    cards = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "told": kind.describe(row),
            "picture": _picture(contents.get((row["shard"], row["id"])), row["prompt"] or row["id"]),
        }
        for row in shown
    ]
    return cards[: len(worst)], cards[len(worst) :]


def _picture(content: bytes | None, alt: str) -> Picture:
    return no_picture("not there any more") if content is None else thumbnail(content, alt)


def _read_reference(reference: Pictures, limit: int, sample: ReportScope) -> list[Row]:
    """A few of the pictures that were compared with."""
    found: list[Row] = []
    for shard in islice(reference.shards, sample.picture_shards):
        if len(found) == limit:
            break
        content = reference.read_shard(shard).select(["id", "prompt", "image_bytes"])
        found += content.take(pa.array(spread(content.num_rows, limit - len(found)), pa.int64())).to_pylist()
    return [{**row, "told": [], "picture": _picture(row["image_bytes"], row["prompt"] or row["id"])} for row in found]
