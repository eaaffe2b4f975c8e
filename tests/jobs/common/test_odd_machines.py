"""Odd machines and terminals: no GPU, a Ray that does not start, a pipe whose reader leaves; and advice that is true."""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import sample
from jobs.caption import CaptionJob
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode
from jobs.common.job import JobConfig
from jobs.common.resources import find_needs, telling_what_is_awaited
from jobs.common.stage_job import track_stage
from jobs.extract import ExtractJob
from jobs.train import TrainJob
from pipelines.caption.config import CaptionerConfig
from pipelines.stages.contract import Resources
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES
from pipelines.tables.table import Table
from pipelines.train.loop.config import WorkerResources
from tests.support.empty_stage import empty_stage

FILELESS = [
    *("--dataset_uri", "d", "--train.latents", "latents/x", "--train.init", "i", "--train.num_steps", "1"),
    *("--train.micro_batch_size", "2", "--train.global_batch_size", "4", "--train.data.clip", "c"),
    *("--train.data.captioners", "[a]"),
]


RESOURCES = "--sample.draw.resources"
UNRESERVABLE: dict[str, tuple[list[str], str]] = {
    "a GPU": (
        [f"{RESOURCES}.num_gpus", "1"],
        "draw.resources.num_gpus: 1 GPU are reserved, and Ray finds no GPU on this machine",
    ),
    "more CPUs than there are": (
        [f"{RESOURCES}.num_cpus", "99"],
        "num_cpus: 99 CPU are reserved, and this machine's",
    ),
    "a custom resource": ([f"{RESOURCES}.custom", "{L40S: 1}"], "custom.L40S: 1 L40S are reserved, and a local Ray has 0"),
}


@pytest.mark.parametrize("name", UNRESERVABLE)
def test_a_local_ray_that_has_none_refuses_at_once(
    name: str, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    options, message = UNRESERVABLE[name]
    arguments = ["--dataset_uri", str(tmp_path), "--sample.name", "n", "--sample.pipeline", "zoo://pipeline"]
    assert sample.main([*arguments, "--sample.prompts", "a red circle", *options]) == ExitCode.WRONG_INPUT
    told = capsys.readouterr().err
    assert message in told and told.startswith("error: ") and len(told.splitlines()) == 1, told
    assert list(tmp_path.iterdir()) == []


def test_needs_are_those_of_every_stage_and_of_all_workers_of_a_training() -> None:
    job = parse_config(
        TrainJob,
        [*FILELESS, "--train.num_workers", "2", "--train.resources.num_gpus", "1", "--train.resources.custom", "{rack: 1}"],
        prog="test",
        description="",
    )
    (need,) = find_needs(job)
    assert (need.setting, need.reserved) == ("train.resources", {"CPU": 2.0, "GPU": 2.0, "rack": 2.0})
    assert need.lacking({"CPU": 4.0, "GPU": 1.0, "rack": 2.0}) == {"GPU": 1.0}
    captioners = [CaptionerConfig(name=name, model="m", resources=Resources(num_gpus=0.5)) for name in ("a", "b")]
    found = find_needs(CaptionJob(dataset_uri="d", captioners=captioners))
    gpus = {need.setting: need.reserved["GPU"] for need in found}
    assert gpus == {"captioners[0].resources": 0.5, "captioners[1].resources": 0.5}


def test_a_cluster_that_has_none_now_says_what_is_awaited(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")  # that of this Ray does not matter: it is connected
    monkeypatch.setattr("jobs.common.resources.WAITING_SECONDS", 0.05)
    job = parse_config(TrainJob, [*FILELESS, "--train.resources.num_gpus", "1"], prog="test", description="")
    said: list[str] = []
    with telling_what_is_awaited(job, "train", said.append):
        while len(said) < 2:
            time.sleep(0.01)
    assert set(said) == {f"{'train':<22} waits for 1 GPU (train.resources.num_gpus): the cluster's nodes have 0 now"}
    with telling_what_is_awaited(replace(job, train=replace(job.train, resources=WorkerResources())), "train", said.clear):  # type: ignore[arg-type]
        time.sleep(0.2)
    assert said and not any(thread.name == "awaited-resources" for thread in threading.enumerate())


def test_a_ray_that_does_not_start_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray itself gives up after 30 seconds, with an exception or with SystemExit."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    attempts: list[object] = []

    def too_slow(**options: object) -> None:
        attempts.append(options)
        raise SystemExit("The current node timed out during startup.\nmore")

    monkeypatch.setattr("ray.init", too_slow)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    arguments = ["--dataset_uri", "d", "--sample.name", "n", "--sample.pipeline", "zoo://pipeline", "--sample.prompts", "a"]
    assert sample.main(arguments) == ExitCode.FAULT and len(attempts) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: Ray did not start here, twice: The current node timed out") and len(told.splitlines()) == 1
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert sample.main(arguments) == ExitCode.FAULT
    assert "error: the Ray cluster at RAY_ADDRESS=10.0.0.1:6379 does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan --help", "plan --images 1000", "", "nothing"])
def test_a_pipe_whose_reader_leaves_is_no_error(command: str) -> None:
    """As with `| head -1`: here the reader has gone before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "jobs", *command.split()]
    ran = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    expected = ExitCode.USAGE if command == "nothing" else ExitCode.DONE
    assert ran.returncode == expected and "BrokenPipe" not in ran.stderr and "Traceback" not in ran.stderr, ran.stderr


ADVICE = {
    "--extract.scorer": (ExtractJob, "no setting --extract.scorer any more: leave it out; .* train.data.clip"),
    "--extract.resolutio": (ExtractJob, "did you mean --extract.resolution"),
    "--train.data.captioner": (TrainJob, "did you mean --train.data.captioners"),
    "--train.qqq": (TrainJob, "there is no setting --train.qqq: see the names in --help"),
}


@pytest.mark.parametrize("option", ADVICE)
def test_advice_on_unknown_settings_is_true(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    job_class, message = ADVICE[option]
    with pytest.raises(SystemExit, match="2"):
        parse_config(job_class, ["--dataset_uri", "d", option, "x"], prog="test", description="")  # type: ignore[type-var]
    assert re.search(message, capsys.readouterr().err)


def test_a_single_setting_that_is_missing_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_config(TrainJob, FILELESS[:-2], prog="test", description="")
    told = capsys.readouterr().err
    assert "these settings are required: --train.data.captioners (whose captions compete: names of tables" in told


def test_every_stage_logs_the_tables_that_it_read(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "image_scores/x", IMAGE_SCORES)
    inputs = {"images": "f00d" * 8, "s3://far/images": "beef" * 8}
    stage = empty_stage(table, Identity("score_images", {}, {}, inputs))
    track_stage(JobConfig(dataset_uri=str(tmp_path)), "score_images x", stage)
    (run,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    read = {entry.dataset.name: (entry.dataset.digest, entry.dataset.source) for entry in run.inputs.dataset_inputs}
    assert read == {"images": ("f00d" * 8, f"{tmp_path}/images"), "s3://far/images": ("beef" * 8, "s3://far/images")}
    assert {tag.value for entry in run.inputs.dataset_inputs for tag in entry.tags} == {"score_images"}
