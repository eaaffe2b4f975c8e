"""Reports of runs: the page of a training, and the front page of the whole way."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.reports.charts import curve
from pipelines.reports.page import page_head
from pipelines.reports.pictures import Picture, no_picture, thumbnail
from pipelines.reports.templates import render
from pipelines.storage.files import read_file
from pipelines.tables.schema import IMAGES, IMAGES_PATH, LATENTS, Row
from pipelines.tables.table import Table

GRID_SIDE = 1600  # px

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page: text, a table, pictures. Numbers of `rows` are set to the right, a fraction is to be written as text.

    Args:
        pictures: (label, path or URI) of each.
    """

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    pictures: Sequence[tuple[str, str | Path]] = ()


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link of the front page; `href` is relative to it."""

    name: str
    href: str
    text: str = ""


def training_report(
    dataset_uri: str,
    path: str,
    losses: Sequence[tuple[int, float]],
    samples: Sequence[tuple[int, str | Path]] = (),
    *,
    facts: Mapping[str, object] | None = None,
    config: Mapping[str, object] | None = None,
    sections: Sequence[Section] = (),
) -> str:
    """The page of a training: its loss over steps and what the model drew on the way.

    Args:
        path: of the table that it was trained on; the head of the page tells of it.
        losses: (step, loss).
        samples: (step, path or URI of a grid of pictures).
        facts: more for the head, such as {"Steps": 400}.
        config: the resolved one, for the end of the page.

    Raises MissingTableError if there is no such table.
    """
    table = Table(dataset_uri, path, LATENTS)
    manifest = table.require()
    head = page_head(
        table,
        manifest,
        kind=f"trained on {path}",
        title="Training",
        about="The transformer learns to draw what the captions say.",
        facts={"Rows": manifest.num_rows, "Rejects": manifest.num_rejects, **(facts or {})},
        origin=config,
    )
    chart = curve(losses, title="Training loss", x_label="step", y_label="flow loss (mean square)")
    pictures = [(step, _grid(uri, f"samples at step {step}")) for step, uri in samples]
    return render("training.html.jinja", head=head, losses=losses, chart=chart, samples=pictures, sections=_loaded(sections))


def demo_report(
    dataset_uri: str,
    sections: Sequence[Section],
    *,
    title: str = "From raw images to pictures",
    about: str = "Every stage, once: images, captions, scores, latents, training, and what the model draws now.",
    links: Sequence[Link] = (),
    notice: str = "",
    facts: Mapping[str, object] | None = None,
) -> str:
    """The front page: links to the stages' pages, then `sections` (the closing table, grids of pictures).

    Raises MissingTableError if the dataset has no images.
    """
    table = Table(dataset_uri, IMAGES_PATH, IMAGES)
    manifest = table.require()
    counts = {"Images": manifest.num_rows, "Rejected images": manifest.num_rejects}
    head = page_head(
        table, manifest, kind="Sana on Ray", title=title, about=about, facts={**counts, **(facts or {})}, notice=notice
    )
    return render("demo.html.jinja", head=head, links=links, sections=_loaded(sections))


def _grid(uri: str | Path, alt: str) -> Picture:
    """A grid of pictures, or why there is none: a page is made without a picture that cannot be read."""
    try:
        content = read_file(str(uri))
    except OSError as error:
        logger.warning("the report is without a picture: %s", error)
        return no_picture(f"{uri} could not be read")
    return thumbnail(content, alt, GRID_SIDE)


def _loaded(sections: Sequence[Section]) -> list[Row]:
    """With their pictures read."""
    return [
        {"title": section.title, "text": section.text, "columns": section.columns, "rows": section.rows}
        | {"pictures": [(label, _grid(uri, label)) for label, uri in section.pictures]}
        for section in sections
    ]
