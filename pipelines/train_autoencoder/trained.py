"""The trained autoencoder: its weights put together, the statistics of its latents, and the folder that holds it."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.storage.files import upload_folder, write_file
from pipelines.train.loop.record import AUTOENCODER_DIR, COMPARISON
from pipelines.train_autoencoder.config import TrainAutoencoderConfig
from pipelines.train_autoencoder.losses import to_image
from pipelines.train_autoencoder.parts import trained_names
from pipelines.train_autoencoder.pictures import show, to_crops, to_pixels
from pipelines.workers.images import to_png
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AutoencoderConfig

STATISTICS = "latents.json"
"""File of the statistics of its latents, in the output folder."""


def write_autoencoder(
    output_uri: str,
    config: TrainAutoencoderConfig,
    shape: AutoencoderConfig,
    start: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    pictures: Sequence[np.ndarray],
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Write the trained autoencoder in float32, the statistics of its latents, and pictures decoded before and after.

    Args:
        output_uri: the output folder.
        config: the training.
        shape: the autoencoder's shape, with the scaling factor that it had.
        start: the weights that the training began with.
        weights: those of the engine; only trained ones are taken, the others stay as they were, bit for bit.
        pictures: (size, size, 3) uint8 each, to measure the latents on.
        device: where they are encoded and decoded.

    Returns scaling_factor, and mean and deviation of the unscaled latents. Raises StorageError.
    """
    state = dict(start) | {name: weights[name].to(start[name].dtype) for name in trained_names(list(weights), config.parts)}
    model = _load(shape, state, device)
    statistics = latent_statistics(model, pictures)
    if config.scaling_factor is None and config.trains_encoder:
        model.config = replace(shape, scaling_factor=round(1 / statistics["std"], 5))
    statistics["scaling_factor"] = model.config.scaling_factor
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder))
        upload_folder(folder, f"{output_uri}/{AUTOENCODER_DIR}")
    if shown := pictures[: config.validation.grid]:
        both = (_load(shape, start, device), model)
        sides = [np.concatenate([decode_pixels(one, picture) for picture in shown]) for one in both]
        write_file(f"{output_uri}/{COMPARISON}", to_png(show(np.stack(shown), *sides)))
    write_file(f"{output_uri}/{STATISTICS}", (json.dumps(statistics, indent=2) + "\n").encode())
    return {
        "scaling_factor": statistics["scaling_factor"],
        "latent_mean": statistics["mean"],
        "latent_std": statistics["std"],
    }


def _load(shape: AutoencoderConfig, state: Mapping[str, Tensor], device: torch.device) -> DCAutoencoder:
    """An autoencoder with these weights, in evaluation mode."""
    with torch.device("meta"):
        model = DCAutoencoder(shape)
    model.load_state_dict(state, assign=True)
    return model.eval().to(device)


def _to_image(picture: np.ndarray, model: DCAutoencoder) -> Tensor:
    """A picture (size, size, 3) uint8 as an image (1, 3, size, size) where the autoencoder is."""
    return to_image(to_crops([picture]), next(model.parameters()).device)


@torch.no_grad()
def decode_pixels(model: DCAutoencoder, picture: np.ndarray) -> np.ndarray:
    """A picture (size, size, 3) uint8, encoded and decoded again, (1, size, size, 3) uint8."""
    return to_pixels(model.decode(model.encode(_to_image(picture, model))))


@torch.no_grad()
def latent_statistics(model: DCAutoencoder, pictures: Sequence[np.ndarray]) -> dict[str, Any]:
    """Statistics of the unscaled latents of pictures, (size, size, 3) uint8 each: mean, std and rms (root of the mean square)
    over all, mean_by_channel and std_by_channel, and num_pictures.
    """
    channels = model.config.latent_channels
    sums = torch.zeros(2, channels, dtype=torch.float64)
    count = 0
    for picture in pictures:
        latents = model.encoder(_to_image(picture, model))[0].cpu().double().flatten(1)
        sums += torch.stack([latents.sum(1), latents.square().sum(1)])
        count += latents.shape[1]
    means, squares = sums / count
    mean, square = means.mean(), squares.mean()
    return {
        "num_pictures": len(pictures),
        "mean": float(mean),
        "std": float((square - mean.square()).clamp_min(0).sqrt()),
        "rms": float(square.sqrt()),
        "mean_by_channel": means.tolist(),
        "std_by_channel": (squares - means.square()).clamp_min(0).sqrt().tolist(),
    }
