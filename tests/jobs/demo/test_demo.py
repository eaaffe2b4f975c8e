"""The demo from the command line, stopped on the way and resumed; then run again, and the pipeline, on the same dataset."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import mlflow
import pytest

from jobs import pipeline
from jobs.common.config import parse_config
from jobs.common.exit_codes import ExitCode
from jobs.demo import main as demo
from jobs.demo.config import DemoJob
from jobs.pipeline import PipelineJob, StagesJob
from pipelines.tables.errors import StaleTableError

ROOT = Path(__file__).parents[3]
CAPTIONERS = ("llava", "llava-next", "llava-warm")  # the last joins the finished dataset
EVALUATED = [f"evaluations/{name}/{metric}" for name in ("before", "after") for metric in ("clip_score", "shapes")]
SMALL = (
    "--world.num_images 40 --world.num_prompts 4 --ingest.rows_per_shard 20 --draw.num_steps 4 --train.num_steps 4 "
    "--train.grid.every 2 --train.grid.num_steps 4 --train.checkpoint_every 4 --train.log_every 1"
)


def arguments(folder: Path) -> list[str]:
    places = ["--dataset_uri", str(folder), "--ingest.source", str(folder / "raw")]
    return ["--config", str(ROOT / "jobs/configs/demo.yaml"), *places, *SMALL.split()]


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.demo", *arguments(folder)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A run that SIGTERM stops as soon as ingest has ended: its dataset, exit code and stderr."""
    folder = tmp_path_factory.mktemp("demo")
    job = start(folder)
    assert job.stdout is not None
    assert any(line.startswith("ingest") for line in job.stdout)
    job.send_signal(signal.SIGTERM)
    _, told = job.communicate()
    return folder, job.returncode, told


@pytest.fixture(scope="module")
def finished(stopped: tuple[Path, int, str]) -> tuple[Path, str]:
    """The same command once more, to its end: its dataset and stdout."""
    folder, _, _ = stopped
    job = start(folder)
    out, err = job.communicate()
    assert job.returncode == ExitCode.DONE, err[-3000:]
    assert "\x1b" not in out + err
    return folder, out


def parse(folder: Path) -> DemoJob:
    return parse_config(DemoJob, arguments(folder), prog="test", description="")


def pipeline_job(folder: Path) -> PipelineJob:
    """The pipeline on the demo's dataset, with all that the demo did after its training."""
    job = parse(folder)
    shared = {field.name: getattr(job, field.name) for field in fields(StagesJob)}
    return PipelineJob(prompts=demo.world_prompts(job.world), name="after", **shared)


def with_broken(job: PipelineJob) -> PipelineJob:
    """Add a captioner before the others whose model does not exist."""
    return replace(job, captioners=[replace(job.captioners[0], name="broken", model="zoo://no-such-model"), *job.captioners])


def test_a_stopped_job_says_that_it_can_go_on(stopped: tuple[Path, int, str]) -> None:
    _, code, told = stopped
    assert code == ExitCode.STOPPED == 143
    assert "run the same command again to go on from there" in told
    assert "Traceback" not in told


def test_the_next_run_goes_on_and_does_the_rest(finished: tuple[Path, str]) -> None:
    _, told = finished
    (ingest,) = (line for line in told.splitlines() if line.startswith("ingest"))
    assert ingest.endswith("all there already, nothing to do")
    done = [line.split("  ")[0] for line in told.splitlines() if line.endswith("all there already, nothing to do")]
    joined = ["embed images clip", "score original", "score llava", "score llava-next"]  # nothing of these is made again
    assert done == ["ingest", *joined]


