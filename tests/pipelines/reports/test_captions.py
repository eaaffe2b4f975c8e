"""The page of a captions table: counts, escaped texts, repeated captions."""

from pathlib import Path

import pytest

from pipelines.reports.captions import captions_report
from pipelines.tables.errors import MissingTableError
from pipelines.tables.sampling import ReportScope
from tests.support.html_page import check_page
from tests.support.report_world import HOSTILE, LONG, text_of


def test_captions_report_counts_and_escapes(dataset: str) -> None:
    html = captions_report(dataset, "llava", sample=ReportScope(num_images=30))
    page = check_page(html)
    assert HOSTILE in page.text and "<script" not in html
    assert LONG.strip() in page.text  # whole, behind the cut
    assert "show all 5,000 characters" in page.text
    assert "stop 29 96.7%" in page.text and "length 1 3.3%" in page.text
    assert "cut_off 1 3.3%" in page.text and "repetition 1 3.3%" in page.text
    for index in range(3, 30):
        assert text_of("llava", index) in page.text


def test_repeated_captions_are_counted(dataset: str) -> None:
    page = check_page(captions_report(dataset, "idefics"))
    assert "a photo of a thing 8 26.7%" in page.text


def test_a_missing_table_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(MissingTableError, match="captions/llava"):
        captions_report(str(tmp_path), "llava")
