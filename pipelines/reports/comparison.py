"""The pages that compare samples tables: figures and pictures side by side, and a blind vote."""

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from markupsafe import Markup

from pipelines.evaluate.compare import Comparison, figures_table
from pipelines.reports.pictures import Picture, thumbnail
from pipelines.reports.templates import render
from pipelines.tables.schema import SAMPLES, Row, samples_path
from pipelines.tables.table import Table

Pair = tuple[str, list[Picture]]
"""A prompt, and the picture that each table has of it."""


def read_pairs(dataset_uri: str, names: Sequence[str], limit: int) -> list[Pair]:
    """The first prompts that all tables have pictures of, at most `limit` of them; of a prompt's pictures, first with first."""
    found: list[dict[tuple[str, int], bytes]] = []
    for place, name in enumerate(names):
        wanted = None if place == 0 else found[0].keys()
        found.append(_first_pictures(Table(dataset_uri, samples_path(name), SAMPLES), limit if place == 0 else None, wanted))
    shared = [key for key in found[0] if all(key in other for other in found)]
    return [(key[0], [thumbnail(pictures[key], key[0]) for pictures in found]) for key in shared]


def _first_pictures(table: Table, limit: int | None, wanted: object) -> dict[tuple[str, int], bytes]:
    """Encoded pictures by prompt and number within the prompt, until there are `limit`, or all that are `wanted`."""
    seen: Counter[str] = Counter()
    found: dict[tuple[str, int], bytes] = {}
    for shard in table.list_shards():
        rows: list[Row] = table.read_shard(shard, ["prompt", "image_bytes"]).to_pylist()
        for row in rows:
            key = (row["prompt"], seen[row["prompt"]])
            seen[row["prompt"]] += 1
            if wanted is None or key in wanted:  # type: ignore[operator]
                found[key] = row["image_bytes"]
            if len(found) == (limit if wanted is None else len(wanted)):  # type: ignore[arg-type]
                return found
    return found


def comparison_page(dataset_uri: str, comparison: Comparison, pairs: Sequence[Pair]) -> str:
    """The page of a comparison, as HTML."""
    columns, rows = figures_table(comparison)
    head = {
        "kind": "comparison",
        "title": " against ".join(comparison.names),
        "about": "The same prompts, drawn in different ways: what the metrics say, and what one sees.",
        "dataset_uri": dataset_uri,
        "facts": {"Tables": len(comparison.names), "Made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")},
        "notice": missing_note(comparison),
        "origin": "",
    }
    settings = [
        [name, *("" if value is None else str(value) for value in values)] for name, values in comparison.settings.items()
    ]
    return render(
        "comparison.html.jinja", head=head, names=comparison.names, columns=columns, rows=rows, settings=settings, pairs=pairs
    )


def missing_note(comparison: Comparison) -> str:
    """Which evaluations are left out or not there, and what to do; empty if none is."""
    notes = []
    if comparison.outdated:
        told = ", ".join(comparison.outdated)
        notes.append(f"left out, because their pictures were drawn anew since: {told}; run jobs.evaluate again")
    judged = {name for by_table in comparison.figures.values() for name in by_table}
    judged |= {path.split("/")[1] for path in comparison.outdated}
    if bare := [name for name in comparison.names if name not in judged]:
        notes.append(f"not judged yet: {', '.join(bare)}; run jobs.evaluate --evaluate.name {bare[0]}")
    return "; ".join(notes)


def vote_page(names: Sequence[str], pairs: Sequence[Pair]) -> str:
    """A page on which a person chooses between two pictures without knowing whose they are; choices go to a JSON file."""
    content = [{"prompt": prompt, "pictures": [picture.src for picture in pictures[:2]]} for prompt, pictures in pairs]
    script = json.dumps(content).replace("<", "\\u003c")  # no text ends the script
    return render("vote.html.jinja", names=list(names[:2]), content=Markup(script))
