"""Rectified flow against its definitions, diffusers' timesteps, and the closed-form minimum of the loss."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

from sana_model.flow import (
    NUM_TRAIN_TIMESTEPS,
    add_noise,
    flow_loss,
    loss_by_sigma,
    sample_sigmas,
    shift_sigmas,
    sigma_to_timestep,
    velocity_target,
    whole_sigmas,
)
from sana_model.nn.config import TimeInput
from sana_model.nn.embeddings import to_time_input
from sana_model.solver import sampling_sigmas


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CAPTION = (torch.zeros(1, 1, 1), torch.ones(1, 1))


def test_shift_multiplies_the_odds_of_the_noise_by_the_shift() -> None:
    sigmas = torch.linspace(0, 0.99, 100, dtype=torch.float64)
    shifted = shift_sigmas(sigmas, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * sigmas / (1 - sigmas))
    assert shift_sigmas(torch.tensor([0.0, 1.0]), 6.0).tolist() == [0.0, 1.0]
    assert torch.equal(shift_sigmas(sigmas, 1.0), sigmas)


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (-0.5, 0.7, 4.0)])
def test_logit_normal_moments(mean: float, std: float, shift: float) -> None:
    sigmas = sample_sigmas(200_000, mean=mean, std=std, shift=shift, generator=generator())
    assert sigmas.shape == (200_000,) and sigmas.dtype == torch.float32
    logit = torch.logit(sigmas.double())
    assert logit.mean().item() == pytest.approx(mean + math.log(shift), abs=0.01)  # the shift moves the logit
    assert logit.std().item() == pytest.approx(std, rel=0.01)


def test_uniform_moments() -> None:
    sigmas = sample_sigmas(200_000, distribution="uniform", generator=generator())
    assert sigmas.mean().item() == pytest.approx(0.5, abs=0.005)
    assert sigmas.var().item() == pytest.approx(1 / 12, rel=0.01)


def test_sampled_sigmas_follow_the_generator() -> None:
    first = sample_sigmas(64, shift=3.0, generator=generator(7))
    assert torch.equal(first, sample_sigmas(64, shift=3.0, generator=generator(7), device="cpu"))
    assert not torch.equal(first, sample_sigmas(64, shift=3.0, generator=generator(8)))
    state = torch.get_rng_state()
    sample_sigmas(64, generator=generator(7))
    assert torch.equal(state, torch.get_rng_state()), "the global generator must not move"


@pytest.mark.parametrize("mean", [-40.0, 40.0])
def test_sampled_sigmas_stay_inside_0_and_1_where_the_sigmoid_saturates(mean: float) -> None:
    sigmas = sample_sigmas(10_000, mean=mean, std=20.0, shift=6.0, generator=generator())
    assert sigmas.min() > 0 and sigmas.max() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cpu_generator_gives_the_same_sigmas_on_a_gpu() -> None:
    on_gpu = sample_sigmas(64, shift=3.0, generator=generator(), device="cuda")
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), sample_sigmas(64, shift=3.0, generator=generator()))


def test_bad_sampling_input_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="distribution='cosine'"):
        sample_sigmas(2, distribution="cosine", generator=generator())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shift=0"):
        sample_sigmas(2, shift=0, generator=generator())
    with pytest.raises(ValueError, match="std=-1"):
        sample_sigmas(2, std=-1, generator=generator())
    with pytest.raises(ValueError, match="shift=-3"):
        shift_sigmas(torch.ones(1), -3)


def test_a_timestep_is_1000_sigma() -> None:
    sigma = sample_sigmas(1000, generator=generator())
    timestep = sigma_to_timestep(sigma)
    assert timestep.dtype == torch.float32 and timestep.min() > 0 and timestep.max() < NUM_TRAIN_TIMESTEPS
    torch.testing.assert_close(timestep, 1000 * sigma)


@pytest.mark.parametrize("shift", [3.0, 4.0, 6.0])
def test_whole_timesteps_are_those_of_diffusers(shift: float) -> None:
    scheduler = dpm_scheduler(shift)
    for num_steps in range(1, 51):
        scheduler.set_timesteps(num_steps)
        timestep = to_time_input(sigma_to_timestep(sampling_sigmas(num_steps, shift)[:-1]), "whole")
        assert timestep.dtype == torch.float32
        assert timestep.tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("shift", [1.0, 3.0, 4.0, 6.0])
def test_whole_sigmas_are_the_table_that_nvlabs_trains_on(shift: float) -> None:
    """Its formula in float64 (respace.py and gaussian_diffusion.py): sigma = 1 - beta, shifted, and time = int(1000 sigma)."""
    sigmas = 1.0 - np.linspace(1.0, 0.001, 1000)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    ours = whole_sigmas(shift)
    torch.testing.assert_close(ours, torch.tensor(sigmas).float(), atol=2e-7, rtol=0)
    assert to_time_input(sigma_to_timestep(ours), "whole").tolist() == (sigmas * 1000).astype(np.int64).tolist()


def test_noise_levels_of_whole_weights_are_those_of_the_table() -> None:
    drawn = sample_sigmas(10_000, shift=3.0, whole=True, generator=generator())
    exact = sample_sigmas(10_000, shift=3.0, generator=generator())
    table = whole_sigmas(3.0)
    index = torch.searchsorted(table, drawn)
    assert torch.equal(table[index], drawn), "every level is one of the table"
    assert bool((drawn <= exact + 1e-6).all()) and bool((exact < table[(index + 1).clamp(max=999)] + 1e-6).all())


@pytest.mark.parametrize(("kind", "expected"), [("continuous", 599.64), ("whole", 599.0), ("unit", 0.59964)])
def test_time_inputs(kind: TimeInput, expected: float) -> None:
    assert to_time_input(torch.tensor([599.64]), kind).item() == pytest.approx(expected, rel=1e-6)


def test_unshifted_whole_timesteps_differ_from_diffusers_only_at_whole_numbers() -> None:
    scheduler = dpm_scheduler(1.0)
    for num_steps in range(1, 51):
        scheduler.set_timesteps(num_steps)
        sigmas = sampling_sigmas(num_steps, 1.0)[:-1]
        ours, theirs = to_time_input(sigma_to_timestep(sigmas), "whole"), scheduler.timesteps
        differs = ours != theirs
        assert torch.equal(ours[differs], theirs[differs] + 1.0)
        exact = 999 * torch.arange(num_steps, 0, -1)[differs]  # over num_steps: sigma * 1000 in exact arithmetic
        assert (exact % num_steps == 0).all()


def dpm_scheduler(shift: float) -> Any:  # diffusers' schedulers have no types
    return DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)


def test_noised_latents_lie_on_the_line_whose_slope_is_the_velocity() -> None:
    latents, noise = torch.randn(2, 3, 4, 5, 6, generator=generator(), dtype=torch.float64)
    assert torch.equal(add_noise(latents, noise, torch.zeros(3)), latents)
    assert torch.equal(add_noise(latents, noise, torch.ones(3)), noise)
    start, end = torch.tensor([0.125, 0.25, 0.5]), torch.tensor([0.25, 0.75, 1.0])
    slope = (add_noise(latents, noise, end) - add_noise(latents, noise, start)) / (end - start).view(3, 1, 1, 1)
    torch.testing.assert_close(slope.float(), velocity_target(latents, noise))


def test_bf16_latents_are_noised_in_float32() -> None:
    latents, noise = torch.randn(2, 3, 4, 5, 6, generator=generator()).bfloat16()
    sigma = torch.tensor([0.1, 0.5, 0.999])
    noisy = add_noise(latents, noise, sigma)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, add_noise(latents.float(), noise.float(), sigma).bfloat16())
    assert velocity_target(latents, noise).dtype == torch.float32


def test_shapes_that_would_broadcast_are_refused() -> None:
    latents = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"sigma has shape \(1,\)"):
        add_noise(latents, latents, torch.zeros(1))
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 4, 4\)"):
        flow_loss(lambda x, *_: x, latents, *CAPTION, sigma=torch.zeros(2), noise=latents[:1])


class GaussianVelocity(nn.Module):
    """E[eps - x0 | x_t] when the data is N(0, data_std^2): the best velocity there is, times `1 + perturbation`."""

    def __init__(self, data_std: float, perturbation: float = 0.0):
        super().__init__()
        self.data_std = data_std
        self.scale = nn.Parameter(torch.tensor(1.0 + perturbation))

    def forward(self, latents: Tensor, timestep: Tensor, caption_embeds: Tensor, caption_mask: Tensor) -> Tensor:
        assert timestep.dtype == torch.float32 and timestep.shape == latents.shape[:1]
        sigma = (timestep / NUM_TRAIN_TIMESTEPS).view(-1, 1, 1, 1)
        variance = ((1 - sigma) * self.data_std) ** 2 + sigma**2
        return self.scale * (sigma - (1 - sigma) * self.data_std**2) / variance * latents


@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
def test_loss_of_the_best_velocity_is_the_closed_form_minimum(data_std: float) -> None:
    sigma = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.9, 0.98])
    latents = data_std * torch.randn(6, 32, 96, 96, generator=generator(1))
    noise = torch.randn(latents.shape, generator=generator(2))
    minimum = data_std**2 / (((1 - sigma) * data_std) ** 2 + sigma**2)

    loss = flow_loss(GaussianVelocity(data_std), latents, *CAPTION, sigma=sigma, noise=noise)
    torch.testing.assert_close(loss, minimum, rtol=0.01, atol=0.0)
    for perturbation in (-0.1, 0.1):
        worse = flow_loss(GaussianVelocity(data_std, perturbation), latents, *CAPTION, sigma=sigma, noise=noise)
        assert (worse > loss).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_float32_per_sample_and_its_gradient_reaches_the_model(dtype: torch.dtype) -> None:
    model = GaussianVelocity(1.0, perturbation=0.5)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=generator()).to(dtype)
    sigma = torch.tensor([0.1, 0.2, 0.3])
    loss = flow_loss(model, latents, *CAPTION, sigma=sigma, noise=noise)
    assert loss.shape == (3,) and loss.dtype == torch.float32
    for i in range(3):  # a sample's loss is its own
        alone = flow_loss(model, latents[[i]], *CAPTION, sigma=sigma[[i]], noise=noise[[i]])
        torch.testing.assert_close(alone, loss[[i]])
    loss.mean().backward()
    assert model.scale.grad is not None and model.scale.grad.abs() > 0


def test_loss_by_sigma_averages_each_range() -> None:
    mean, count = loss_by_sigma(
        torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0], requires_grad=True),
        torch.tensor([0.0, 0.2, 0.25, 0.8, 1.0]),
        num_bins=4,
    )
    torch.testing.assert_close(mean, torch.tensor([2.0, 5.0, math.nan, 8.0]), equal_nan=True)
    assert count.tolist() == [2, 1, 0, 2]
    assert not mean.requires_grad
