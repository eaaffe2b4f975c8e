"""The configurations of real runs: each is whole, each stage begins where the one before it ends, and a dry run tells of it."""

from pathlib import Path

import pytest
import ray
import torch

from jobs.common.config import parse_config
from jobs.train import TrainJob, main
from pipelines.train.preflight.models import find_shapes
from sana_model.nn.transformer import SanaTransformer

CONFIGS = Path("jobs/configs/sana")
NUM_WEIGHTS = {"sana-0.6b": 591_747_872, "sana-1.6b": 1_604_462_752}
SHIFTS = {512: 3.0, 1024: 3.0, 2048: 3.0, 4096: 6.0}
MICRO_BATCHES = {512: 64, 1024: 64, 2048: 4, 4096: 4}
POSITION_SCALES = {512: None, 1024: None, 2048: 1.0, 4096: 2.0}


def read(name: str, *overrides: str) -> TrainJob:
    return parse_config(TrainJob, ["--config", str(CONFIGS / f"{name}.yaml"), *overrides], prog="train", description="")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_each_resolves_to_a_published_shape(name: str) -> None:
    job = read(name)
    assert job.name == name
    shapes = find_shapes(job.train, [])
    with torch.device("meta"):
        model = SanaTransformer(shapes.transformer)
    assert job.train.preset is not None
    assert sum(weight.numel() for weight in model.parameters()) == NUM_WEIGHTS[job.train.preset]
    assert shapes.text_encoder_size == 2_614_341_888 and shapes.autoencoder_size == 312_250_275
    assert shapes.autoencoder is not None and shapes.autoencoder.compression == 32


@pytest.mark.parametrize("size", ["0.6b", "1.6b"])
def test_the_cascade_is_the_published_one(size: str) -> None:
    before = None
    for resolution in (512, 1024, 2048, 4096):
        job = read(f"sana-{size}-{resolution}")
        train, config = job.train, find_shapes(job.train, []).transformer
        assert train.init == (None if before is None else f"{job.dataset_uri}/{before}/pipeline")
        assert train.latents.endswith(f"-{resolution}")
        assert train.flow.shift == (4.0 if (size, resolution) == ("0.6b", 1024) else SHIFTS[resolution])
        assert (config.base_size, config.position_scale) == (resolution // 32, POSITION_SCALES[resolution])
        assert train.micro_batch_size == (128 if (size, resolution) == ("0.6b", 512) else MICRO_BATCHES[resolution])
        optim = train.optim
        assert (optim.optimizer, optim.lr, optim.warmup_steps, optim.max_grad_norm) == ("came", 1e-4, 2000, 0.1)
        assert (optim.came.betas, optim.came.eps) == ((0.9, 0.999, 0.9999), (1e-30, 1e-16))
        assert train.engine.checkpoint_blocks == 1 and train.data.caption_dropout == 0.1
        before = job.name


def test_a_dry_run_starts_nothing_and_tells_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ray, "init")  # whatever would start one fails
    config = ["--config", str(CONFIGS / "sana-1.6b-1024.yaml"), "--dataset_uri", str(tmp_path), "--dry_run"]
    assert main(config) == 0
    told = capsys.readouterr().out
    for line in ("1,604,462,752 weights", "activations", "total, forward and backward", "512 images = 64", "PROBLEMS"):
        assert line in told, told
    assert not list(tmp_path.iterdir())
    assert main([*config, "--train.init", "nowhere", "--train.preset", "null"]) == 1
    assert "no file or folder 'nowhere'" in capsys.readouterr().err
