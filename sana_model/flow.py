"""Rectified flow: noise levels, noising, the velocity target and its loss.

x_t = (1 - sigma) x_0 + sigma eps: sigma 0 is clean, sigma 1 is pure noise, and the velocity dx_t/dsigma is eps - x_0
(Liu et al., arXiv 2209.03003; Sana, arXiv 2410.10629).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sana_model.nn.config import NUM_TRAIN_TIMESTEPS

DEFAULT_FLOW_SHIFT = 3.0
"""The shift of the noise levels (`shift_sigmas`) where neither a checkpoint nor a user names one; Sana's usual one."""

VelocityModel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(noisy_latents, timestep, caption_embeds, caption_mask) -> velocity: a `SanaTransformer`, or an engine that wraps one."""


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1, as larger images need: s sigma / (1 + (s - 1) sigma).

    Takes any shape and floating dtype; 0 and 1 stay where they are. Source: Esser et al., arXiv 2403.03206, on timestep
    shifting. Sana's published shift is 3 (4 for 0.6B at 1024 px, 6 at 4096 px).

    Raises:
        ValueError: shift is not a positive, finite number.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} must be positive and finite; 1 leaves the noise levels as they are")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def sample_sigmas(
    num: int,
    *,
    distribution: Literal["logit_normal", "uniform"] = "logit_normal",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    whole: bool = False,
    generator: torch.Generator,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the noise levels to train at: (num,) float32, strictly between 0 and 1.

    The published configurations train with logit-normal(0, 1) and the shift of the sampler.

    Args:
        mean, std: of the logit of sigma before the shift; "uniform" ignores them.
        shift: see `shift_sigmas`.
        whole: round down to one of the `whole_sigmas`, for weights whose time input is "whole".
        device: where the result goes; None: the generator's device. Values are drawn on the generator's device, so a CPU
            generator gives the same values for every `device`.

    Raises:
        ValueError: unknown distribution, or std or shift not positive.
    """
    if std <= 0:
        raise ValueError(f"std={std} must be positive")
    if distribution == "logit_normal":
        sigmas = torch.sigmoid(mean + std * torch.randn(num, generator=generator, device=generator.device))
    elif distribution == "uniform":
        sigmas = torch.rand(num, generator=generator, device=generator.device)
    else:
        raise ValueError(f"distribution={distribution!r} must be 'logit_normal' or 'uniform'")
    if whole:
        levels = whole_sigmas(shift).to(sigmas.device)
        return levels[(sigmas * NUM_TRAIN_TIMESTEPS).long().clamp(max=len(levels) - 1)].to(device or generator.device)
    eps = torch.finfo(torch.float32).eps
    return shift_sigmas(sigmas, shift).clamp(eps, 1 - eps).to(device or generator.device)


@cache  # a training asks for them at every step
def whole_sigmas(shift: float) -> Tensor:
    """The noise levels that NVlabs' code trains at: (1000,) float32, increasing from 0. Not to be changed in place.

    Level i is i / 1000, shifted, and its time input is 1000 sigma without the fraction. NVlabs computes both in float64, where
    some products lie just beside a whole number; a level that float32 would round across it is moved back by the smallest step.

    Raises:
        ValueError: shift is not positive.
    """
    exact = shift_sigmas(1 - torch.from_numpy(np.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, NUM_TRAIN_TIMESTEPS)), shift)
    timesteps = (exact * NUM_TRAIN_TIMESTEPS).trunc()
    sigmas = exact.float()
    while bool((crossed := timesteps - (sigmas * NUM_TRAIN_TIMESTEPS).trunc()).any()):
        sigmas = torch.where(crossed == 0, sigmas, torch.nextafter(sigmas, crossed.float() * math.inf))
    return sigmas


def sigma_to_timestep(sigma: Tensor) -> Tensor:
    """Convert a noise level to a timestep: 1000 sigma, in the shape and dtype of `sigma`. Models are called with it."""
    return sigma * NUM_TRAIN_TIMESTEPS


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noise latents: (1 - sigma) latents + sigma noise, (B, C, H, W) in the dtype of `latents`, computed in at least float32.

    Args:
        latents: (B, C, H, W).
        noise: standard normal, the shape of `latents`.
        sigma: (B,) float32, one noise level per sample.

    Raises:
        ValueError: noise or sigma of another shape.
    """
    if noise.shape != latents.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, latents {tuple(latents.shape)}: they must be equal")
    if sigma.shape != latents.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)}, must be ({len(latents)},): one noise level per sample")
    sigma = sigma.float().view(-1, *[1] * (latents.ndim - 1))
    return ((1 - sigma) * latents + sigma * noise).to(latents.dtype)


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the model should predict: noise - latents, (B, C, H, W) float32, the same at every noise level."""
    return noise.float() - latents.float()


def flow_loss(
    model: VelocityModel,
    latents: Tensor,
    caption_embeds: Tensor,
    caption_mask: Tensor,
    *,
    sigma: Tensor,
    noise: Tensor,
) -> Tensor:
    """Mean squared error of the model's velocity at the noised latents, one value per sample: (B,) float32.

    One value per sample lets the caller weight the samples and report the loss by noise level (`loss_by_sigma`). Sana trains on
    the plain mean over the batch.

    Args:
        model: called with the noisy latents in the dtype of `latents`, and the timestep (B,) in float32.
        latents: (B, C, H, W), as `DCAutoencoder.encode` scales them.
        caption_embeds: (B, L, D).
        caption_mask: (B, L), nonzero at real tokens.
        sigma: (B,) float32, noise levels.
        noise: standard normal, the shape of `latents`.

    Raises:
        ValueError: noise or sigma of another shape.
    """
    noisy_latents = add_noise(latents, noise, sigma)
    velocity = model(noisy_latents, sigma_to_timestep(sigma.float()), caption_embeds, caption_mask)
    return (velocity.float() - velocity_target(latents, noise)).square().flatten(1).mean(1)


def loss_by_sigma(loss: Tensor, sigma: Tensor, *, num_bins: int = 10) -> tuple[Tensor, Tensor]:
    """Mean loss and number of samples in each of `num_bins` equal ranges of sigma, for reports.

    Args:
        loss: (N,), per sample, of any number of batches and workers.
        sigma: (N,) in [0, 1].

    Returns:
        mean: (num_bins,) in the dtype of `loss`; NaN where there is no sample. Range i is [i, i + 1) / num_bins, and the last
            one includes 1.
        count: (num_bins,) int64.
    """
    index = (sigma.detach() * num_bins).long().clamp(max=num_bins - 1)
    total = loss.new_zeros(num_bins).index_add(0, index, loss.detach())
    count = torch.bincount(index, minlength=num_bins)
    return total / count, count


def noise_source(
    shape: tuple[int, ...], seeds: Sequence[int] | None, generator: torch.Generator | None, device: torch.device
) -> Callable[[], Tensor]:
    """Make a function that draws new noise, float32 of `shape`, at each call.

    From `seeds`, one for each image, it is drawn on the CPU, so that a seed gives the same image in every batch and on every
    device. Without seeds, `generator` draws that of the whole batch at once.
    """
    if seeds is None:
        assert generator is not None
        return lambda: torch.randn(shape, generator=generator, device=generator.device).to(device)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape[1:], generator=one) for one in generators]).to(device)