def test_every_stage_leaves_its_table_and_the_closing_table_tells_of_it(finished: tuple[Path, str]) -> None:
    folder, told = finished
    tables = ["images", *(f"captions/{name}" for name in CAPTIONERS), "latents/dc-ae-tiny-64"]
    tables += [f"scores/clip/{name}" for name in ("original", *CAPTIONERS)]
    for table in [*tables, "image_embeds/clip", "samples/before", "samples/after", *EVALUATED]:
        assert (folder / table / "_manifest.json").exists(), table
    for page in [*tables, "train", "."]:
        assert (folder / page / "report.html").stat().st_size > 1000, page
    assert (folder / "samples/after/grid.png").exists() and (folder / "train/pipeline/pipeline.json").exists()
    for stage in ("ingest", "caption llava", "caption llava-next", "extract", "caption llava-warm"):
        assert re.search(rf"^  {stage} +40 +0 +\d+", told, re.MULTILINE), told
    exact = {
        name: int(re.search(rf"{name}.* (\d+)%\n", told)[1]) for name in ("llava ", "llava-next", "random choice", "CLIP sel")
    }
    assert exact["llava "] > exact["llava-next"]
    assert exact["CLIP sel"] >= exact["random choice"] + 10
    assert "mlflow ui --backend-store-uri sqlite:///" in told


def test_mlflow_holds_a_run_for_each_stage(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    runs = {run.info.run_name: run for run in found}  # the last of each name: the stopped job may have begun another
    assert set(runs) == {
        "ingest", "embed images clip", *(f"caption {name}" for name in CAPTIONERS), "score original",
        *(f"score {name}" for name in CAPTIONERS), "extract", "train",
        "sample before", "evaluate before", "sample after", "evaluate after",
    }  # fmt: skip
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert runs["caption llava"].data.params["captioner.prompt"] == "Describe the image."
    assert runs["score llava"].data.metrics["rows"] == 40 and runs["score original"].data.metrics["rows"] == 0
    tags = runs["score llava"].data.tags
    assert "table.captions/llava" in tags and "table.captions/llava-next" not in tags
    train = runs["train"].info.run_id
    assert [point.step for point in client.get_metric_history(train, "loss")] == [1, 2, 3, 4]
    artifacts = {artifact.path for artifact in client.list_artifacts(train)}
    assert "report.html" in artifacts and "config.yaml" in artifacts
    assert any("samples" in artifact.path for artifact in client.list_artifacts(train, "images"))


@pytest.mark.usefixtures("local_ray")
def test_a_second_run_does_no_stage_again_and_a_changed_prompt_is_refused(
    finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    job = parse(folder)
    demo.run(job)
    assert capsys.readouterr().out.count("all there already, nothing to do") == 21
    changed = replace(job.captioners[0], prompt="Tell me more.")
    with pytest.raises(StaleTableError, match=r"config\.prompt: 'Describe the image\.' -> 'Tell me more\.'"):
        demo.run(replace(job, captioners=[changed, *job.captioners[1:]]))
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


@pytest.mark.usefixtures("local_ray")
def test_the_pipeline_finds_the_same_stages_done(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = finished
    pipeline.run(pipeline_job(folder))
    told = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("all there already, nothing to do") for line in told) == 11
    assert told[-1] == f"pipeline  {folder / 'train/pipeline'}"


@pytest.mark.usefixtures("local_ray")
def test_a_captioner_that_nobody_needs_fails_at_the_end(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        pipeline.run(with_broken(pipeline_job(finished[0])))
    told = capsys.readouterr()
    assert "caption broken         failed: " in told.err
    assert told.out.count("all there already, nothing to do") == 11 and "\npipeline  " in told.out


@pytest.mark.usefixtures("local_ray")
def test_scoring_waits_for_the_captioners_that_it_names(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    job = with_broken(pipeline_job(finished[0]))
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        named = ("broken", "llava")
        data = replace(job.train.data, captioners=named)
        pipeline.run(replace(job, scorer=replace(job.scorer, captioners=named), train=replace(job.train, data=data)))
    stages = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert stages == ["ingest", "caption llava", "caption llava-next"]


def test_scenes_on_one_machine_for_a_dataset_of_several_are_refused() -> None:
    places = ["--dataset_uri", "s3://bucket/demo", "--ingest.source", "s3://bucket/demo-raw"]
    job = parse_config(DemoJob, [*arguments(Path("demo")), *places], prog="test", description="")
    assert job.ingest.source == "s3://bucket/demo-raw"
    with pytest.raises(ValueError, match=r"drawn where all see them, such as --ingest\.source s3://bucket/demo-raw"):
        replace(job, ingest=replace(job.ingest, source="outputs/demo/raw"))
