"""The autoencoder's workers without Ray: interruptions, other world sizes, bad steps, pictures, and what they write."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from PIL import Image

from pipelines.extract.encode import find_encoder
from pipelines.tables.errors import TrainingInputError
from pipelines.tracking.config import TrackingConfig
from pipelines.train.engine.checkpoints import Checkpoint, read_weights
from pipelines.train.engine.config import EmaConfig, EngineConfig, OptimConfig
from pipelines.train.loop.config import BadStepConfig
from pipelines.train.loop.task import TrainTask
from pipelines.train_autoencoder.config import (
    AdversarialConfig,
    CropConfig,
    LossConfig,
    PerceptualConfig,
    PictureConfig,
    ShapeConfig,
    TrainAutoencoderConfig,
)
from pipelines.train_autoencoder.worker import AutoencoderWorker
from sana_model.nn.autoencoder import DCAutoencoder
from tests.support.autoencoder_world import SHAPE, make_images, tiny_training
from tests.support.one_worker import one_worker
from tests.support.training_ranks import train_on_ranks

ADVERSARIAL = AdversarialConfig(layers=1, width=8, optim=OptimConfig(lr=1e-3, betas=(0.5, 0.9)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    make_images(folder, [14, 10, 12])
    return folder


@pytest.fixture(scope="module")
def config() -> TrainAutoencoderConfig:
    losses = LossConfig(latent_noise=0.1, latent_penalty=0.01, adversarial=ADVERSARIAL)
    return tiny_training(losses=losses, checkpoint_every=4, keep_checkpoints=3, latent_channels=(2, 4))


def test_interrupted_trainings_go_on_exactly(tmp_path: Path, dataset: Path, config: TrainAutoencoderConfig) -> None:
    """Autoencoder, discriminator, both optimizers and the stream, from the last checkpoint that is whole."""
    longer = replace(config, num_steps=14)
    straight = train_on_ranks(tmp_path, dataset, [("straight", longer), ("run", config)])["straight"]
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-000010", "step-000008"):
        assert (checkpoints / name / "discriminator" / "rank-00000.json").exists()
    (checkpoints / "step-000010" / "discriminator" / "rank-00000.json").unlink()  # damaged: the one before is taken
    resumed = train_on_ranks(tmp_path, dataset, [("run", longer)])["run"]
    assert resumed.error is None and resumed.losses == straight.losses
    for part in ("", "discriminator/"):
        first, second = (
            read_weights(f"{tmp_path}/{name}/checkpoints/step-000014/{part}", average=False) for name in ("straight", "run")
        )
        assert all(torch.equal(first[name], second[name]) for name in first)
    without = replace(longer, num_steps=16, losses=replace(config.losses, adversarial=None))
    error = train_on_ranks(tmp_path, dataset, [("run", without)])["run"].error
    assert error is not None and "further models in it: discriminator, in this training: none" in error


def test_two_workers_then_one_with_other_zero_stages(tmp_path: Path, dataset: Path, config: TrainAutoencoderConfig) -> None:
    for num_workers, zero_stage, num_steps in ((2, 2, 4), (1, 1, 8), (2, 0, 12)):
        engine = EngineConfig(zero_stage=zero_stage, dtype="fp32")  # type: ignore[arg-type]
        part = replace(config, num_workers=num_workers, engine=engine, num_steps=num_steps, record_samples=True)
        trained = train_on_ranks(tmp_path, dataset, [("run", part)])["run"]
        assert trained.error is None and list(trained.losses) == list(range(1, num_steps + 1))
    lines = [json.loads(line) for file in (tmp_path / "run" / "drawn").iterdir() for line in file.read_text().splitlines()]
    drawn = [(line["epoch"], line["id"]) for line in lines]
    assert len(drawn) == 48 == len(set(drawn))
    states = Checkpoint.open(str(tmp_path / "run" / "checkpoints" / "step-000012")).states
    assert all(state["stream"]["step"] == 12 for state in states)


def test_bad_steps(tmp_path: Path, dataset: Path, config: TrainAutoencoderConfig) -> None:
    """A rate of learning that breaks the discriminator alone: its gradients count like the autoencoder's."""
    broken = replace(ADVERSARIAL, optim=OptimConfig(lr=1e30, max_grad_norm=0.0))
    wild = replace(config, losses=replace(config.losses, adversarial=broken), num_steps=6)
    policies = [(policy, replace(wild, bad_steps=BadStepConfig(policy=policy, max_in_a_row=3))) for policy in ("stop", "skip")]  # type: ignore[arg-type]
    apart = replace(broken, start_step=100, warm_start_steps=100)  # it learns, and the autoencoder's own steps stay good
    warm = replace(policies[1][1], losses=replace(config.losses, adversarial=apart))
    trained = train_on_ranks(tmp_path, dataset, [*policies, ("warm", warm)])
    error = trained["stop"].error
    assert error is not None and "was bad: loss" in error
    for name in ("skip", "warm"):  # it never recovers
        assert trained[name].error is not None and trained[name].num_bad >= 3, name
    assert "norm of the discriminator's gradients" in (trained["warm"].error or "")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("broken", ["autoencoder", "discriminator"])
