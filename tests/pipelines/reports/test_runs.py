"""The pages of a training and of the demo, also on a storage that fails."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.reports.runs import Link, Section, demo_report, training_report
from pipelines.shapes.drawing import draw_row
from pipelines.storage.files import write_file
from pipelines.tables.schema import LATENTS
from sana_model.files import retry
from tests.support.html_page import check_page
from tests.support.report_world import HOSTILE, encode, make_table
from tests.support.s3 import BUCKET, FaultyProxy, faulty_s3, serve_s3

GRID = f"s3://{BUCKET}/grid.png"


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    with serve_s3() as endpoint, faulty_s3(endpoint) as proxy:
        yield proxy


def test_pictures_that_cannot_be_read_at_once_or_ever(
    proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_table(str(tmp_path), "latents/tiny-64", LATENTS, [[]], dtype="bfloat16")
    write_file(GRID, encode(Image.fromarray(np.zeros((256, 256, 3), np.uint8)), "PNG"))
    samples = [(step, GRID) for step in range(5)]
    proxy.share, proxy.faults = 0.6, ("503", "reset", "cut")
    page = check_page(training_report(str(tmp_path), "latents/tiny-64", [(1, 0.5)], samples))
    assert len(page.all("img")) == 5 and proxy.spoiled.total() >= 1

    monkeypatch.setattr(retry, "STORAGE_ATTEMPTS", 2)
    proxy.share, proxy.faults = 1.0, ("503",)
    gone = [(0, GRID), (1, tmp_path / "gone.png")]
    page = check_page(training_report(str(tmp_path), "latents/tiny-64", [(1, 0.5)], gone))
    assert not page.all("img")
    assert f"{GRID} could not be read" in page.text and f"{tmp_path}/gone.png could not be read" in page.text


def test_training_and_demo_reports(dataset: str, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    grid.write_bytes(encode(Image.fromarray(np.tile(draw_row(0)[1], (2, 2, 1))), "PNG"))
    losses = [(step, 1 / (1 + step)) for step in range(1, 200)]
    page = check_page(training_report(dataset, "latents/tiny-64", losses, [(0, grid), (100, grid)], facts={"Steps": 199}))
    assert "Steps 199" in page.text and "step 100" in page.text
    assert [image["alt"] for image in page.all("img")] == ["samples at step 0", "samples at step 100"]
    table = Section(
        title="Results", columns=("stage", "rows"), rows=[("ingest", 1234), (HOSTILE, None)], pictures=[("after", grid)]
    )
    links = [Link(name="Images", href="dataset/images/report.html")]
    html = demo_report(dataset, [table], links=links, notice="captions are nonsense on photos")
    page = check_page(html)
    assert page.all("a") == [{"href": "dataset/images/report.html"}]
    assert "ingest 1,234" in page.text and HOSTILE in page.text and "captions are nonsense on photos" in page.text
