"""The full pipeline on a small world, as the command line runs it: once, again, and with a changed prompt."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from jobs.common.config import parse_config
from jobs.demo.config import DemoJob

ROOT = Path(__file__).parents[3]


def demo(folder: Path, config: str = "jobs/configs/demo.yaml") -> subprocess.CompletedProcess[str]:
    arguments = ["--config", config, "--dataset_uri", str(folder), "--ingest.source", str(folder / "raw")]
    small = "--world.num_images 40 --world.num_prompts 4 --ingest.rows_per_shard 20 --draw.num_steps 4 --train.num_steps 4"
    small += " --train.grid.every 2 --train.grid.num_steps 4 --train.checkpoint_every 4 --train.log_every 1"
    return subprocess.run(
        [sys.executable, "-m", "jobs.demo", *arguments, *small.split()],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    run = demo(folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, run.stdout


def test_every_stage_leaves_its_table_and_the_closing_table_tells_of_it(finished: tuple[Path, str]) -> None:
    folder, told = finished
    tables = ["images", "captions/llava", "captions/llava-next", "scores/clip", "latents/dc-ae-tiny-64"]
    for table in [*tables, "samples/before", "samples/after", "evaluations/before", "evaluations/after"]:
        assert (folder / table / "_manifest.json").exists(), table
    for page in [*tables, "train", "."]:
        assert (folder / page / "report.html").stat().st_size > 1000, page
    assert (folder / "samples/after/grid.png").exists() and (folder / "train/pipeline/pipeline.json").exists()
    for stage in ("ingest", "caption llava", "caption llava-next", "score", "extract"):
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
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {
        "ingest", "caption llava", "caption llava-next", "score", "extract", "train",
        "sample before", "evaluate before", "sample after", "evaluate after",
    }  # fmt: skip
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert runs["caption llava"].data.params["captioner.prompt"] == "Describe the image."
    assert runs["score"].data.metrics["rows"] == 40
    assert "table.captions/llava" in runs["score"].data.tags
    train = runs["train"].info.run_id
    assert [point.step for point in client.get_metric_history(train, "loss")] == [1, 2, 3, 4]
    artifacts = {artifact.path for artifact in client.list_artifacts(train)}
    assert "report.html" in artifacts and "config.yaml" in artifacts
    assert any("samples" in artifact.path for artifact in client.list_artifacts(train, "images"))


def test_a_second_run_does_no_stage_again_and_a_changed_prompt_is_refused(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}
    again = demo(folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("all there already, nothing to do") == 10
    changed = folder / "changed.yaml"
    text = (ROOT / "jobs/configs/demo.yaml").read_text()
    changed.write_text(text.replace("model: zoo://captioner-a\n", "model: zoo://captioner-a\n    prompt: Tell me more.\n"))
    refused = demo(folder, str(changed))
    assert refused.returncode == 1
    assert "config.prompt: 'Describe the image.' -> 'Tell me more.'" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_scenes_on_one_machine_for_a_dataset_of_several_are_refused() -> None:
    arguments = ["--config", str(ROOT / "jobs/configs/demo.yaml"), "--dataset_uri", "s3://bucket/demo"]
    job = parse_config(DemoJob, [*arguments, "--ingest.source", "s3://bucket/demo-raw"], prog="test", description="")
    assert job.ingest.source == "s3://bucket/demo-raw"
    with pytest.raises(ValueError, match=r"drawn where all see them, such as --ingest\.source s3://bucket/demo-raw"):
        replace(job, ingest=replace(job.ingest, source="outputs/demo/raw"))
