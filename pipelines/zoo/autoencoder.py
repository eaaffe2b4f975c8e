"""A tiny DC-AE for 64-px scenes: it compresses 8 times a side, into 8 channels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.zoo.config import TinyAutoencoderConfig
from pipelines.zoo.training import fit
from pipelines.zoo.world import HELD_OUT, World, load_world
from sana_model.nn.autoencoder import DCAutoencoder

WIDTHS = (16, 32, 64, 128)
LATENT_NOISE = 0.15
"""Standard deviation of the noise added to latents in training, so that the decoder tolerates inexact latents of a DiT."""
LATENT_PENALTY = 0.02
"""Weight of the penalty on a mean square of latents above 1. Without it their scale grows until the noise has no effect."""


def train_autoencoder(config: TinyAutoencoderConfig) -> dict[str, float]:
    """Train encoder and decoder together, measure the scale of the latents, and write the weights.

    Returns the last figures of `fit`.
    """
    loop, cache_dir = config.loop, config.cache_dir
    torch.set_num_threads(loop.num_threads)
    torch.manual_seed(loop.seed)
    model = DCAutoencoder.from_preset("tiny", widths=WIDTHS)
    world = load_world(cache_dir=cache_dir)
    held_out = load_world(500, first=HELD_OUT, cache_dir=cache_dir)

    def compute_loss(rows: np.ndarray, rng: np.random.Generator, progress: float) -> Tensor:
        image = world.images_as_tensor(rows)
        latents = model.encoder(image)
        decoded = model.decoder(latents + LATENT_NOISE * torch.randn_like(latents))
        return reconstruction_loss(decoded.float(), image) + LATENT_PENALTY * F.relu(latents.float().square().mean() - 1)

    def save() -> None:
        scaled = with_measured_scale(model, held_out)
        scaled.to(torch.bfloat16).save_pretrained(config.output_dir)

    return fit(
        model.parameters(),
        compute_loss,
        num_rows=len(world.scenes),
        config=loop,
        save=save,
        evaluate=lambda: measure_autoencoder(model, held_out),
    )


def reconstruction_loss(decoded: Tensor, image: Tensor) -> Tensor:
    """L1 with more weight off the background, plus L1 of the differences of neighboring pixels, for edges and stripes.

    Both images have shape (B, 3, H, W).
    """
    corner = image[:, :, :1, :1]  # always background
    weight = 1 + 4 * ((image - corner).abs().amax(1, keepdim=True) > 0.1).float()
    error = decoded - image
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return (weight * error.abs()).mean() + edges


def with_measured_scale(model: DCAutoencoder, world: World) -> DCAutoencoder:
    """Copy `model` with the scaling factor that gives the latents of `world` a standard deviation of 1."""
    with torch.no_grad():
        latents = model.encoder(world.images_as_tensor(slice(None)))
    scaled = DCAutoencoder(replace(model.config, scaling_factor=round(1 / float(latents.std()), 4)))
    scaled.load_state_dict(model.state_dict())
    return scaled.eval()


@torch.no_grad()
def measure_autoencoder(model: DCAutoencoder, world: World) -> dict[str, float]:
    """PSNR in dB, the L1 error on pixels that are not background, and mean and standard deviation of the unscaled latents."""
    image = world.images_as_tensor(slice(None))
    latents = model.encoder(image)
    error = model.decoder(latents).clamp(-1, 1) - image
    drawn = (image - image[:, :, :1, :1]).abs().amax(1) > 0.1
    return {
        "psnr": float(10 * torch.log10(4 / error.square().mean())),
        "l1_drawn": float(error.abs().mean(1)[drawn].mean()),
        "latent_mean": float(latents.mean()),
        "latent_std": float(latents.std()),
    }


def load_autoencoder(path: str | Path) -> DCAutoencoder:
    """Load an autoencoder for measuring, in float32."""
    return DCAutoencoder.from_pretrained(path, dtype=torch.float32).eval()
