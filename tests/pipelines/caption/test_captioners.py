"""Several captioners in one job: one MLflow run and one table each, and where one fails the others go on."""

from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from jobs import caption
from jobs.caption import CaptionJob
from jobs.common.config import parse_config
from pipelines.caption.config import CaptionerConfig, HttpConfig, QualityConfig, SamplingConfig
from pipelines.reports.captions import captioners_report
from pipelines.tables.errors import MissingTableError, StageError
from tests.support.caption_world import BROKEN, captions, image_row, scene, write_images
from tests.support.html_page import check_page
from tests.support.http_server import free_port
from tests.support.without_ray import run_without_ray

ROOT = Path(__file__).parents[3]
GOOD = CaptionerConfig(
    name="llava",
    model="zoo://captioner-a",
    dtype="float32",
    sampling=SamplingConfig(max_new_tokens=48),
    max_reject_share=0.2,
)
CUT = replace(GOOD, name="cut", model="zoo://captioner-b", sampling=SamplingConfig(max_new_tokens=5))
STRICT = replace(CUT, name="strict", quality=QualityConfig(cut_off="reject"))
GONE = replace(GOOD, name="gone", engine="http", http=HttpConfig(base_url=f"http://127.0.0.1:{free_port()}/v1", max_attempts=1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[CaptionJob, str]:
    """The job that ran, and what it said at its end."""
    rows = [image_row(number, scene(number)) for number in range(12)]
    rows[7] = image_row(7, BROKEN)
    dataset = write_images(tmp_path_factory.mktemp("data"), rows, 6)
    job = CaptionJob(dataset_uri=dataset, captioners=[STRICT, GONE, GOOD, CUT])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(StageError) as failure:
        run_without_ray(patch)
        caption.run(job)
    return job, str(failure.value)


def test_the_failure_of_one_does_not_stop_the_others(finished: tuple[CaptionJob, str]) -> None:
    job, told = finished
    assert told == "2 of 4 captioners failed: strict, gone"
    for name in ("llava", "cut"):
        assert sum(len(rows) for rows in captions(job.dataset_uri, name).values()) == 11
    assert captions(job.dataset_uri, "gone") == {}
    assert all("cut_off" in row["flags"] for rows in captions(job.dataset_uri, "cut").values() for row in rows)


def test_each_has_a_run_of_its_own(finished: tuple[CaptionJob, str]) -> None:
    job, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{job.dataset_uri}/mlflow.db")
    experiment = client.get_experiment_by_name("sana")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "caption llava": "FINISHED", "caption cut": "FINISHED", "caption strict": "FAILED", "caption gone": "FAILED",
    }  # fmt: skip
    metrics = runs["caption cut"].data.metrics
    assert metrics["flagged.cut_off.mean"] == 1.0 and metrics["rejects.not_an_image"] == 1
    assert runs["caption llava"].data.params["captioner.model"] == "zoo://captioner-a"


def test_the_page_shows_them_side_by_side(finished: tuple[CaptionJob, str]) -> None:
    job, _ = finished
    page = check_page((Path(job.dataset_uri) / "captions/report.html").read_text())
    assert "cut_off 0 (0.0%) 11 (100.0%)" in page.text and "not_an_image 1 1" in page.text
    for name in ("llava", "cut"):
        for rows in captions(job.dataset_uri, name).values():
            assert all(row["caption"] in page.text for row in rows)
    with pytest.raises(MissingTableError, match="captions/nobody"):
        captioners_report(job.dataset_uri, ["llava", "nobody"])


def test_one_of_them_can_be_run_alone(
    finished: tuple[CaptionJob, str], capsys: pytest.CaptureFixture[str], without_ray: None
) -> None:
    job, _ = finished
    caption.run(replace(job, only="llava"))
    assert "all there already, nothing to do" in capsys.readouterr().out
    with pytest.raises(StageError, match="gave up after 1 attempts"):
        caption.run(replace(job, only="gone"))


def test_a_list_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no captioner is configured"):
        CaptionJob(dataset_uri="x")
    with pytest.raises(ValueError, match="captioners named 'llava' are there twice"):
        CaptionJob(dataset_uri="x", captioner=GOOD, captioners=[GOOD])
    with pytest.raises(ValueError, match="only='blip' is none of the captioners llava, cut"):
        CaptionJob(dataset_uri="x", captioners=[GOOD, CUT], only="blip")


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "jobs/configs").glob("caption*.yaml")))
def test_the_shipped_captioners_can_be_read(config: str) -> None:
    job = parse_config(CaptionJob, ["--config", str(ROOT / "jobs/configs" / config)], prog="caption", description="")
    assert all(captioner.prompt and captioner.model for captioner in job.all)
