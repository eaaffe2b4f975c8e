"""kill -9 a worker, the driver, or the whole Ray at random steps of a training with a discriminator: nothing shows of it."""

import random
import subprocess
from functools import partial
from pathlib import Path

import pytest

from tests.support.autoencoder_world import make_images
from tests.support.training_kills import Kind, compare, start_training, survive

NUM_STEPS = 200


def start_job(dataset: Path, name: str) -> subprocess.Popen[bytes]:
    options = {
        "train.preset": "tiny",
        "train.shape.widths": [8, 16, 16, 32],
        "train.data.sizes": [24, 32],
        "train.data.held_out_share": 0.2,
        "train.data.decode_processes": 1,
        "train.losses.latent_noise": 0.1,
        "train.losses.adversarial.layers": 1,
        "train.losses.adversarial.width": 8,
        "train.losses.adversarial.adaptive": "true",
        "train.latent_channels": [4, 8],
        "train.validation.every": 50,
        "train.num_steps": NUM_STEPS,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 4,
        "train.num_workers": 2,
        "train.engine.dtype": "fp32",
    }
    return start_training("train_autoencoder", dataset, name, options)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_six_kills_of_two_workers(tmp_path: Path) -> None:
    make_images(tmp_path, [14, 10, 12])
    start = partial(start_job, tmp_path)
    draw = random.Random(0)
    kinds: list[Kind] = ["worker", "driver", "ray"] * 2
    draw.shuffle(kinds)
    survive(start, tmp_path, "undisturbed", [])
    steps = sorted(draw.sample(range(5, NUM_STEPS - 30), 6))
    survive(start, tmp_path, "killed", list(zip(steps, kinds, strict=True)))
    compare(tmp_path, "killed", "undisturbed", NUM_STEPS)
