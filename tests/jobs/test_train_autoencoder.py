"""jobs.train_autoencoder: a training on Ray with its judgement and page, what a dry run tells, and the published phases."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray

from jobs.common.config import parse_config
from jobs.train_autoencoder import TrainAutoencoderJob, main, run
from pipelines.evaluate.metric import metric_table
from pipelines.evaluate.metric_config import FIGURES
from pipelines.evaluate.reconstruction_config import ReconstructionConfig
from pipelines.tables.chance import is_held_out
from pipelines.tracking.config import TrackingConfig
from pipelines.train_autoencoder.config import CropConfig, LossConfig, PerceptualConfig, PictureConfig
from pipelines.train_autoencoder.preflight import run_preflight
from sana_model.nn.autoencoder import DCAutoencoder
from tests.support.autoencoder_world import make_images, tiny_training

CONFIGS = Path("jobs/configs/dc-ae")


@pytest.mark.usefixtures("local_ray", "without_ray")
def test_a_training_is_judged_before_and_after_by_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path, [14, 10])
    training = tiny_training(
        init="zoo://pipeline/autoencoder",
        parts=("decoder",),
        num_steps=4,
        losses=LossConfig(),
        data=CropConfig(sizes=(24,), decode_processes=0, shuffle_shards=1, held_out_share=0.3),
        validation=PictureConfig(num_images=3, grid=2, every=4),
    )
    job = TrainAutoencoderJob(
        dataset_uri=str(tmp_path),
        train=training,
        name="tuned",
        judge_sizes=(24, 32),
        reconstruction=ReconstructionConfig(perceptual="zoo://clip"),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )

    def table_of(when: str) -> Path:
        return tmp_path / "evaluations" / f"tuned-{when}-32" / "reconstruction"

    result = run(job)
    assert result.num_steps == 4 and result.psnr is not None and result.scaling_factor == 1.0568
    told = capsys.readouterr().out
    ids = [row_id for shard in images.list_shards() for row_id in images.read_shard(shard, ["id"])["id"].to_pylist()]
    for size in (24, 32):
        for when in ("before", "after"):
            assert f"{size} px, {when}: psnr " in told and "rfd" in told
            table = metric_table(str(tmp_path), f"tuned-{when}-{size}", "reconstruction")
            judged = [row_id for shard in table.list_shards() for row_id in table.read_shard(shard, ["id"])["id"].to_pylist()]
            assert judged == [row_id for row_id in ids if is_held_out(row_id, 0.3)] and judged
    assert f"the page: {tmp_path}/tuned/report.html" in told
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert "Before and after" in page and "The autoencoder learns to give pictures back" in page
    assert json.loads((tmp_path / "tuned" / "training.json").read_text())["stage"] == "train_autoencoder"
    runs = mlflow.MlflowClient(job.tracking.uri).search_runs(["1"])
    (logged,) = (one.data.metrics for one in runs if one.info.run_name == "evaluate tuned")
    assert logged["after.32.psnr"] == json.loads((table_of("after") / FIGURES).read_text())["psnr"] > 0
    again = run(job)
    assert again.was_done and again.losses == result.losses
    (tmp_path / "tuned" / "report.html").unlink()  # a job that ended while it judged
    (table_of("before") / "_manifest.json").unlink()
    assert run(job).was_done and (tmp_path / "tuned" / "report.html").read_text() == page
    assert (table_of("before") / "_manifest.json").exists()


def test_a_dry_run_starts_nothing_and_tells_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ray, "init")  # whatever would start one fails
    make_images(tmp_path, [5, 4])
    config = ["--config", str(CONFIGS / "phase3.yaml"), "--dataset_uri", str(tmp_path), "--dry_run"]
    assert main(config) == 0
    told = capsys.readouterr().out
    for line in (
        "decoder.project_out 3,715; together 3,715 of 312,250,275 weights",
        "discriminator, its optimizer and gradients",
        "96 crops = 24 in a micro-batch x 4 workers x 1 accumulated",
        "days on 4 A100",
        "100.0% are too small for crops of 256 pixels",
        "init=data/dc-ae-phase2/autoencoder is not there (yet)",
    ):
        assert line in told, told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


@pytest.mark.parametrize(("size", "told"), [(100, "judge_sizes: 100 pixels do not divide by 8"), (8, "at least 11 pixels")])
def test_sizes_that_cannot_be_judged_are_told_before_the_training(size: int, told: str) -> None:
    training = tiny_training(data=CropConfig(sizes=(32,), held_out_share=0.3))
    with pytest.raises(ValueError, match=told):
        TrainAutoencoderJob(dataset_uri="x", train=training, judge_sizes=(size,))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("--judge_sizes [60]", "error: judge_sizes: 60 pixels do not divide by 8"),
        ("--reconstruction.inception nowhere", "error: reconstruction.inception: no file or folder 'nowhere'"),
        ("--train.init zoo://nothing --judge_sizes [64]", "error: train.init: the zoo holds no 'nothing'"),
    ],
)
def test_what_would_end_the_job_when_it_judges_is_told_before_ray_starts(
    settings: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ray, "init")
    start = ["--train.preset", "null", "--train.shape.widths", "null", "--train.init", "zoo://pipeline/autoencoder"]
    config = ["--config", str(CONFIGS / "shapes.yaml"), "--dataset_uri", str(tmp_path), *start, *settings.split()]
    assert main(config) == 1 and capsys.readouterr().err.startswith(told)


def test_a_dry_run_tells_what_the_training_will_refuse(tmp_path: Path) -> None:
    make_images(tmp_path, [6, 6])

    def problems(**changes: Any) -> str:
        return "\n".join(run_preflight(str(tmp_path), tiny_training(**changes), device_gib=80).problems)

    for changes, told in (
        (
            {"data": CropConfig(sizes=(24,), held_out_share=1e-6)},
            "will refuse this: .* has no picture of 24 pixels to measure on",
        ),
        ({"losses": LossConfig(perceptual=PerceptualConfig(model="zoo://pipeline/text_encoder"))}, "it sees no pictures"),
        ({"losses": LossConfig(perceptual=PerceptualConfig(model="someone/vit"))}, "someone/vit is not on this machine"),
        ({"losses": LossConfig(perceptual=PerceptualConfig(model="vgg.pth", kind="lpips"))}, "model=vgg.pth is not there"),
    ):
        assert re.search(told, problems(**changes)), changes
    assert problems(data=CropConfig(sizes=(24,), held_out_share=0.3)) == ""
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"init: .*empty holds no \.safetensors file"):
        problems(init=str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["phase3", "small"])
def test_a_printed_configuration_is_the_same_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--config", f"{CONFIGS}/{name}.yaml"]
    with pytest.raises(SystemExit):
        parse_config(TrainAutoencoderJob, [*line, "--print_config"], prog="", description="")
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    first, second = (
        parse_config(TrainAutoencoderJob, given, prog="", description="") for given in (line, ["--config", str(printed)])
    )
    assert first == second


def test_the_published_phases_follow_each_other() -> None:
    jobs = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        jobs[path.stem] = parse_config(TrainAutoencoderJob, ["--config", str(path)], prog="", description="")
    for before, after in (("phase1", "phase2"), ("phase2", "phase3")):
        assert jobs[after].train.init == f"{jobs[before].dataset_uri}/{jobs[before].name}/autoencoder"
    phases = [jobs[name].train for name in ("phase1", "phase2", "phase3")]
    found = [(phase.parts, phase.optim.lr, phase.optim.weight_decay) for phase in phases]
    assert found == [
        (("all",), 6.4e-5, 0.1),
        (("encoder.project_out", "decoder.project_in"), 1.6e-5, 1e-3),
        (("decoder.project_out",), 5.4e-5, 0.0),
    ]
    assert jobs["phase3"].train.optim.betas == (0.5, 0.9) and jobs["phase3"].train.losses.adversarial is not None
    assert not any(jobs[name].train.losses.adversarial for name in ("phase1", "phase2"))
    shipped = DCAutoencoder.from_pretrained("zoo://pipeline/autoencoder").config
    assert jobs["shapes"].train.new_shape() == replace(shipped, scaling_factor=1.0)