def test_a_step_that_is_bad_for_one_of_the_two_changes_neither(
    tmp_path: Path, dataset: Path, config: TrainAutoencoderConfig, broken: str, dtype: Any
) -> None:
    skip = replace(config, bad_steps=BadStepConfig(policy="skip"), engine=EngineConfig(zero_stage=0, dtype=dtype))
    task = TrainTask(config=skip, dataset_uri=str(dataset), inputs={}, output_uri=str(tmp_path / "run"))
    with one_worker():
        worker = AutoencoderWorker(task, device=torch.device("cpu"))
    worker.restore()
    assert worker.adversary is not None and worker.train_step()
    engines = {"autoencoder": worker.engine, "discriminator": worker.adversary.engine}

    def state() -> list[torch.Tensor]:
        tensors = [one for engine in engines.values() for one in engine.master_weights()]
        tensors += [one for engine in engines.values() for moments in engine.moments().values() for one in moments]
        return [one.detach().clone() for one in (*tensors, *worker.ema.averages)]

    before = state()
    weight = next(engines[broken].module.parameters())
    hook = weight.register_hook(lambda gradient: gradient * float("nan"))
    assert not worker.train_step() and worker.guard.num_bad == 1
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    hook.remove()
    assert worker.train_step()
    assert not any(torch.equal(one, other) for one, other in zip(before, state(), strict=True) if one.numel() > 100)
    worker.stream.close()


