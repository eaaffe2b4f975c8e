"""The page of the images table: every image, what was counted, and what was sampled of a large table."""

import json
from pathlib import Path

from pipelines.reports.images import images_report
from pipelines.tables.sampling import ReportScope
from pipelines.tables.schema import IMAGES
from pipelines.tables.table import Table
from tests.support.html_page import check_page


def test_images_report_shows_each_image_and_counts(dataset: str) -> None:
    table = Table(dataset, "images", IMAGES)
    page = check_page(images_report(dataset, sample=ReportScope(num_images=100)), table)
    rows = [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]
    for row in rows:
        assert row["id"][:12] in page.text
        assert not row["caption"] or row["caption"] in page.text
        assert f"{row['width']} × {row['height']} px · {row['format']}" in page.text
    assert "Rows 30 Rejects 4 Shards 3" in page.text
    assert "PNG 24 80.0%" in page.text and "JPEG 6 20.0%" in page.text
    assert "15 of the images (50.0%) came with one" in page.text
    assert len(page.all("svg")) == 3


def test_a_large_table_is_sampled_and_the_page_says_so(dataset: str) -> None:
    sample = ReportScope(num_images=5, max_shards=2, picture_shards=1)
    page = check_page(images_report(dataset, sample=sample))
    assert "20 rows were read: 2 of 3 shards, spread evenly" in page.text
    assert "5 of 30 images" in page.text
    assert sum(not image["alt"].startswith("rejected") for image in page.all("img")) == 5


def test_write_report_puts_the_page_into_the_table(dataset: str) -> None:
    table = Table(dataset, "images", IMAGES)
    html = images_report(dataset)
    table.write_report(html)
    assert Path(table.uri, "report.html").read_text() == html
    assert json.loads(Path(table.uri, "_manifest.json").read_text())["fingerprint"] == table.require().fingerprint
    assert len(table.list_shards()) == 3
