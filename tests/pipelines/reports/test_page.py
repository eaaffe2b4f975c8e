"""What all pages have in common."""

from pathlib import Path

from pipelines.reports.captions import captions_report
from pipelines.reports.images import images_report
from pipelines.reports.latents import latents_report
from pipelines.reports.runs import demo_report, training_report
from pipelines.reports.scores import scores_report
from pipelines.score.config import SelectionConfig
from pipelines.tables.schema import CAPTIONS, IMAGES, LATENTS, SCORES, Row
from tests.support.html_page import check_page
from tests.support.report_world import make_table

BEST = SelectionConfig(policy="best")


def test_empty_tables_make_pages(tmp_path: Path) -> None:
    uri = str(tmp_path)
    tables = {"images": IMAGES, "captions/llava": CAPTIONS, "scores/clip/llava": SCORES, "latents/tiny-64": LATENTS}

    def pages() -> list[str]:
        return [
            images_report(uri),
            captions_report(uri, "llava"),
            scores_report(uri, "clip", "llava", BEST),
            latents_report(uri, "latents/tiny-64"),
        ]

    no_rows: list[Row] = []
    for shards in ([], [no_rows]):
        for path, schema in tables.items():
            make_table(uri, path, schema, shards, dtype="bfloat16")
        assert all("The table is empty" in check_page(page).text for page in pages())
    assert "No step has been logged" in check_page(training_report(uri, "latents/tiny-64", [])).text
    check_page(demo_report(uri, []))
