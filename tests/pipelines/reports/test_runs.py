"""The pages of a training and of the demo."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.reports.runs import Link, Section, demo_report, training_report
from pipelines.shapes.drawing import draw_row
from tests.support.html_page import check_page
from tests.support.report_world import HOSTILE, encode


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
    links = [Link(name="Images", href="dataset/images/report.html", text="what it is made from")]
    html = demo_report(dataset, [table], links=links, notice="captions are nonsense on photos")
    page = check_page(html)
    assert page.all("a") == [{"href": "dataset/images/report.html"}]
    assert "ingest 1,234" in page.text and HOSTILE in page.text and "captions are nonsense on photos" in page.text
