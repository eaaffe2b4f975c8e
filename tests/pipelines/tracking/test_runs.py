"""How an MLflow run ends: as what it tracks does."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest

from jobs.common.ray import JobStopped
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.runs import start_run


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError("bad"), "FAILED"), (JobStopped(), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_a_run_ends_as_what_it_tracks(tmp_path: Path, error: BaseException | None, status: str) -> None:
    tracking, run_id = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), ""
    expected = pytest.raises(type(error)) if error is not None else nullcontext()
    with expected, start_run("ingest", {}, tracking=tracking, output_dir=tmp_path) as run:
        run_id = run.run_id
        if error is not None:
            raise error
    assert mlflow.MlflowClient(tracking.uri).get_run(run_id).info.status == status
    assert mlflow.active_run() is None


STARTS = """
import resource, sys
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.runs import start_run
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
start_run("ingest", {}, tracking=TrackingConfig(), output_dir=sys.argv[1]).__enter__()
"""


def test_a_database_that_could_not_be_made_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    job = subprocess.run([sys.executable, "-c", STARTS, str(tmp_path)], capture_output=True, text=True)
    assert "StorageError: MLflow cannot keep its runs in sqlite:///" in job.stderr and list(tmp_path.iterdir()) == []
    for name in ("ingest", "caption"):
        with start_run(name, {}, tracking=TrackingConfig(), output_dir=tmp_path) as run:
            run.log_metrics({"rows": 1.0})
    assert (tmp_path / "mlflow.db").stat().st_size > 100_000 and list(tmp_path.glob(".*")) == []


def test_tables_of_other_datasets_are_named_by_their_uri(tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    tables = {"latents/a": "f00d", "s3://bucket/far/latents/b": "beef", "/data/far/latents/c": "cafe"}
    with start_run("train", {}, tracking=tracking, output_dir=tmp_path) as run:
        run.tag_tables(tables)
        run.log_inputs("s3://own/", tables, "training")
    found = mlflow.MlflowClient(tracking.uri).get_run(run.run_id)
    tags = {name: value for name, value in found.data.tags.items() if name.startswith("table.")}
    assert set(tags.values()) == {"f00d", "beef", "cafe"} and tags["table.s3:/bucket/far/latents/b"] == "beef"
    sources = {read.dataset.digest: read.dataset.source for read in found.inputs.dataset_inputs}
    assert sources == {"f00d": "s3://own/latents/a", "beef": "s3://bucket/far/latents/b", "cafe": "/data/far/latents/c"}


def test_mlflow_s_makers_are_told_nothing_unless_its_user_wishes_so() -> None:
    code = "import pipelines.tracking.runs, mlflow.telemetry.client as told; print(told.get_telemetry_client() is None)"
    plain = {"PATH": os.environ["PATH"]}  # without what tells MLflow that it is tested
    for environment, told in ((plain, "True\n"), (plain | {"MLFLOW_DISABLE_TELEMETRY": "false"}, "False\n")):
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout == told
