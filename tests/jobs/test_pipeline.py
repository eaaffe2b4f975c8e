"""The configuration of all stages as one job, and exit codes. Runs of it are in demo/test_demo.py, on the demo's dataset."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.common import job as job_module
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode, exit_code
from jobs.pipeline import PipelineJob
from pipelines.storage.errors import LeaseHeldError, StorageError
from pipelines.tables.errors import MissingTableError, StageError, StaleTableError, TooManyRejectsError, TrainingError
from pipelines.train.stream.config import WeightedTable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The demo's stages, as a pipeline's YAML."""
    values: dict[str, Any] = yaml.safe_load((ROOT / "jobs/configs/demo.yaml").read_text())
    del values["world"], values["late_captioner"]
    values["prompts"] = ["a large red solid circle in the center of a black background"]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def parse(config: Path) -> PipelineJob:
    return parse_config(PipelineJob, ["--config", str(config)], prog="test", description="")


def test_stages_that_do_not_fit_together_are_refused(config: Path) -> None:
    job = parse(config)
    with pytest.raises(ValueError, match=r"train\.latents=latents/dc-ae-tiny-64 is not what extract makes, latents/other-64"):
        replace(job, extract=replace(job.extract, name="other"))
    with pytest.raises(ValueError, match=r"train\.data\.clip=clip is not scorer\.name=siglip"):
        replace(job, scorer=replace(job.scorer, name="siglip"))
    with pytest.raises(ValueError, match=r"\['llava'\] compete in train, and scorer\.captioners does not name them"):
        replace(job, scorer=replace(job.scorer, captioners=("original", "llava-next")))
    table = WeightedTable(latents=job.extract.path, captioners=("late",))
    with pytest.raises(ValueError, match=r"\['late'\] compete in train"):
        replace(job, train=replace(job.train, latents=[table]))
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

    code = job_module.run_job(PipelineJob, fail, ["--config", str(config)], name="pipeline")
    told = capsys.readouterr().err
    assert code == (ExitCode.WRONG_INPUT if error is ValueError else ExitCode.FAULT)
    assert ("Traceback" in told) == (error is not ValueError) and "what happened" in told
