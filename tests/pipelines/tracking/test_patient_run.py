"""MLflow that cannot be reached, or comes late: nothing waits for it, and nothing is lost or sent twice."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from pipelines.tracking import patient_run
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.patient_run import PatientRun
from pipelines.tracking.runs import RunRequest
from pipelines.tracking.unsent import Entry


def make_request(folder: Path, uri: str) -> RunRequest:
    return RunRequest.make("train", {"lr": 1.0}, tracking=TrackingConfig(uri=uri), output_dir=folder, key="a")


def history(run_request: RunRequest) -> list[tuple[int, float]]:
    run = run_request.find()
    assert run is not None
    return [(point.step, point.value) for point in mlflow.MlflowClient(run_request.uri).get_metric_history(run.run_id, "loss")]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_figures_wait_and_are_sent_by_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_run, "CLOSE_SECONDS", 1.0)
    nowhere = make_request(tmp_path, f"http://127.0.0.1:{free_port()}")
    notices: list[str] = []
    run = PatientRun(nowhere, say=notices.append)
    run.log_metrics({"loss": 3.0}, 10)
    run.log_metrics({"loss": 2.0}, 20)
    run.set_tags({"a": "b"})
    waiting = run.waiting()
    assert waiting == [(10, {"loss": 3.0}), (20, {"loss": 2.0})]
    assert [(entry.kind, entry.step) for entry in run.close()] == [("metrics", 10), ("metrics", 20), ("tags", None)]
    (notice,) = notices
    assert f"MLflow at {nowhere.uri} cannot be reached, figures wait and are sent later" in notice
    assert nowhere.try_to(lambda _: None) is not None

    there = make_request(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    for loss in (1.0, 0.5):  # two starts from one checkpoint: the second one's steps are known already
        again = PatientRun(there, say=notices.append, waiting=[Entry("metrics", metrics, step) for step, metrics in waiting])
        again.log_metrics({"loss": loss}, 30)
        assert again.close() == []
    assert history(there) == [(10, 3.0), (20, 2.0), (30, 1.0)]
    assert len(notices) == 1


def test_the_machine_is_watched_again_after_an_answer_that_failed(tmp_path: Path) -> None:
    """MLflow's own monitor ends with it."""
    run_request = make_request(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")
    run = PatientRun(run_request, say=print)
    run.log_metrics({"loss": 3.0}, 10)
    wait_until(lambda: run._monitor is not None and not run.waiting())
    first = run._monitor
    assert first is not None and first._process is not None
    first.finish()
    run.log_metrics({"loss": 2.0}, 20)
    wait_until(lambda: run._monitor is not first)
    assert run._monitor is not None and run._monitor._process is not None and run._monitor._process.is_alive()
    run.close()
    assert history(run_request) == [(10, 3.0), (20, 2.0)]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_server_that_starts_late(tmp_path: Path) -> None:
    port = free_port()
    run_request = make_request(tmp_path, f"http://127.0.0.1:{port}")
    notices: list[str] = []
    said = threading.Event()

    def say(notice: str) -> None:
        notices.append(notice)
        said.set()

    run = PatientRun(run_request, say=say)
    run.log_metrics({"loss": 3.0}, 10)
    assert said.wait(120)
    said.clear()
    stores = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "artifacts")]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *stores],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert said.wait(300)
        run.log_metrics({"loss": 2.0}, 20)
        run.close()
        assert history(run_request) == [(10, 3.0), (20, 2.0)]
    finally:
        server.terminate()
        server.wait()
    assert notices[1] == f"MLflow at {run_request.uri} can be reached again"
