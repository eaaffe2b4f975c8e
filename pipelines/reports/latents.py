"""The page of `latents/...`."""

from collections import Counter
from collections.abc import Callable

import numpy as np
from markupsafe import Markup
from PIL import Image

from pipelines.extract.config import Dtype
from pipelines.extract.run import read_latents
from pipelines.reports.charts import histograms, number, spreads
from pipelines.reports.page import format_mean, table_page
from pipelines.reports.pictures import thumbnail, with_pictures
from pipelines.reports.rejects import read_rejects
from pipelines.tables.sampling import DEFAULT_SCOPE, ReportScope, read_light, sample_rows
from pipelines.tables.schema import LATENTS
from pipelines.tables.table import Table

DecodeLatents = Callable[[np.ndarray], Image.Image]
"""Decodes the latents of one image, (channels, height, width) float32."""


def latents_report(
    dataset_uri: str, path: str, decode: DecodeLatents | None = None, *, sample: ReportScope = DEFAULT_SCOPE
) -> str:
    """The page of `latents/...`, as HTML: statistics of the values, buckets, and images.

    Args:
        path: the table's path, such as "latents/dc-ae-512".
        decode: if given, each image is shown beside what its latents decode to.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, path, LATENTS)
    dtype: Dtype = table.require().config["dtype"]
    light = read_light(table, ["bucket"], sample)
    rows = with_pictures(dataset_uri, sample_rows(table, sample), lambda row: [])
    latents = [read_latents(row, dtype).float().numpy() for row in rows]
    if decode is not None:
        for row, values in zip(rows, latents, strict=True):
            row["decoded"] = thumbnail(decode(values), f"decoded: {row['picture'].alt}")
    flat = np.concatenate([values.reshape(len(values), -1) for values in latents], axis=1) if latents else np.zeros((1, 0))
    finite = np.ma.masked_invalid(flat)
    return table_page(
        "latents.html.jinja",
        table,
        light,
        read_rejects(table, sample),
        title=f"Latents {path.removeprefix('latents/')}",
        about="Images as the autoencoder compresses them. Captions join them when a training reads them.",
        dtype=dtype,
        num_measured=len(rows),
        figures=table.require().figures,
        num_bad=int(flat.size - finite.count()),
        mean=format_mean(flat),
        std=number(float(finite.std())) if finite.count() else "–",
        values=histograms({"": flat.ravel()}, title="Values of latents", x_label="value"),
        channels=_channels(finite),
        buckets=dict(Counter(light.rows["bucket"].to_pylist()).most_common()),
        decoded=decode is not None,
        samples=[{"decoded": None} | row for row in rows],
    )


def _channels(values: np.ma.MaskedArray) -> Markup:
    """The chart of each channel's mean and spread; `values` has shape (channels, values)."""
    mean, std = (np.ma.filled(measure, 0.0) for measure in (values.mean(1), values.std(1)))
    return spreads(mean, std, title="Channels: mean ± standard deviation", x_label="channel", y_label="value")
