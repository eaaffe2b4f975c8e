"""Against values that NVlabs' own code computed: the loader's own settings, nothing told by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sana_model.files.checkpoint import export
from sana_model.files.key_maps import TRANSFORMER_NVLABS
from sana_model.flow import flow_loss, sigma_to_timestep, whole_sigmas
from sana_model.guidance import Caption, guided_velocity
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AUTOENCODER_PRESETS, SanaConfig
from sana_model.nn.transformer import SanaTransformer
from sana_model.nn.transformer_blocks import SanaBlock
from sana_model.solver import SOLVERS, scm, scm_sigmas
from tests.support.golden import (
    FLOW_SHIFT,
    GUIDANCE_SCALE,
    PLAIN,
    SANA_1_5,
    SPRINT,
    WITH_POSITIONS,
    Inputs,
    autoencoder_weights,
    digest,
    efficientvit_shapes,
    golden,
    inputs,
    nvlabs_weights,
    seeded,
    summary,
)
from tests.support.peers import FAMILIES, assert_close

Load = Callable[[SanaConfig, str], SanaTransformer]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Write a state dict as NVlabs' code saves it, under a name, and load it."""
    folder = tmp_path_factory.mktemp("published")

    def load(config: SanaConfig, name: str) -> SanaTransformer:
        torch.save({"state_dict": nvlabs_weights(config)}, folder / name)
        return SanaTransformer.from_pretrained(folder / name)

    return load


@pytest.fixture(scope="module")
def plain(load: Load) -> SanaTransformer:
    return load(PLAIN, "any name.pth")


def null_of(model: SanaTransformer, sample: Inputs) -> Caption:
    """The null captions of two samples as a text encoder would give them, from the states that the file holds."""
    assert model.config.null_caption == "caption_mask" and model.null_caption_embeds is not None
    rows = model.null_caption_embeds[: sample.caption_mask.shape[1]]
    return rows.expand(2, -1, -1), sample.caption_mask


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "config", "file"),
    [("plain", PLAIN, "x.pth"), ("positions", WITH_POSITIONS, "y.pth"), ("sana-1.5", SANA_1_5, "SANA1.5_1.6B_1024px.pth")],
)
def test_velocity(load: Load, tmp_path: Path, name: str, config: SanaConfig, file: str) -> None:
    model, sample = load(config, file), inputs()
    timestep = torch.tensor([599.64, 8.946])
    found = model(sample.latents, timestep, sample.caption_embeds, sample.caption_mask)
    assert_close(found, golden(f"forward.{name}"))
    model.save_pretrained(tmp_path / "diffusers", layout="diffusers")
    again = SanaTransformer.from_pretrained(tmp_path / "diffusers")
    assert again.config == model.config, "a conversion keeps what the weights were trained to see"
    assert torch.equal(again(sample.latents, timestep, sample.caption_embeds, sample.caption_mask), found)


@torch.inference_mode()
def test_norms_of_queries_and_keys_have_the_epsilons_of_nvlabs_code() -> None:
    """The mean square is 1e-6 here: that is the epsilon of cross-attention, and a tenth of that of self-attention."""
    block = SanaBlock(SANA_1_5)
    small = torch.full((1, SANA_1_5.dim), 1e-3)
    for attention, epsilon in ((block.attention, 1e-5), (block.cross_attention, 1e-6)):
        for norm in (attention.query_norm, attention.key_norm):
            assert_close(norm(small), small / (1e-6 + epsilon) ** 0.5)


def test_loss_and_gradients_with_a_dropped_caption(load: Load) -> None:
    """The second sample's caption is dropped; steps 333 and 777 of the table."""
    model, sample = load(PLAIN, "train.pth").train(), inputs()
    assert model.config.time_input == "whole"
    embeds = torch.stack([sample.caption_embeds[0], null_of(model, sample)[0][1]])
    sigma = whole_sigmas(FLOW_SHIFT)[[333, 777]]
    loss = flow_loss(model, sample.latents, embeds, sample.caption_mask, sigma=sigma, noise=sample.noise)
    assert_close(loss.detach(), golden("training.loss"))
    loss.mean().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    found, wanted = summary(export(gradients, TRANSFORMER_NVLABS)), golden("training.gradients")
    assert found.shape == wanted.shape
    worst = ((found - wanted).abs() / wanted[:, :1]).max()
    assert worst < 1e-4, f"a gradient differs by {worst:.1e} of its norm"


@torch.inference_mode()
def test_sprint(load: Load) -> None:
    """Its forward on TrigFlow, with the guidance scale embedded, and its sampler for one and two steps."""
    model, sample = load(SPRINT, "s.pth"), inputs()
    assert model.config.time_input == "unit"
    captions = model.encode_captions(sample.caption_embeds, sample.caption_mask)
    guidance_scale = torch.full((2,), GUIDANCE_SCALE)

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return model(latents, sigma_to_timestep(sigma).expand(2), captions, guidance_scale=guidance_scale)

    angle = torch.tensor([1.2, 0.7])
    sigma = (angle.sin() / (angle.cos() + angle.sin()))[:, None, None, None]
    noisy = sample.latents * (1 - 2 * sigma + 2 * sigma**2).sqrt()
    target = (1 - 2 * sigma) * noisy + (1 - 2 * sigma + 2 * sigma**2) * velocity(noisy, sigma.flatten())
    assert_close(target / (1 - 2 * sigma + 2 * sigma**2).sqrt(), golden("forward.sprint"))
    for num_steps in (1, 2, 4):
        again = iter([seeded(f"noise {k}", *sample.noise.shape) for k in range(4)])
        found = scm(velocity, sample.noise, scm_sigmas(num_steps), draw_noise=again.__next__)
        assert_close(found, golden(f"scm.{num_steps}"))
    kept = nvlabs_weights(SPRINT)["logvar_linear.weight"]
    assert model.logvar_weight is not None and torch.equal(model.logvar_weight, kept)


@pytest.mark.parametrize("name", [name for name in AUTOENCODER_PRESETS if name != "tiny"])
def test_names_and_shapes_of_a_published_autoencoder(name: str) -> None:
    assert torch.equal(digest(efficientvit_shapes(AUTOENCODER_PRESETS[name])), golden(f"names.{name}"))


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_autoencoder(tmp_path: Path, name: str) -> None:
    config = FAMILIES[name]
    torch.save({"state_dict": autoencoder_weights(config)}, tmp_path / "x.pth")
    model = DCAutoencoder.from_pretrained(tmp_path / "x.pth", scaling_factor=1.0)
    assert model.config == replace(config, scaling_factor=1.0)
    side = 2 * config.compression
    assert_close(model.encode(seeded("image", 1, 3, side, side)), golden(f"encode.{name}"))
    image = model.decode(seeded("decoded", 1, config.latent_channels, 2, 2))
    pixels = slice(None, None, config.compression // 4)
    assert_close(image[:, :, pixels, pixels], golden(f"decode.{name}"))


@torch.inference_mode()
@pytest.mark.parametrize(("solver", "num_steps", "name"), [("flow_dpm_solver", 20, "dpm"), ("flow_euler", 8, "euler")])
def test_guided_sampling(plain: SanaTransformer, solver: str, num_steps: int, name: str) -> None:
    sample = inputs()
    captions = (sample.caption_embeds, sample.caption_mask)
    velocity = guided_velocity(plain, captions, null_of(plain, sample), guidance_scale=GUIDANCE_SCALE)
    solve, make_grid = SOLVERS[solver]
    found: Tensor = solve(velocity, sample.noise, make_grid(num_steps, FLOW_SHIFT))
    assert_close(found, golden(name))
