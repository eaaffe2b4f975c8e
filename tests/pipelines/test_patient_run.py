"""MLflow that comes late: nothing waits for it, and nothing is lost or sent twice."""

import threading
from pathlib import Path

import mlflow
import pytest

from pipelines import patient_run
from pipelines.patient_run import PatientRun
from pipelines.tracking import RunPlan, TrackingConfig


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_run, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(patient_run, "CLOSE_SECONDS", 3.0)


def history(uri: str, plan: RunPlan) -> list[tuple[int, float]]:
    run = plan.find()
    assert run is not None
    return [(point.step, point.value) for point in mlflow.MlflowClient(uri).get_metric_history(run.run_id, "loss")]


def test_figures_wait_until_mlflow_is_there(tmp_path: Path) -> None:
    """Its database cannot be opened at first: a folder lies in its place."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.db").mkdir()
    plan = RunPlan.make("train", {"lr": 1.0}, tracking=TrackingConfig(uri=uri), output_dir=tmp_path, key="a")
    notices: list[str] = []
    said = threading.Event()
    run = PatientRun(plan, say=lambda notice: (notices.append(notice), said.set())[0])
    run.log_metrics({"loss": 3.0}, 10)
    run.log_metrics({"loss": 2.0}, 20)
    assert said.wait(60) and "cannot be reached, figures wait and are sent later" in notices[0]
    assert run.waiting() == [(10, {"loss": 3.0}), (20, {"loss": 2.0})]
    (tmp_path / "mlflow.db").rmdir()
    patient_run.CLOSE_SECONDS = 120.0
    run.close()
    assert history(uri, plan) == [(10, 3.0), (20, 2.0)]
    assert len(notices) == 2 and "can be reached again" in notices[1]

    again = PatientRun(plan, say=notices.append, waiting=[(20, {"loss": 2.0}), (30, {"loss": 1.0})])
    again.log_metrics({"loss": 0.5}, 40)
    again.close()
    assert history(uri, plan) == [(10, 3.0), (20, 2.0), (30, 1.0), (40, 0.5)]  # one run, each step once


def test_what_is_never_sent_is_said(tmp_path: Path) -> None:
    plan = RunPlan.make("train", {}, tracking=TrackingConfig(uri="http://127.0.0.1:9"), output_dir=tmp_path, key="a")
    notices: list[str] = []
    run = PatientRun(plan, say=notices.append)
    run.log_metrics({"loss": 3.0}, 10)
    run.close()
    assert notices[-1] == "1 entries could not be sent to MLflow at http://127.0.0.1:9"
    assert plan.try_to(lambda _: None) is not None
