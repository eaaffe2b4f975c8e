"""The page of a latents table: the distribution of values, and reconstructions."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.reports.latents import latents_report
from pipelines.tables.sampling import ReportScope
from pipelines.tables.schema import IMAGES, LATENTS
from pipelines.tables.table import Table
from tests.support.html_page import check_page
from tests.support.report_world import image_row, latents_row, make_table, text_of


def test_latents_report_measures_values_and_shows_reconstructions(dataset: str) -> None:
    def decode(latents: np.ndarray) -> Image.Image:
        assert latents.shape == (4, 8, 8) and latents.dtype == np.float32
        return Image.fromarray((latents[0].clip(-1, 1) * 127 + 128).astype(np.uint8))

    table = Table(dataset, "latents/tiny-64", LATENTS)
    page = check_page(latents_report(dataset, table.path, decode, sample=ReportScope(num_images=30)), table)
    values = np.concatenate([latents_row(index, image_row(index))["latents"] for index in range(30)], axis=None)
    values = np.frombuffer(b"".join(values.tolist()), np.float16).astype(np.float32)
    assert f"with mean {values.mean():.2f}" in page.text
    assert f"here it is {values.std():.4g}" in page.text
    assert "64x64 20 66.7%" in page.text
    assert sum(image["alt"].startswith("decoded: ") for image in page.all("img")) == 30
    alone = check_page(latents_report(dataset, table.path)).text
    assert "what the autoencoder makes" not in alone and "Captions join them when a training reads them." in alone
    assert not any(text_of("llava", index) in alone for index in range(3, 30))


def test_latents_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    uri = str(tmp_path)
    row = image_row(0)
    latents = latents_row(0, row)
    broken = np.frombuffer(latents["latents"], np.float16).copy()
    broken[:5] = np.nan
    make_table(uri, "images", IMAGES, [[row]])
    make_table(uri, "latents/tiny-64", LATENTS, [[latents | {"latents": broken.tobytes()}]], dtype="float16")
    assert "5 values are not finite" in check_page(latents_report(uri, "latents/tiny-64")).text
