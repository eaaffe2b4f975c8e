"""What every page of a table has: its head, counts and rejects, and the formats and colors that pages share."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np

from pipelines.reports.rejects import Rejects
from pipelines.reports.templates import render
from pipelines.tables.identity import Manifest
from pipelines.tables.sampling import LightRows
from pipelines.tables.schema import (
    ORIGINAL_CAPTIONER,
    Row,
)
from pipelines.tables.table import Table

NUM_COLORS = 8


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
    """What every page begins with, and `origin`, the configuration, that it ends with."""
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
    return [entry["caption"] for entry in row["captions"]]


def with_score_texts(captions: list[Row]) -> list[Row]:
    return [entry | {"score": format_mean([entry["clip_score"]])} for entry in captions]


def format_mean(values: Sequence[float] | np.ndarray) -> str:
    """With two digits, over what is finite."""
    array = np.asarray(values, dtype=float)
    array = array[np.isfinite(array)]
    return f"{array.mean():.2f}" if array.size else "–"


def captioner_colors(captioners: Iterable[str]) -> dict[str, str]:
    """A colour's number for each: the original captions first, then by name."""
    names = sorted(set(captioners), key=lambda name: (name != ORIGINAL_CAPTIONER, name))
    return {name: str(index % NUM_COLORS) for index, name in enumerate(names)}
