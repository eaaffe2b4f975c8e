"""Pages that are not about one table: a training, and the front page of a run of the full pipeline."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.reports.charts import curve
from pipelines.reports.page import page_head
from pipelines.reports.pictures import Picture, no_picture, thumbnail
from pipelines.reports.templates import render
from pipelines.storage.files import read_file
from pipelines.tables.schema import IMAGES, IMAGES_PATH, Row, schema_of
from pipelines.tables.table import Table

GRID_SIDE = 1600  # px

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page with a heading: text, a table and pictures, each of which may be left out.

    Args:
        title: the heading.
        columns: the names of the table's columns.
        rows: the table's cells. Numbers are aligned right; fractions get 4 significant digits unless given as text.
        pictures: label and path or URI of each.
    """

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    pictures: Sequence[tuple[str, str | Path]] = ()


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link on the front page; `href` is relative to that page."""

    name: str
    href: str


def training_report(
    dataset_uri: str,
    path: str,
    losses: Sequence[tuple[int, float]],
    samples: Sequence[tuple[int, str | Path]] = (),
    *,
    facts: Mapping[str, object] | None = None,
    config: Mapping[str, object] | None = None,
    sections: Sequence[Section] = (),
    about: str = "The transformer learns to draw what the captions say.",
    y_label: str = "flow loss (mean square)",
    about_samples: str = "The same prompts and noise at each step, so that what differs is what the model has learnt.",
) -> str:
    """The page of a training, as HTML: its loss over steps, and the pictures that the model drew during training.

    Args:
        path: the table that it was trained on, or the first of them; the head shows its rows and rejects.
        losses: (step, loss).
        samples: (step, path or URI of a grid of pictures).
        facts: further entries of the head, such as {"Steps": 400}.
        config: the resolved configuration, shown at the end of the page.
        sections: parts that follow the pictures.
        about: what the model learns.
        y_label: what the loss is.
        about_samples: what the pictures show.

    A picture that cannot be read is replaced by a line that says so. Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, path, schema_of(path, {}))
    manifest = table.require()
    head = page_head(
        table,
        manifest,
        kind=f"trained on {path}",
        title="Training",
        about=about,
        facts={"Rows": manifest.num_rows, "Rejects": manifest.num_rejects, **(facts or {})},
        origin=config,
    )
    chart = curve(losses, title="Training loss", x_label="step", y_label=y_label)
    pictures = [(step, _grid(uri, f"samples at step {step}")) for step, uri in samples]
    return render(
        "training.html.jinja",
        head=head,
        losses=losses,
        chart=chart,
        samples=pictures,
        about_samples=about_samples,
        sections=_loaded(sections),
    )


def demo_report(dataset_uri: str, sections: Sequence[Section], *, links: Sequence[Link] = (), notice: str = "") -> str:
    """The front page of a run of the full pipeline, as HTML: links to the pages of tables and training, then `sections`.

    Args:
        notice: a warning in the head.

    A picture that cannot be read is replaced by a line that says so. Raises MissingTableError if the dataset has no images.
    """
    table = Table(dataset_uri, IMAGES_PATH, IMAGES)
    manifest = table.require()
    head = page_head(
        table,
        manifest,
        kind="Sana on Ray",
        title="From raw images to pictures",
        about="Every stage, once: images, captions, scores, latents, training, and what the model draws now.",
        facts={"Images": manifest.num_rows, "Rejected images": manifest.num_rejects},
        notice=notice,
    )
    return render("demo.html.jinja", head=head, links=links, sections=_loaded(sections))


def _grid(uri: str | Path, alt: str) -> Picture:
    """Read a grid of pictures. If it cannot be read, the page says so in its place."""
    try:
        content = read_file(str(uri))
    except OSError as error:
        logger.warning("a picture is missing on the report's page: %s", error)
        return no_picture(f"{uri} could not be read")
    return thumbnail(content, alt, GRID_SIDE)


def _loaded(sections: Sequence[Section]) -> list[Row]:
    """The sections as the templates take them, with their pictures read."""
    return [
        {"title": section.title, "text": section.text, "columns": section.columns, "rows": section.rows}
        | {"pictures": [(label, _grid(uri, label)) for label, uri in section.pictures]}
        for section in sections
    ]
