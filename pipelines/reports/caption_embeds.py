"""The page of `caption_embeds/...`."""

from pipelines.reports.charts import histograms
from pipelines.reports.page import table_page
from pipelines.reports.rejects import read_rejects
from pipelines.tables.sampling import DEFAULT_SCOPE, ReportScope, read_light
from pipelines.tables.schema import CAPTION_EMBEDS
from pipelines.tables.table import Table


def caption_embeds_report(dataset_uri: str, path: str, *, sample: ReportScope = DEFAULT_SCOPE) -> str:
    """The page of `caption_embeds/...`, as HTML: lengths, how many captions were cut, and rejects.

    Args:
        path: the table's path, such as "caption_embeds/gemma/llava".

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, path, CAPTION_EMBEDS)
    manifest = table.require()
    light = read_light(table, ["num_tokens"], sample)
    cut = manifest.figures.get("cut_captions.mean")
    return table_page(
        "caption_embeds.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title=f"Caption embeddings {path.removeprefix('caption_embeds/')}",
        about="What the text encoder makes of every caption: computed once, so that training need not.",
        dtype=manifest.config["dtype"],
        max_tokens=manifest.config["max_tokens"],
        num_cut=None if cut is None else round(cut * manifest.num_shards),
        lengths=histograms({"": light.rows["num_tokens"].to_numpy()}, title="Caption length", x_label="tokens"),
    )
