"""What the stage jobs share, without Ray: a stage whose shards are made in this process."""

import signal
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from jobs import caption, duplicates, embed_captions, embed_images, evaluate, extract, import_captions, score, score_images
from jobs.common.exit_codes import ExitCode
from jobs.common.job import JobConfig, TableJobConfig, run_parsed
from jobs.common.ray import JobStopped, stop_on_sigterm
from jobs.common.stage_job import track_stage
from pipelines.stages.contract import OnProgress, StageResult
from pipelines.storage.lease import Leases
from pipelines.tables.identity import Identity
from pipelines.tables.schema import IMAGE_SCORES
from pipelines.tables.table import REPORT, Table
from tests.support.empty_stage import empty_stage


def test_a_table_whose_job_was_killed_before_its_report_gets_one(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "image_scores/x", IMAGE_SCORES)
    stage = empty_stage(table, Identity("score_images", {}, {}, {}))
    reports: list[str] = []

    def make_report() -> str:
        reports.append(f"<p>report {len(reports)}</p>")
        return reports[-1]

    stage(lambda progress: None)
    for _ in range(2):
        assert track_stage(JobConfig(dataset_uri=str(tmp_path)), "x", stage, make_report=make_report).was_done
        assert [(tmp_path / "image_scores/x" / REPORT).read_text()] == reports
    assert not (tmp_path / "mlflow.db").exists()


def test_a_signal_that_was_lost_on_its_way_stops_the_job_at_its_next_progress(tmp_path: Path) -> None:
    table = Table(str(tmp_path), "image_scores/x", IMAGE_SCORES)
    stage, job = empty_stage(table, Identity("score_images", {}, {}, {})), JobConfig(dataset_uri=str(tmp_path))
    with stop_on_sigterm():
        with suppress(JobStopped):  # as a finalizer does
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(JobStopped):
            track_stage(job, "x", stage)
    track_stage(job, "x", stage)  # the next job of this process

    def lose(on_progress: OnProgress, leases: Leases) -> StageResult:
        with suppress(JobStopped):
            signal.raise_signal(signal.SIGTERM)
        return stage(on_progress, leases)

    with stop_on_sigterm(), pytest.raises(JobStopped):
        track_stage(job, "x", lose)


def test_ctrl_c_ends_a_job_as_sigterm_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(job: TableJobConfig) -> None:
        raise KeyboardInterrupt

    assert run_parsed(TableJobConfig(dataset_uri=str(tmp_path)), interrupted) == ExitCode.STOPPED
    assert "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "arguments", "missing"),
    [
        (caption, ["--captioner.name", "a", "--captioner.model", "zoo://captioner-a"], "images"),
        (embed_images, ["--clip.name", "clip", "--clip.model", "zoo://clip"], "images"),
        (score_images, ["--scorer.name", "x", "--scorer.clip", "clip", "--scorer.head", "x.pth"], "image_embeds/clip"),
        (duplicates, [], "images"),
        (import_captions, ["--captions.name", "a", "--captions.source", "."], "images"),
        (score, ["--scorer.name", "clip", "--scorer.model", "zoo://clip", "--scorer.captioners", "[a]"], "captions/a"),
        (extract, ["--extract.name", "ae", "--extract.autoencoder", "zoo://dc-ae", "--extract.resolution", "64"], "images"),
        (embed_captions, ["--embed.name", "t", "--embed.text_encoder", "zoo://t", "--embed.captioners", "[a]"], "captions/a"),
        (evaluate, ["--evaluate.name", "x"], "samples/x"),
    ],
)
def test_a_stage_without_its_input_says_so_in_one_line_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: ModuleType, arguments: list[str], missing: str
) -> None:
    assert job.main(["--dataset_uri", str(tmp_path / "data"), *arguments]) == ExitCode.WRONG_INPUT
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"there is no table '{missing}' in" in told[0]
    assert not (tmp_path / "data").exists()
