"""The import of captions as a job: both tables, the last lines, a second start, and no Ray."""

import json
from pathlib import Path

import pytest
import ray

from jobs.import_captions import main
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGES, IMAGES_PATH
from pipelines.tables.table import Table
from tests.support.whole_dataset import image_row, write_table


def test_captions_and_scores_are_imported_without_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", None)
    rows = [image_row(f"{number}") | {"source_uri": f"/photos/{number}.png"} for number in range(3)]
    write_table(Table(str(tmp_path / "data"), IMAGES_PATH, IMAGES), Identity("ingest", {}, {}, {}), {"00000": (rows, [])})
    lines = [{"file_name": f"{number}.png", "caption": "x", "clip_score": 20} for number in (0, 1, 7)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["--dataset_uri", f"{tmp_path}/data", "--captions.name", "vlm", "--captions.source", f"{tmp_path}/captions.jsonl"]
    told = []
    for _ in range(2):
        assert main(command) == 0
        told.append(capsys.readouterr().out)
    assert "2 rows, 1 rejects in 1 shards" in told[0] and "2 rows, 0 rejects in 1 shards: made along with another" in told[0]
    assert told[1].count("all there already, nothing to do") == 2
    for lines_shown in told:
        assert "2 of 3 captions matched (by file_name 2; found under caption 3)" in lines_shown
        assert "not taken: unmatched 1 (see " in lines_shown and "images without a caption: no_caption 1" in lines_shown
    assert (tmp_path / "data/captions/vlm/report.html").exists()
    assert main([*command, "--captions.match", "id"]) == 1 and "config.match: 'auto' -> 'id'" in capsys.readouterr().err
