"""What a configuration can be, found before anything starts; and which weights a part is."""

import pytest
import torch

from pipelines.train.engine.config import EngineConfig
from pipelines.train_autoencoder.adversary import WATCHED_STEPS, BalanceWatch
from pipelines.train_autoencoder.config import AdversarialConfig, CropConfig, LossConfig, PictureConfig, ShapeConfig
from pipelines.train_autoencoder.parts import TrainableAutoencoder, describe_parts
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.discriminator import PatchDiscriminator
from tests.support.autoencoder_world import tiny_training

ADAPTIVE = AdversarialConfig(adaptive=True, layers=1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": CropConfig(sizes=(8,)), "losses": LossConfig(adversarial=AdversarialConfig())}, "needs crops of 24 pixels"),
        ({"data": CropConfig(sizes=(60,))}, "data.sizes: 60 pixels do not divide by 8, .* such as 64"),
        ({"validation": PictureConfig(size=4)}, "validation.size: 4 pixels do not divide by 8, .* such as 8"),
        ({"shape": ShapeConfig(widths=(16, 32))}, "must have the same length"),
        ({"latent_channels": (4, 33)}, "latent_channels=33 must be from 1 to"),
        ({"init": "x", "preset": "tiny"}, "give one: an autoencoder to go on from, or a shape"),
        ({"parts": ("decoder",)}, "a new autoencoder is trained as a whole"),
        ({"parts": ()}, "there is nothing to train"),
        ({"engine": EngineConfig(zero_stage=3)}, "take 0, 1 or 2"),
        (
            {
                "init": "x",
                "parts": ("decoder.project_in",),
                "losses": LossConfig(adversarial=AdversarialConfig(adaptive=True, layers=1)),
            },
            "adaptive with parts",
        ),
        ({"keep_best": "validation_loss"}, "needs validation.dataset_uri"),
    ],
)
def test_what_cannot_be_is_told(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        tiny_training(**changes)


def test_a_discriminator_cannot_learn_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="warm_start_steps=3 must be at most start_step=2"):
        AdversarialConfig(start_step=2, warm_start_steps=3)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_smallest_crop_that_a_discriminator_judges(layers: int) -> None:
    smallest = AdversarialConfig(layers=layers).smallest_crop
    model = PatchDiscriminator(layers=layers, width=4)
    assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.zeros(1, 3, smallest - 1, smallest - 1))


def test_parts_of_the_published_autoencoder_with_counts() -> None:
    with torch.device("meta"):
        model = DCAutoencoder.from_preset("dc-ae-f32c32-sana-1.1")
    told = describe_parts(model, ("encoder.project_out", "decoder.project_in"))
    assert told == (
        "trained parts: encoder.project_out 294,944, decoder.project_in 295,936; together 590,880 of 312,250,275 weights"
    )
    assert "decoder.project_out 3,715" in describe_parts(model, ("decoder.project_out",))
    trained = TrainableAutoencoder(model, ("decoder",))
    assert sum(weight.numel() for weight in trained.parameters() if weight.requires_grad) == sum(
        weight.numel() for weight in model.decoder.parameters()
    )


def test_a_discriminator_that_wins_or_collapses_is_told_once() -> None:
    watch = BalanceWatch()

    def look(step: int, told_apart: float, gap: float) -> str | None:
        return watch.look(step, {"discriminator.told_apart": told_apart, "discriminator.real": gap, "discriminator.fake": 0.0})

    assert watch.look(1, {}) is None and look(10, 0.7, 0.5) is None
    assert look(20, 1.0, 2.0) is None  # not for long enough
    resumed = BalanceWatch()
    resumed.load_state_dict(watch.state_dict())
    watch = resumed
    won = look(20 + WATCHED_STEPS, 1.0, 2.0)
    assert won is not None and won.startswith("the discriminator has won: since step 20")
    assert look(20 + 2 * WATCHED_STEPS, 1.0, 2.0) is None
    assert look(1000, 0.5, 0.001) is None
    collapsed = look(1000 + WATCHED_STEPS, 0.5, 0.001)
    assert collapsed is not None and "has collapsed: since step 1000" in collapsed
    assert look(2000, 0.7, 0.5) is None


def test_the_adaptive_weight_bears_gradients_too_small_for_float16() -> None:
    """Means of losses have gradients of some 1e-8 for each pixel, and float16 ends at 6e-8."""
    model = TrainableAutoencoder(DCAutoencoder(tiny_training().new_shape()), ("all",), keeps_features=True).half()
    image = torch.rand(1, 3, 32, 32, dtype=torch.float16)
    model(image, torch.ones(1, 4, 1, 1).half(), torch.zeros(1, 1, 1, 1).half())
    gradient = torch.randn(1, 3, 32, 32)
    small, large = (model.last_gradient(scale * gradient).norm() for scale in (1e-9, 1.0))
    torch.testing.assert_close(small, 1e-9 * large)