def test_what_it_tells_and_writes(tmp_path: Path, dataset: Path, config: TrainAutoencoderConfig) -> None:
    """Losses by part, PSNR on held-out pictures by channels, grids, and an autoencoder whose latents have a deviation of 1."""
    told = replace(
        config,
        data=CropConfig(sizes=(24,), decode_processes=0, shuffle_shards=1, held_out_share=0.3),
        losses=replace(config.losses, perceptual=PerceptualConfig(model="zoo://clip", layers=(1, 3)), edges=1.0),
        validation=PictureConfig(num_images=6, grid=3, every=5, size=32),
        ema=EmaConfig(decay=0.5),
    )
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    trained = train_on_ranks(tmp_path, dataset, [("run", told)], tracking=tracking)["run"]
    assert trained.error is None and set(trained.metrics) == {"loss", "validation_loss"}
    client = mlflow.MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name(tracking.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    parts = {"l1", "edges", "perceptual", "latent_penalty", "adversarial", "adversarial_weight"}
    judged = {"loss", "real", "fake", "told_apart", "grad_norm"}
    assert {f"loss.{name}" for name in parts} | {f"discriminator.{name}" for name in judged} <= run.data.metrics.keys()
    assert {"psnr", "psnr.channels_2", "validation_loss", "grad_norm", "data_wait_share"} <= run.data.metrics.keys()
    assert any(value.startswith("trained parts: all ") for value in run.data.tags.values())
    pictures = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert pictures == ["step-000005.png", "step-000010.png"]
    assert Image.open(tmp_path / "run" / "samples" / pictures[0]).size == (3 * 34 - 2, 3 * 34 - 2)
    assert Image.open(tmp_path / "run" / "comparison.png").width % 34 == 32
    statistics = json.loads((tmp_path / "run" / "latents.json").read_text())
    model = DCAutoencoder.from_pretrained(tmp_path / "run" / "autoencoder")
    assert model.config.scaling_factor == pytest.approx(1 / statistics["std"], abs=1e-5) == statistics["scaling_factor"]
    assert len(statistics["mean_by_channel"]) == 4 and statistics["num_pictures"] == 6
    average = read_weights(str(tmp_path / "run" / "checkpoints" / "step-000010"))
    assert all(torch.equal(average[name], value) for name, value in model.state_dict().items())


def test_a_decoder_that_was_trained_further_makes_no_latents_stale(
    tmp_path: Path, dataset: Path, config: TrainAutoencoderConfig
) -> None:
    """Batch norms of the trained decoder move, those of a frozen one do not; other layouts hold the same weights."""
    shape = ShapeConfig(**vars(SHAPE) | {"variant": "in", "encoder_depths": (0, 1, 1, 1), "decoder_depths": (0, 1, 1, 1)})
    start = DCAutoencoder(replace(config, shape=shape).new_shape())
    start.save_pretrained(tmp_path / "start", layout="diffusers")
    losses = LossConfig()
    further = tiny_training(init=str(tmp_path / "start"), parts=("decoder",), losses=losses, num_steps=4, num_workers=2)
    head = replace(further, parts=("encoder.project_out", "decoder.project_in"))
    trained = train_on_ranks(tmp_path, dataset, [("decoder", further), ("middle", head)])
    assert trained["decoder"].error is None and trained["middle"].error is None
    version = find_encoder(str(tmp_path / "start")).version
    assert find_encoder(str(tmp_path / "decoder" / "autoencoder")).version == version
    assert find_encoder(str(tmp_path / "middle" / "autoencoder")).version != version
    before = start.state_dict()
    decoder, middle = (DCAutoencoder.from_pretrained(tmp_path / name / "autoencoder") for name in ("decoder", "middle"))
    changed = [
        {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        for model in (decoder, middle)
    ]
    assert {name for name in before if name.startswith("decoder.")} == changed[0]
    assert any("running_mean" in name for name in changed[0])
    assert changed[1] == {f"{name}.{kind}" for name in ("encoder.conv_out", "decoder.conv_in") for kind in ("weight", "bias")}
    for layout, place in (("diffusers", "exported"), ("nvlabs", "exported.safetensors")):
        decoder.save_pretrained(tmp_path / place, layout=layout)
        again = DCAutoencoder.from_pretrained(tmp_path / place)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in decoder.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"init": "zoo://pipeline/autoencoder", "shape": ShapeConfig(latent_channels=16)},
            "latent_channels=16, and init=",
        ),
        ({"init": "zoo://pipeline/autoencoder", "latent_channels": (4, 9)}, "latent_channels=9 must be from 1 to 8"),
        ({"init": "zoo://pipeline/autoencoder", "data": CropConfig(sizes=(20,))}, "data.sizes: 20 pixels do not divide by 8"),
        ({"init": "zoo://nothing"}, "nothing"),
        ({"data": CropConfig(sizes=(64,))}, "no image of .* is large enough for crops of 64 pixels"),
        ({"validation": PictureConfig(size=800)}, "has no picture of 800 pixels to measure on"),
        ({"losses": LossConfig(perceptual=PerceptualConfig(model="zoo://clip", layers=(9,)))}, "has no layer 9, only 0 to 4"),
        ({"losses": LossConfig(perceptual=PerceptualConfig(model="zoo://pipeline/text_encoder"))}, "sees no pictures"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, dataset: Path, changes: dict[str, object], told: str) -> None:

    task = TrainTask(config=tiny_training(**changes), dataset_uri=str(dataset), inputs={}, output_uri=str(tmp_path / "run"))
    with one_worker(), pytest.raises(TrainingInputError, match=told):
        AutoencoderWorker(task, device=torch.device("cpu"))
    shutil.rmtree(tmp_path)
