"""Noise and noise levels that come from the samples' ids alone: the same in any batch, on any worker, after any restart."""

import torch
from torch import Tensor

from pipelines.tables.chance import uniform
from pipelines.train.stream.config import FlowConfig
from pipelines.train.stream.samples import MicroBatch
from sana_model.flow import sample_sigmas


def draw_noise(batch: MicroBatch, config: FlowConfig, shift: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Noise levels (B,) and noise (B, C, h, w), float32 on the CPU: each sample's come from (seed, epoch, id)."""
    generator = torch.Generator()
    sigma, noise = torch.empty(len(batch.ids)), torch.empty(batch.latents.shape)
    for index, key in enumerate(zip(batch.epochs, batch.ids, strict=True)):
        generator.manual_seed(int(uniform(seed, *key, "noise") * 2**53))
        sigma[index] = sample_sigmas(
            1, distribution=config.distribution, mean=config.mean, std=config.std, shift=shift, generator=generator
        )[0]
        noise[index] = torch.randn(noise.shape[1:], generator=generator)
    return sigma, noise


def fixed_noise(batch: MicroBatch, sigma: float, *, seed: int) -> Tensor:
    """(B, C, h, w) float32 on the CPU, for validation: each sample's comes from its id, the noise level and the seed."""
    noise = torch.empty(batch.latents.shape)
    generator = torch.Generator()
    for index, sample_id in enumerate(batch.ids):
        generator.manual_seed(int(uniform(seed, sample_id, sigma, "validation") * 2**53))
        noise[index] = torch.randn(noise.shape[1:], generator=generator)
    return noise
