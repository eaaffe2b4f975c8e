"""Rejects on a page: the reason, and what the refused bytes are."""

import tarfile
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.reports.captions import captions_report
from pipelines.reports.images import images_report
from pipelines.reports.rejects import read_rejects
from pipelines.tables.identity import Identity
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.sampling import ReportScope
from pipelines.tables.schema import CAPTIONS, IMAGES, IMAGES_PATH, REJECTS
from pipelines.tables.table import Table
from tests.support.html_page import check_page
from tests.support.report_world import image_row, make_table


def test_rejects_show_reason_and_what_the_bytes_are(dataset: str) -> None:
    page = check_page(images_report(dataset))
    assert "not_an_image 2 50.0%" in page.text
    assert "Dear diary, <b>this is</b> not a picture." in page.text  # as text: the page has no <b> from it
    assert "00 00 00 00" in page.text
    assert "bytes not at hand" in page.text
    assert any(image["alt"] == "rejected: truncated" for image in page.all("img"))


def test_rejects_show_members_of_a_local_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("folder/x.jpg")
        member.size = 14
        archive.addfile(member, BytesIO(b"no picture but"))
    refused = reject({"source_uri": f"{tmp_path}/a.tar#folder/x.jpg"}, RowRefused("not_an_image", "14 bytes"))
    gone = reject({"source_uri": f"{tmp_path}/a.tar#folder/y.jpg"}, RowRefused("not_an_image", "14 bytes"))
    make_table(str(tmp_path), "images", IMAGES, [[image_row(0)]], [refused, gone])
    page = check_page(images_report(str(tmp_path)))
    assert "no picture but" in page.text and page.text.count("bytes not at hand") == 1


def test_rejects_of_later_stages_show_the_image(dataset: str) -> None:
    page = check_page(captions_report(dataset, "llava"), Table(dataset, "captions/llava", CAPTIONS))
    assert "empty_caption 1 100.0%" in page.text
    assert any(image["alt"] == "rejected: empty_caption" for image in page.all("img"))


@pytest.mark.parametrize(("kind", "excerpt"), [("folder", "root:x:0"), ("list", "")])
def test_a_list_brings_no_file_of_this_host_onto_a_page(tmp_path: Path, kind: str, excerpt: str) -> None:
    (tmp_path / "passwd").write_text("root:x:0")
    images = Table(str(tmp_path / "data"), IMAGES_PATH, IMAGES)
    images.claim(Identity("ingest", {"source_kind": kind}, {}, {}))
    refused = reject({"source_uri": str(tmp_path / "passwd")}, RowRefused("not_an_image", "no image"))
    images.rejects().write_shard("00000", pa.Table.from_pylist([refused], REJECTS))
    [shown] = read_rejects(images, ReportScope()).samples
    assert (shown.excerpt, shown.picture.src) == (excerpt, "")
