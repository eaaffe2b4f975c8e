"""kill -9 a worker, the driver, or the whole Ray at random steps: the training goes on as if nothing had been."""

import random
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.support.training_kills import Kind, compare, start_training, survive
from tests.support.training_world import PATH, STREAM, make_pipeline, make_shards, make_table

NUM_STEPS = 240


def start_job(dataset: Path, init: str, num_workers: int, name: str) -> subprocess.Popen[bytes]:
    options = {
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
    }
    return start_training("train", dataset, name, options)


@pytest.mark.slow
def test_driver_and_ray_are_killed(tmp_path: Path) -> None:
    make_table(tmp_path, make_shards([30, 20, 26], ("64x64", "64x64", "32x128")))
    start = partial(start_job, tmp_path, make_pipeline(tmp_path / "init"), 1)
    survive(start, tmp_path, "undisturbed", [])
    survive(start, tmp_path, "killed", [(40, "driver"), (130, "ray")])
    compare(tmp_path, "killed", "undisturbed", NUM_STEPS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twelve_kills_of_two_workers(tmp_path: Path) -> None:
    make_table(tmp_path, make_shards([30, 20, 26], ("64x64", "64x64", "32x128")))
    start = partial(start_job, tmp_path, make_pipeline(tmp_path / "init"), 2)
    draw = random.Random(0)
    kinds: list[Kind] = ["worker", "driver", "ray"] * 4
    draw.shuffle(kinds)
    survive(start, tmp_path, "undisturbed", [])
    steps = sorted(draw.sample(range(5, NUM_STEPS - 30), 12))
    survive(start, tmp_path, "killed", list(zip(steps, kinds, strict=True)))
    compare(tmp_path, "killed", "undisturbed", NUM_STEPS)
