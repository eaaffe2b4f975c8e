"""jobs.evaluate: several metrics in one MLflow run; one that fails stops no other."""

import json
import re
from pathlib import Path

import mlflow
import pyarrow as pa
import pytest

from jobs import evaluate
from jobs.common.exit_codes import ExitCode, exit_code
from jobs.common.resources import find_needs
from pipelines.audit.status import dataset_status
from pipelines.evaluate.best_of.config import BestOfConfig
from pipelines.evaluate.config import ClipScoreConfig, EvaluateConfig
from pipelines.evaluate.feature_config import CmmdConfig
from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.metric_config import FIGURES
from pipelines.evaluate.registry import METRICS
from pipelines.tables.identity import Identity
from pipelines.tables.schema import SAMPLES, Row
from pipelines.tables.table import Table
from tests.pipelines.evaluate.test_run import drawn_rows


def write_samples(uri: str) -> list[Row]:
    samples = Table(uri, "samples/night", SAMPLES)
    samples.claim(Identity("sample", {}, {}, {}))
    rows, _ = drawn_rows(6)
    samples.write_shard("00000", pa.Table.from_pylist(rows, SAMPLES))
    return rows


def test_the_help_begins_with_what_is_required_and_names_every_metric_with_its_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    told = capsys.readouterr().out
    usage = told.partition("\n\n")[0]
    assert "--dataset_uri" in usage and "--evaluate.name" in usage and "--evaluate.clip_score" not in usage
    metrics = told.partition("--evaluate.metrics [ITEM,...]\n")[2].partition("  --")[0]
    assert set(METRICS) <= set(re.findall(r"\w+", metrics))
    for name in METRICS:
        assert f"  --evaluate.{name}.model MODEL\n" in told, name


@pytest.mark.usefixtures("local_ray", "without_ray")
def test_a_metric_that_reserves_more_than_ray_has_stops_no_other_and_one_that_is_not_chosen_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    uri = str(tmp_path)
    write_samples(uri)
    arguments = ["--dataset_uri", uri, "--evaluate.name", "night", "--evaluate.clip_score.model", "zoo://clip"]
    arguments += ["--evaluate.dpg.resources.num_gpus", "9", "--evaluate.dpg.resources.num_cpus", "999"]  # dpg never runs
    assert evaluate.main([*arguments, "--evaluate.metrics", "[shapes]"]) == ExitCode.DONE
    capsys.readouterr()
    greedy = [*arguments, "--evaluate.metrics", "[hps,clip_score]", "--evaluate.hps.resources.num_cpus", "99"]
    assert evaluate.main(greedy) == ExitCode.WRONG_INPUT
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if "hps" in line]
    why = "evaluate.hps.resources.num_cpus: 99 CPU are reserved, and this machine's"
    assert lines[0].startswith(f"evaluate night hps failed: {why}") and lines[2].startswith(f"error: {why}")
    assert lines[1] == "metrics that failed: hps; done: clip_score" and len(lines) == 3, lines
    assert metric_table(uri, "night", "clip_score").require().num_rows == 6 and "clip_score " in told.out
    job = evaluate.EvaluateJob(dataset_uri=uri, evaluate=EvaluateConfig(name="night"))
    assert list(find_needs(job)) == [] and next(find_needs(job, "evaluate.dpg")).setting == "evaluate.dpg.resources"
    best_of = BestOfConfig(name="best", judge="hps", metrics=("dpg",))  # it needs all of them, before it draws
    assert best_of.not_reserved == [name for name in METRICS if name not in ("hps", "dpg")]


@pytest.mark.usefixtures("local_ray", "without_ray")
def test_a_metric_that_fails_stops_no_other_and_decides_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(tmp_path)
    rows = write_samples(uri)
    broken = EvaluateConfig(name="night", metrics=("clip_score", "shapes"), clip_score=ClipScoreConfig(model=f"{uri}/gone"))
    with pytest.raises(FileNotFoundError, match="gone") as failed:
        evaluate.run(evaluate.EvaluateJob(dataset_uri=uri, evaluate=broken))
    assert exit_code(failed.value) == 1  # type: ignore[arg-type]
    printed = capsys.readouterr()
    told = printed.err
    assert "evaluate night clip_score failed: no file or folder" in told and "failed: clip_score; done: shapes" in told
    assert f"the page: {uri}/evaluations/night/shapes/report.html" in printed.out
    figures = json.loads((tmp_path / "evaluations/night/shapes" / FIGURES).read_text())
    assert figures["accuracy.all"] > 0.5
    assert metric_table(uri, "night", "shapes").require().num_rows == 6
    (tmp_path / "real").mkdir()
    for row in rows[:4]:
        (tmp_path / f"real/{row['id']}.png").write_bytes(row["image_bytes"])
    (tmp_path / "real").rename(tmp_path / "night")
    namesake = CmmdConfig(model="zoo://clip", reference=f"{uri}/night")
    with pytest.raises(ValueError, match=r"name of the reference too.*give evaluate\.cmmd\.reference_name"):
        evaluate.run(
            evaluate.EvaluateJob(dataset_uri=uri, evaluate=EvaluateConfig(name="night", metrics=("cmmd",), cmmd=namesake))
        )
    (tmp_path / "night").rename(tmp_path / "real")
    mended = EvaluateConfig(
        name="night",
        metrics=("clip_score", "cmmd", "shapes"),
        clip_score=ClipScoreConfig(model="zoo://clip"),
        cmmd=CmmdConfig(model="zoo://clip", reference=f"{uri}/real"),
    )
    results = evaluate.run(evaluate.EvaluateJob(dataset_uri=uri, evaluate=mended))
    assert [(result.was_done, result.num_rows) for result in results] == [(False, 6), (False, 6), (True, 6)]
    assert set(json.loads((tmp_path / "evaluations/night/cmmd" / FIGURES).read_text())) == {"cmmd"}
    tables = {table.path: table for table in dataset_status(uri).tables if table.path.startswith("evaluations/")}
    assert tables.keys() == {*(f"evaluations/night/{name}" for name in mended.metrics), "evaluations/real/cmmd"}
    assert all(not table.stale and not table.problems and table.ended for table in tables.values())
    client = mlflow.MlflowClient(f"sqlite:///{uri}/mlflow.db")
    runs = client.search_runs(["0", "1"], order_by=["attributes.start_time ASC"])
    assert [(run.info.run_name, run.info.status) for run in runs] == [
        ("evaluate night", "FAILED"),
        ("evaluate night", "FINISHED"),
        ("evaluate real cmmd", "FINISHED"),
    ]
    first, second = (run.data.metrics for run in runs[:2])
    assert first["shapes.rows"] == 6 and first["accuracy.all"] == figures["accuracy.all"] and "clip_score" not in first
    assert second["clip_score"] > 0 and second["clip_score.rows"] == 6 and "cmmd" in second
