"""The tiny DC-AE for 64-px scenes, which `jobs.train_autoencoder` makes: it compresses 8 times a side, into 8 channels."""

from pathlib import Path

import torch

from pipelines.zoo.world import World
from sana_model.nn.autoencoder import DCAutoencoder


@torch.no_grad()
def measure_autoencoder(model: DCAutoencoder, world: World) -> dict[str, float]:
    """PSNR in dB over all pixels, and the L1 error on those that are not background."""
    image = world.images_as_tensor(slice(None))
    error = model.decode(model.encode(image)).clamp(-1, 1) - image
    drawn = (image - image[:, :, :1, :1]).abs().amax(1) > 0.1
    return {
        "psnr": float(10 * torch.log10(4 / error.square().mean())),
        "l1_drawn": float(error.abs().mean(1)[drawn].mean()),
    }


def load_autoencoder(path: str | Path) -> DCAutoencoder:
    """Load an autoencoder for measuring, in float32."""
    return DCAutoencoder.from_pretrained(path, dtype=torch.float32).eval()
