"""The page of a training, on a storage that fails."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.reports.runs import training_report
from pipelines.storage.files import write_file
from pipelines.tables.schema import LATENTS
from sana_model.files import retry
from tests.pipelines.reports.test_tables import make_table
from tests.support.hostile_images import encode
from tests.support.html_page import check_page
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
    proxy.share, proxy.faults = 0.4, ("503", "reset", "cut")
    page = check_page(training_report(str(tmp_path), "latents/tiny-64", [(1, 0.5)], samples))
    assert len(page.all("img")) == 5 and proxy.spoiled.total() > 1

    monkeypatch.setattr(retry, "STORAGE_ATTEMPTS", 2)
    proxy.share, proxy.faults = 1.0, ("503",)
    gone = [(0, GRID), (1, tmp_path / "gone.png")]
    page = check_page(training_report(str(tmp_path), "latents/tiny-64", [(1, 0.5)], gone))
    assert not page.all("img")
    assert f"{GRID} could not be read" in page.text and f"{tmp_path}/gone.png could not be read" in page.text
