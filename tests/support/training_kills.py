"""Start a training as a command, kill -9 parts of it at given steps, and compare what came of it with an undisturbed one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import mlflow
import psutil

from pipelines.storage.files import list_folder
from pipelines.train.loop.record import TrainingRecord
from tests.support.drawn import read_drawn

Kind = Literal["worker", "driver", "ray"]
PATIENCE = 600.0  # seconds
Start = Callable[[str], subprocess.Popen[bytes]]
"""Starts a training of this name."""


def start_training(command: str, dataset: Path, name: str, options: Mapping[str, object]) -> subprocess.Popen[bytes]:
    """Start `python -m jobs.<command>`. It records its samples, reports every step, and tries again after 20 failures."""
    always = {
        "dataset_uri": dataset,
        "name": name,
        "ray.num_cpus": 8,
        "tracking.uri": f"sqlite:///{dataset}/mlflow.db",
        "train.checkpoint_every": 15,
        "train.log_every": 1,
        "train.record_samples": "true",
        "train.max_failures": 20,
    }
    arguments = [f"--{key}={value}" for key, value in {**always, **options}.items()]
    log = (dataset / f"{name}.log").open("ab")
    environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    return subprocess.Popen([sys.executable, "-m", f"jobs.{command}", *arguments], stdout=log, stderr=log, env=environment)


def last_step(dataset: Path, name: str) -> int:
    return max((int(file.split("-")[2]) for file in list_folder(str(dataset / name / "drawn"))), default=0)


def kill(job: subprocess.Popen[bytes], kind: Kind) -> None:
    processes = psutil.Process(job.pid).children(recursive=True)
    workers = [process for process in processes if process.name().startswith("ray::RayTrainWo")]
    victims = {"worker": workers[-1:], "driver": [psutil.Process(job.pid)], "ray": [psutil.Process(job.pid), *processes]}[kind]
    for process in victims:
        process.send_signal(signal.SIGKILL)
    if kind == "worker":
        return
    job.wait()
    _, alive = psutil.wait_procs(processes, timeout=60)  # Ray ends by itself when its driver is gone
    for process in alive:
        process.kill()


def survive(start: Start, dataset: Path, name: str, kills: Sequence[tuple[int, Kind]]) -> None:
    """Train to the end through kills at (step, kind). `start` begins or resumes the training of this name."""
    job = start(name)
    deadline = time.monotonic() + PATIENCE
    for step, kind in kills:
        while last_step(dataset, name) < step:
            assert job.poll() is None and time.monotonic() < deadline, (dataset / f"{name}.log").read_text()[-2000:]
            time.sleep(0.05)
        print(f"killed the {kind} after step {last_step(dataset, name)}")
        kill(job, kind)
        if kind != "worker":
            job = start(name)
        deadline = time.monotonic() + PATIENCE
    assert job.wait(PATIENCE) == 0, (dataset / f"{name}.log").read_text()[-2000:]


def compare(dataset: Path, name: str, other: str, num_steps: int) -> None:
    """Losses, samples and the figures in MLflow of two trainings are the same, the latter each once."""
    records = [TrainingRecord.read(str(dataset / run)) for run in (name, other)]
    results = [record.result for record in records if record is not None and record.result is not None]
    assert results[0]["losses"] == results[1]["losses"] and len(results[0]["losses"]) == num_steps
    drawn, others = (read_drawn(str(dataset / run / "drawn")) for run in (name, other))
    assert drawn == others and len(drawn) == num_steps
    client = mlflow.MlflowClient(f"sqlite:///{dataset}/mlflow.db")
    experiment = client.get_experiment_by_name("sana")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.run_key = '{dataset}/{name}'")
    assert len(found) == 1 and found[0].info.status == "FINISHED"
    history = client.get_metric_history(found[0].info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [tuple(point) for point in results[1]["losses"]]
