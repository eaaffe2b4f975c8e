"""Noise and noise levels, derived from each sample's id, so that batches, workers and restarts change nothing."""

import torch
from torch import Tensor

from pipelines.tables.chance import uniform
from pipelines.train.stream.config import FlowConfig
from pipelines.train.stream.samples import MicroBatch
from sana_model.flow import sample_sigmas


def draw_noise(batch: MicroBatch, config: FlowConfig, shift: float, *, whole: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Draw noise levels (B,) and noise (B, C, h, w) to train with: float32 on the CPU, derived from (seed, epoch, id).

    `shift` moves the noise levels towards noise, and `whole` rounds them, see `sample_sigmas`.
    """
    generator = torch.Generator()
    sigma, noise = torch.empty(len(batch.ids)), torch.empty(batch.latents.shape)
    for index, key in enumerate(zip(batch.epochs, batch.ids, strict=True)):
        generator.manual_seed(int(uniform(seed, *key, "noise") * 2**53))
        sigma[index] = sample_sigmas(
            1, distribution=config.distribution, mean=config.mean, std=config.std, shift=shift, whole=whole, generator=generator
        )[0]
        noise[index] = torch.randn(noise.shape[1:], generator=generator)
    return sigma, noise


def fixed_noise(batch: MicroBatch, sigma: float, *, seed: int) -> Tensor:
    """Draw the validation's noise (B, C, h, w): float32 on the CPU, derived from (seed, id, sigma)."""
    noise = torch.empty(batch.latents.shape)
    generator = torch.Generator()
    for index, sample_id in enumerate(batch.ids):
        generator.manual_seed(int(uniform(seed, sample_id, sigma, "validation") * 2**53))
        noise[index] = torch.randn(noise.shape[1:], generator=generator)
    return noise
