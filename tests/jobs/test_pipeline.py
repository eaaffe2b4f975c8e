"""All stages as one job: stopped in the middle, run again, and with captioners that fail."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import pipeline
from jobs.common import job as job_module
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode, exit_code
from jobs.pipeline import PipelineJob
from pipelines.shapes.drawing import write_folder
from pipelines.shapes.scenes import ShapesConfig
from pipelines.storage.errors import LeaseHeldError, StorageError
from pipelines.tables.errors import MissingTableError, StageError, StaleTableError, TooManyRejectsError, TrainingError

ROOT = Path(__file__).parents[2]


def write_config(folder: Path) -> Path:
    """The demo's stages on 40 drawn scenes."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "jobs/configs/demo.yaml").read_text())
    del values["world"]
    values["dataset_uri"] = str(folder / "data")
    values["ingest"] = {"source": str(folder / "raw"), "rows_per_shard": 20}
    values["train"] |= {"num_steps": 4, "checkpoint_every": 4, "log_every": 1, "grid": {}}
    values["prompts"] = ["a large red solid circle in the center of a black background"]
    values["draw"] |= {"num_steps": 4}
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.pipeline", "--config", str(config)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_folder(str(folder / "raw"), 30_000_000, 40, ShapesConfig())
    return write_config(folder)


@pytest.fixture(scope="module")
def stopped(config: Path) -> tuple[int, str]:
    """A run that SIGTERM stops as soon as its first stage has ended: exit code and stderr."""
    job = start(config)
    assert job.stdout is not None
    assert job.stdout.readline().startswith("ingest")
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate()
    return job.returncode, told


@pytest.fixture(scope="module")
def finished(config: Path, stopped: tuple[int, str]) -> subprocess.CompletedProcess[str]:
    job = start(config)
    out, err = job.communicate()
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def test_a_stopped_job_says_that_it_can_go_on(stopped: tuple[int, str]) -> None:
    code, told = stopped
    assert code == ExitCode.STOPPED == 143
    assert "run the same command again to go on from there" in told
    assert "Traceback" not in told


def test_the_next_run_goes_on_and_does_the_rest(config: Path, finished: subprocess.CompletedProcess[str]) -> None:
    assert finished.returncode == ExitCode.DONE, finished.stderr[-3000:]
    told = finished.stdout.splitlines()
    assert told[0].startswith("ingest") and told[0].endswith("all there already, nothing to do")
    folder = config.parent / "data"
    assert told[-1] == f"pipeline  {folder / 'train/pipeline'}"
    for table in ("captions/llava", "captions/llava-next", "scores/clip", "samples/trained", "evaluations/trained"):
        assert (folder / table / "_manifest.json").exists(), table
    assert "\x1b" not in finished.stdout + finished.stderr


def parse(config: Path, **changes: object) -> PipelineJob:
    job = parse_config(PipelineJob, ["--config", str(config)], prog="test", description="")
    return replace(job, **changes)


def with_broken(job: PipelineJob) -> PipelineJob:
    """A captioner before the others whose model is nowhere."""
    return replace(job, captioners=[replace(job.captioners[0], name="broken", model="zoo://no-such-model"), *job.captioners])


@pytest.mark.usefixtures("finished")
def test_a_captioner_that_nobody_needs_fails_at_the_end(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        pipeline.run(with_broken(parse(config)))
    told = capsys.readouterr()
    assert "caption broken         failed: " in told.err
    assert told.out.count("all there already, nothing to do") == 8 and "\npipeline  " in told.out


@pytest.mark.usefixtures("finished")
def test_scoring_waits_for_the_captioners_that_it_names(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = with_broken(parse(config))
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        pipeline.run(replace(job, scorer=replace(job.scorer, captioners=("broken", "llava"))))
    stages = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert stages == ["ingest", "caption llava", "caption llava-next"]


def test_stages_that_do_not_fit_together_are_refused(config: Path) -> None:
    job = parse(config)
    with pytest.raises(ValueError, match=r"train\.latents=latents/dc-ae-tiny-64 is not what extract makes, latents/other-64"):
        replace(job, extract=replace(job.extract, name="other"))
    with pytest.raises(ValueError, match=r"extract\.scorer=clip is not scorer\.name=siglip"):
        replace(job, scorer=replace(job.scorer, name="siglip"))
    with pytest.raises(ValueError, match=r"\['llava'\] name a table more than once"):
        replace(job, captioners=[job.captioners[0], job.captioners[0]])


EXIT_CODES: Mapping[type[Exception], int] = {
    MissingTableError: 1,
    StaleTableError: 1,
    FileNotFoundError: 1,
    ValueError: 1,
    TooManyRejectsError: 3,
    TrainingError: 4,
    StorageError: 5,
    StageError: 5,
    LeaseHeldError: 5,
}


@pytest.mark.parametrize("error", EXIT_CODES)
def test_exit_codes_say_why(error: type[Exception]) -> None:
    assert exit_code(error("what happened")) == EXIT_CODES[error]


@pytest.mark.parametrize("error", [ValueError, RuntimeError, MemoryError])
def test_a_fault_keeps_its_traceback(
    error: type[Exception], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_module, "start_ray", lambda config: nullcontext())

    def fail(job: PipelineJob) -> None:
        raise error("what happened")

    code = job_module.run_job(PipelineJob, fail, ["--config", str(config)], prog="test", description="")
    told = capsys.readouterr().err
    assert code == (ExitCode.WRONG_INPUT if error is ValueError else ExitCode.FAULT)
    assert ("Traceback" in told) == (error is not ValueError) and "what happened" in told
