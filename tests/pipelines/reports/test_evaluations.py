"""The pages of evaluations: every metric has one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.pictures import Pictures, folder_pictures, sampled_pictures
from pipelines.evaluate.registry import METRICS
from pipelines.reports.evaluations import evaluation_report
from pipelines.tables.identity import Identity
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import SAMPLES, Row
from pipelines.tables.table import Table
from pipelines.workers.images import to_png
from tests.support.html_page import check_page
from tests.support.report_world import HOSTILE, LONG

NUM_PICTURES = 6
COMPARING = ("inception", "cmmd", "dino")
FOUND = {"name": "cat", "score": 0.9, "box": [0.0, 0.0, 9.0, 9.0], "color": "red"}
ANSWER = {"question": 1, "category": "entity - whole", "answer": "not at all", "yes": False, "counts": False, "unclear": False}


def judgement(metric: str, at: int) -> Row:
    """A row of the metric's own columns; a higher number is a better picture."""
    rows: dict[str, Row] = {
        **{name: {"features": np.random.default_rng(at).normal(size=4).astype(np.float32)} for name in COMPARING},
        "geneval": {
            "task": "counting",
            "correct": at > 2,
            "faults": [] if at > 2 else [f"expected {HOSTILE}"],
            "objects": [FOUND] * at,
        },
        "dpg": {"dpg": at / 10, "answers": [ANSWER]},
        "verifier": {"yes": at > 2, "log_prob": -0.1 * at if at <= 2 else 0.1 * at - 1},
        "reconstruction": {"psnr": 20.0 + at, "ssim": at / 10},
        "shapes": {"asked": "a red circle", "seen": "a red circle" if at > 2 else "a blue square"},
    }
    return rows.get(metric, {metric: float(at)})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    uri = str(tmp_path_factory.mktemp("evaluated"))
    samples = Table(uri, "samples/night", SAMPLES)
    samples.write_manifest(replace(samples.claim(Identity("sample", {}, {}, {})), complete=True))
    prompts = [HOSTILE, LONG, *("a red circle" for _ in range(NUM_PICTURES - 2))]
    rows = [
        {"id": f"{at:06d}", "prompt": prompt, "seed": at, "image_bytes": to_png(Image.new("RGB", (32, 32), (40 * at, 0, 0)))}
        for at, prompt in enumerate(prompts)
    ]
    samples.write_shard("00000", pa.Table.from_pylist(rows, SAMPLES))
    for at in range(3):
        Image.new("RGB", (32, 32)).save(Path(uri, f"{at}.png"))
    return sampled_pictures(uri, "night")


def test_pictures_that_are_all_right_are_not_called_the_worst(pictures: Pictures) -> None:
    samples: Any = pictures.read_shard
    uri = samples.__self__.dataset_uri
    alike = replace(pictures, name="alike")
    table = metric_table(uri, "alike", "shapes")
    rows = [{"id": f"{at:06d}", "prompt": "a red circle", "asked": "a red circle", "seen": "a red circle"} for at in range(4)]
    table.write_manifest(replace(table.claim(Identity("evaluate", {"metric": "shapes"}, {}, {})), complete=True))
    table.write_shard("00000", pa.Table.from_pylist(rows, table.schema))
    page = check_page(evaluation_report(uri, alike, "shapes", {"accuracy.all": 1.0}), table)
    assert "Drawn" in page.text and "Best" not in page.text and "Worst" not in page.text and "Reference" not in page.text


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_a_page(pictures: Pictures, metric: str) -> None:
    samples: Any = pictures.read_shard
    uri = samples.__self__.dataset_uri
    table = metric_table(uri, "night", metric)
    own = [{"id": f"{at:06d}", "prompt": f"prompt {at} {HOSTILE}", **judgement(metric, at)} for at in range(NUM_PICTURES - 1)]
    table.write_manifest(replace(table.claim(Identity("evaluate", {"metric": metric}, {}, {})), complete=True))
    table.write_shard("00000", pa.Table.from_pylist(own, table.schema))
    refused = reject({"id": "000005"}, RowRefused("bad_score", "not finite"))
    table.rejects().write_shard("00000", pa.Table.from_pylist([refused], table.rejects().schema))
    reference = folder_pictures("real", uri) if metric in (*COMPARING, "reconstruction") else None
    figures = {f"{metric}.x": 0.123456, metric: 2.0}
    page = check_page(evaluation_report(uri, pictures, metric, figures, reference=reference), table)
    assert f"night by {metric}" in page.text and "0.1235" in page.text and "bad_score" in page.text
    if reference is not None:
        assert page.text.index("Drawn") < page.text.index("Reference") and len(page.all("img")) == 2 + 2
    else:
        best, worst = page.text.index("Best"), page.text.index("Worst")
        assert best < page.text.index("prompt 4") < page.text.index("prompt 3") < worst < page.text.index("prompt 0")
        assert len(page.all("img")) == 4
    if metric == "geneval":
        assert "counting: correct found: 4 red cat" in page.text and "counting: wrong expected <script>" in page.text
    if metric == "dpg":
        assert "40 % of 1 questions question 1 (entity - whole): 'not at all'" in page.text
    if metric == "shapes":
        assert "shows a blue square wrong: shape, color" in page.text
