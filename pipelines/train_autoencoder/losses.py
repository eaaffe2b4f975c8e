"""The autoencoder's losses, each for every sample of a micro-batch."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.tables.chance import row_seed
from pipelines.train_autoencoder.config import LossConfig
from pipelines.train_autoencoder.stream import CropBatch


def to_image(crops: Tensor, device: torch.device) -> Tensor:
    """Crops (B, 3, H, W) uint8 as images in [-1, 1], float32."""
    return crops.to(device).float() / 127.5 - 1


def edge_error(error: Tensor) -> Tensor:
    """The mean absolute difference of the errors (B, 3, H, W) of neighboring pixels, along both axes, (B,)."""
    return error.diff(dim=2).abs().flatten(1).mean(1) + error.diff(dim=3).abs().flatten(1).mean(1)


def picture_losses(config: LossConfig, perceptual: nn.Module | None, decoded: Tensor, image: Tensor) -> dict[str, Tensor]:
    """The losses that compare a decoded image with the image, by name, each (B,) and without its factor.

    decoded, image: (B, 3, H, W), float32.
    """
    error = decoded - image
    losses = {}
    if config.l1:
        losses["l1"] = error.abs().flatten(1).mean(1)
    if config.l2:
        losses["l2"] = error.square().flatten(1).mean(1)
    if config.edges:
        losses["edges"] = edge_error(error)
    if perceptual is not None:
        losses["perceptual"] = perceptual(decoded, image)
    return losses


def latent_losses(config: LossConfig, latents: Tensor) -> dict[str, Tensor]:
    """The losses of unscaled latents (B, C, h, w), by name, each (B,) and without its factor."""
    if not config.latent_penalty:
        return {}
    return {"latent_penalty": F.relu(latents.float().square().flatten(1).mean(1) - 1)}


def factors(config: LossConfig) -> Mapping[str, float]:
    """The factor of each loss by its name."""
    perceptual = config.perceptual.weight if config.perceptual is not None else 0.0
    return {
        "l1": config.l1,
        "l2": config.l2,
        "edges": config.edges,
        "perceptual": perceptual,
        "latent_penalty": config.latent_penalty,
    }


def weighted_sum(config: LossConfig, losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of losses, each times its factor, (B,)."""
    by_name = factors(config)
    return torch.stack([by_name[name] * loss for name, loss in losses.items()]).sum(0)


def latent_noise(batch: CropBatch, shape: tuple[int, int, int], config: LossConfig, *, seed: int) -> Tensor:
    """The noise of a micro-batch's latents, (B, *shape), which depends on each sample alone; (1, 1, 1, 1) zeros without noise.

    shape: channels, height and width of the latents.
    """
    if not config.latent_noise:
        return torch.zeros(1, 1, 1, 1)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(row_seed(seed, f"{number}/{row_id}")))
        for row_id, number in zip(batch.ids, batch.epochs, strict=True)
    ]
    return config.latent_noise * torch.stack(noise)
