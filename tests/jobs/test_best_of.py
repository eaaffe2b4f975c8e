"""jobs.best_of with the tiny models: what is kept, what it gains, and that it resumes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import best_of
from pipelines.audit.status import dataset_status
from pipelines.audit.verify import verify_dataset
from pipelines.draw.config import DrawConfig, SampleConfig
from pipelines.evaluate.best_of.config import BestOfConfig
from pipelines.evaluate.config import ClipScoreConfig
from pipelines.evaluate.metric import metric_table
from pipelines.tables.errors import StaleTableError
from pipelines.tables.schema import SAMPLES, Row
from pipelines.tables.table import Table
from tests.support.without_ray import run_without_ray

PROMPTS = [f"a large {color} solid {shape} in the center of a white background" for color, shape in [
    ("red", "star"), ("blue", "circle"), ("green", "square"),
]]  # fmt: skip


def read_rows(table: Table) -> list[Row]:
    return [row for shard in table.list_shards() for row in table.read_shard(shard).to_pylist()]


def test_the_best_candidates_of_each_prompt_are_kept_and_a_lost_shard_is_chosen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_without_ray(monkeypatch)
    uri = str(tmp_path)
    job = best_of.BestOfJob(
        dataset_uri=uri,
        sample=SampleConfig(
            name="four", pipeline="zoo://pipeline", prompts=PROMPTS, images_per_prompt=4,
            draw=DrawConfig(num_steps=2, rows_per_shard=6, dtype="float32"),
        ),
        best_of=BestOfConfig(name="best", metrics=("shapes",), clip_score=ClipScoreConfig(model="zoo://clip")),
    )  # fmt: skip
    result = best_of.run(job)
    assert (result.num_rows, result.num_rejects, result.num_shards) == (3, 9, 3)  # whole prompts: 4 pictures a shard, not 6
    scores = {row["id"]: row["clip_score"] for row in read_rows(metric_table(uri, "four", "clip_score"))}
    own = [max((f"{number:06d}" for number in range(at, at + 4)), key=scores.__getitem__) for at in (0, 4, 8)]
    kept = read_rows(Table(uri, "samples/best", SAMPLES))
    drawn = {row["id"]: row for row in read_rows(Table(uri, "samples/four", SAMPLES))}
    assert kept == [drawn[name] for name in own]
    refused = read_rows(result.table.rejects())
    assert {row["reject_reason"] for row in refused} == {"not_chosen"} and "place 4 of 4" in str(refused)
    figures = json.loads((tmp_path / "samples/best" / best_of.FIGURES).read_text())
    assert list(figures) == ["1", "2", "4"] and "accuracy.all" in figures["4"]
    assert figures["1"]["clip_score"] == pytest.approx(sum(scores.values()) / 12)
    assert figures["4"]["clip_score"] == pytest.approx(sum(scores[name] for name in own) / 3)
    told = capsys.readouterr().out
    assert f"the first kept pictures: {uri}/samples/best/grid.png" in told and (tmp_path / "samples/best/grid.png").exists()
    assert "1 of 4" in told and "drawn: 12 pictures, 4 of each prompt: 4 times the compute of 1" in told
    (tmp_path / "samples/best/00001.parquet").unlink()
    again = best_of.run(job)
    assert (again.found_shards, read_rows(Table(uri, "samples/best", SAMPLES))) == (2, kept)
    assert "drawing: made by an earlier run" in capsys.readouterr().out
    assert list(verify_dataset(uri)) == []
    with pytest.raises(StaleTableError, match="keep"):
        best_of.run(replace(job, best_of=replace(job.best_of, keep=2)))
    assert all(not table.stale and not table.problems and table.ended for table in dataset_status(uri).tables)
    # Its inputs come later by name, and it is stale with them all the same.
    table = Table(uri, "samples/four", SAMPLES)
    other = replace(table.require().identity(), models={"pipeline": "another"})
    table.write_manifest(replace(table.require(), models=dict(other.models), fingerprint=other.fingerprint))
    stale = {found.path: found.stale for found in dataset_status(uri).tables}
    assert "evaluations/four/clip_score is stale" in stale["samples/best"]


def test_candidates_and_kept_pictures_have_tables_of_their_own() -> None:
    sample = SampleConfig(name="x", pipeline="zoo://pipeline", prompts=PROMPTS, images_per_prompt=2)
    with pytest.raises(ValueError, match=r"sample.name and best_of.name are both x"):
        best_of.BestOfJob(dataset_uri="data", sample=sample, best_of=BestOfConfig(name="x"))
