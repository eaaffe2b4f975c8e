"""kill -9 a worker, the driver, or the whole Ray at random steps: the training goes on as if nothing had been."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import mlflow
import psutil
import pytest

from pipelines.storage.files import list_folder
from pipelines.train.record import TrainingRecord
from tests.support.drawn import read_drawn
from tests.support.training_world import PATH, STREAM, make_pipeline, make_shards, make_table

Kind = Literal["worker", "driver", "ray"]
NUM_STEPS = 240
PATIENCE = 600.0  # seconds


def start_job(dataset: Path, name: str, init: str, num_workers: int) -> subprocess.Popen[bytes]:
    options = {
        "dataset_uri": dataset,
        "name": name,
        "ray.num_cpus": 8,
        "tracking.uri": f"sqlite:///{dataset}/mlflow.db",
        "train.latents": PATH,
        "train.data.captioners": list(STREAM.captioners),
        "train.data.clip": STREAM.clip,
        "train.init": init,
        "train.num_steps": NUM_STEPS,
        "train.micro_batch_size": 4,
        "train.global_batch_size": 8,
        "train.num_workers": num_workers,
        "train.engine.zero_stage": num_workers,  # 1 or 2
        "train.engine.dtype": "fp32",
        "train.checkpoint_every": 15,
        "train.log_every": 1,
        "train.record_samples": "true",
        "train.max_failures": 20,
    }
    command = [sys.executable, "-m", "jobs.train", *(f"--{key}={value}" for key, value in options.items())]
    log = (dataset / f"{name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"})


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


def survive(dataset: Path, name: str, init: str, num_workers: int, kills: Sequence[tuple[int, Kind]]) -> None:
    """Train to the end through kills at (step, kind)."""
    job = start_job(dataset, name, init, num_workers)
    deadline = time.monotonic() + PATIENCE
    for step, kind in kills:
        while last_step(dataset, name) < step:
            assert job.poll() is None and time.monotonic() < deadline, (dataset / f"{name}.log").read_text()[-2000:]
            time.sleep(0.05)
        print(f"killed the {kind} after step {last_step(dataset, name)}")
        kill(job, kind)
        if kind != "worker":
            job = start_job(dataset, name, init, num_workers)
        deadline = time.monotonic() + PATIENCE
    assert job.wait(PATIENCE) == 0, (dataset / f"{name}.log").read_text()[-2000:]


def compare(dataset: Path, name: str, other: str) -> None:
    """Losses, samples and the figures in MLflow of two trainings are the same, the latter each once."""
    records = [TrainingRecord.read(str(dataset / run)) for run in (name, other)]
    results = [record.result for record in records if record is not None and record.result is not None]
    assert results[0]["losses"] == results[1]["losses"] and len(results[0]["losses"]) == NUM_STEPS
    drawn, others = (read_drawn(str(dataset / run / "drawn")) for run in (name, other))
    assert drawn == others and len(drawn) == NUM_STEPS
    client = mlflow.MlflowClient(f"sqlite:///{dataset}/mlflow.db")
    experiment = client.get_experiment_by_name("sana")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], f"tags.run_key = '{dataset}/{name}'")
    assert len(found) == 1 and found[0].info.status == "FINISHED"
    history = client.get_metric_history(found[0].info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [tuple(point) for point in results[1]["losses"]]


@pytest.mark.slow
def test_driver_and_ray_are_killed(tmp_path: Path) -> None:
    make_table(tmp_path, make_shards([30, 20, 26], ("64x64", "64x64", "32x128")))
    init = make_pipeline(tmp_path / "init")
    survive(tmp_path, "undisturbed", init, 1, [])
    survive(tmp_path, "killed", init, 1, [(40, "driver"), (130, "ray")])
    compare(tmp_path, "killed", "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twelve_kills_of_two_workers(tmp_path: Path) -> None:
    make_table(tmp_path, make_shards([30, 20, 26], ("64x64", "64x64", "32x128")))
    init = make_pipeline(tmp_path / "init")
    draw = random.Random(0)
    kinds: list[Kind] = ["worker", "driver", "ray"] * 4
    draw.shuffle(kinds)
    survive(tmp_path, "undisturbed", init, 2, [])
    survive(tmp_path, "killed", init, 2, list(zip(sorted(draw.sample(range(5, NUM_STEPS - 30), 12)), kinds, strict=True)))
    compare(tmp_path, "killed", "undisturbed")
