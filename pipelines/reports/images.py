"""The page of `images`."""

from collections import Counter

from pipelines.ingest.not_taken import describe_not_taken
from pipelines.ingest.sidecars import CAPTION_COUNTS
from pipelines.reports.charts import histograms
from pipelines.reports.page import table_page
from pipelines.reports.pictures import alt_text, thumbnail
from pipelines.reports.rejects import read_rejects
from pipelines.tables.sampling import DEFAULT_SCOPE, ReportScope, read_light, sample_rows
from pipelines.tables.schema import IMAGES, IMAGES_PATH
from pipelines.tables.table import Table


def images_report(dataset_uri: str, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of `images`, as HTML: sizes, formats, sample images with the captions they came with, and rejects.

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
        caption_keys={
            name.removeprefix(CAPTION_COUNTS): int(count)
            for name, count in table.require().figures.items()
            if name.startswith(CAPTION_COUNTS)
        },
        not_taken=describe_not_taken(table.require().figures),
        num_captions=sum(bool(caption) for caption in light.rows["caption"].to_pylist()),
        samples=rows,
    )
