"""Parts that several pages share: the head, the frame of a table's page, and the texts and colors of captions."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np

from pipelines.reports.rejects import Rejects
from pipelines.reports.templates import render
from pipelines.tables.identity import Manifest
from pipelines.tables.sampling import LightRows
from pipelines.tables.schema import ORIGINAL_CAPTIONER, Row
from pipelines.tables.table import Table

NUM_COLORS = 8
"""Colors in the style sheet; `str(0)` to `str(NUM_COLORS - 1)` name them."""


def page_head(
    table: Table,
    manifest: Manifest,
    *,
    title: str,
    about: str,
    facts: Mapping[str, object],
    kind: str = "",
    notice: str = "",
    origin: Mapping[str, object] | None = None,
) -> Row:
    """Build the `head` that every page template takes.

    Args:
        table: names the dataset, and the page's kind unless `kind` does.
        manifest: gives the fingerprint in the head.
        about: one sentence below the title.
        facts: name and value of each entry in the head; the fingerprint and the time of writing follow them.
        kind: small text above the title.
        notice: a warning below the facts.
        origin: the configuration, shown as JSON at the end of the page.
    """
    made = {"Fingerprint": manifest.fingerprint[:12], "Made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    return {
        "kind": kind or table.path,
        "title": title,
        "about": about,
        "dataset_uri": table.dataset_uri,
        "facts": {**facts, **made},
        "notice": notice,
        "origin": json.dumps(origin, indent=2, ensure_ascii=False, default=str) if origin else "",
    }


def table_page(
    template: str, table: Table, light: LightRows, refused: Rejects, *, title: str, about: str, **content: object
) -> str:
    """Render the page of one table: its head, the values in `content` that `template` asks for, and its rejects.

    The head counts rows and rejects. If only some shards were read, it shows the manifest's counts where they are larger.
    Raises MissingTableError if the table has no manifest.
    """
    manifest = table.require()
    num_rows, num_rejects = light.rows.num_rows, sum(refused.counts.values())
    if light.num_shards < light.total_shards:
        num_rows, num_rejects = max(num_rows, manifest.num_rows), max(num_rejects, manifest.num_rejects)
    facts = {"Rows": num_rows, "Rejects": num_rejects, "Shards": light.total_shards}
    head = page_head(table, manifest, title=title, about=about, facts=facts, origin=asdict(manifest.identity()))
    return render(
        template, head=head, num_rows=num_rows, num_read=light.rows.num_rows, scope=light.scope, refused=refused, **content
    )


def caption_texts(row: Row) -> list[str | None]:
    """The texts of the captions that compete for an image."""
    return [entry["caption"] for entry in row["captions"]]


def with_score_texts(captions: list[Row]) -> list[Row]:
    """Copies of competing captions with `score`, the CLIP score as text."""
    return [entry | {"score": format_mean([entry["clip_score"]])} for entry in captions]


def format_mean(values: Sequence[float] | np.ndarray) -> str:
    """The mean of the finite values with two decimal places, or a dash if there are none."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return f"{array.mean():.2f}" if array.size else "–"


def captioner_colors(captioners: Iterable[str]) -> dict[str, str]:
    """A color for each captioner: the original captions come first, the others follow by name."""
    names = sorted(set(captioners), key=lambda name: (name != ORIGINAL_CAPTIONER, name))
    return {name: str(index % NUM_COLORS) for index, name in enumerate(names)}
