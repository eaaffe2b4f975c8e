"""Solvers of the rectified-flow ODE dx/dsigma = velocity, as pure functions, the sampler of Sana-Sprint, and guidance.

A solver takes (predict_velocity, latents, sigmas) and integrates `latents` along the decreasing grid `sigmas`. It sets no
autograd mode: call it under `torch.inference_mode()` to draw pictures. Keep grids on the CPU: then the coefficients of a step
are computed without waiting for the device of the latents.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from sana_model.flow import shift_sigmas
from sana_model.nn.config import NUM_TRAIN_TIMESTEPS

PredictVelocity = Callable[[Tensor, Tensor], Tensor]
"""(latents (B, C, H, W), sigma 0-d) -> velocity (B, C, H, W). Solvers pass float32 latents and accept any dtype back."""

OnStep = Callable[[int, Tensor], None]
"""(index of the finished step, latents after it) -> None."""

OnEstimate = Callable[[int, Tensor], None]
"""(index of the prediction, the x_0 that it leads to) -> None."""


def sampling_sigmas(num_steps: int, shift: float) -> Tensor:
    """Make the grid of Flow-DPM-Solver: (num_steps + 1,) float32, decreasing from just under 1 (0.999 before the shift) to 0.

    sigma = 1 - linspace(1, 1e-3, num_steps + 1), then shifted. This is NVlabs' "time_uniform_flow", and bit for bit the
    `sigmas` of diffusers' DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=shift).

    Raises:
        ValueError: num_steps < 1, or shift not positive.
    """
    _check_num_steps(num_steps)
    alphas = torch.linspace(1, 1 / NUM_TRAIN_TIMESTEPS, num_steps + 1, dtype=torch.float64)
    return shift_sigmas(1 - alphas, shift).flip(0).float()


def euler_sigmas(num_steps: int, shift: float) -> Tensor:
    """Make the grid of flow-Euler: (num_steps + 1,) float32, decreasing from 1 to 0.

    Equals bit for bit the grid of diffusers' FlowMatchEulerDiscreteScheduler(shift=shift), which NVlabs' flow-Euler uses. It
    differs from `sampling_sigmas`: it starts at exactly 1; before the shift it is uniform down to the shifted sigma of timestep
    1 (so that end is shifted twice); and 0 is appended as one more, shorter step.

    Raises:
        ValueError: num_steps < 1, or shift not positive.
    """
    _check_num_steps(num_steps)
    sigma_min = shift_sigmas(torch.tensor(1 / NUM_TRAIN_TIMESTEPS), shift).item()
    sigmas = shift_sigmas(torch.linspace(1, sigma_min, num_steps, dtype=torch.float64), shift)
    return torch.cat([sigmas.float(), torch.zeros(1)])


def steps_skipped(num_steps: int, strength: float) -> float:
    """How many of N steps come before the noise level at which drawing from a picture begins; not always a whole number."""
    return round((1 - strength) * num_steps, 6)  # a rounding error must not add a step of no length


def steps_taken(num_steps: int, strength: float | None) -> int:
    """How many of N steps a drawing takes that starts from a picture; `strength` None: it starts from noise alone."""
    return num_steps if strength is None else num_steps - int(steps_skipped(num_steps, strength))


def cut_sigmas(sigmas: Tensor, strength: float) -> Tensor:
    """Cut a grid for drawing from a picture (img2img): keep the last `strength` of its steps, (M + 1,) with M <= N.

    Of N steps the last strength * N remain. If that is no whole number, the first of them begins within its step, so that the
    noise level to start at changes continuously with `strength`. (diffusers rounds the number of steps down.)

    Args:
        sigmas: (N + 1,), decreasing to 0.
        strength: above 0, at most 1; 1 returns `sigmas`.

    Raises:
        ValueError: strength is not above 0 and at most 1.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} must be above 0 and at most 1")
    position = steps_skipped(len(sigmas) - 1, strength)
    index = int(position)
    start = torch.lerp(sigmas[index], sigmas[index + 1], position - index)
    return torch.cat([start[None], sigmas[index + 1 :]])


def keep_known(predict_velocity: PredictVelocity, known_latents: Tensor, mask: Tensor) -> PredictVelocity:
    """Make a velocity that leads to `known_latents` wherever `mask` is False (inpainting by latent blending).

    There it is (x - x_0) / sigma, the velocity towards the known x_0: latents that begin as (1 - sigma) x_0 + sigma noise stay
    on that line, as if they were replaced by the noised known latents after each step. It needs nothing of the solver, as long
    as that asks for no velocity at sigma 0.

    Args:
        known_latents: (B, C, H, W) or (1, C, H, W), x_0.
        mask: bool, (B, 1, H, W) or (1, 1, H, W); True where the model draws.
    """

    def blended(latents: Tensor, sigma: Tensor) -> Tensor:
        velocity = predict_velocity(latents, sigma).to(latents.dtype)
        return torch.where(mask, velocity, (latents - known_latents) / sigma)

    return blended


def watch_estimates(predict_velocity: PredictVelocity, on_estimate: OnEstimate) -> PredictVelocity:
    """Make a velocity that, once predicted, shows where it leads: `on_estimate` gets x_0 = x - sigma velocity.

    A solver makes one prediction a step, so this is once a step. Of the picture it shows more, and earlier, than the latents
    after the step, which are still noisy.
    """
    indices = count()

    def watched(latents: Tensor, sigma: Tensor) -> Tensor:
        velocity = predict_velocity(latents, sigma).to(latents.dtype)
        on_estimate(next(indices), latents - sigma * velocity)
        return velocity

    return watched


def flow_dpm_solver(
    predict_velocity: PredictVelocity,
    latents: Tensor,
    sigmas: Tensor,
    *,
    order: int = 2,
    on_step: OnStep | None = None,
) -> Tensor:
    """Flow-DPM-Solver++ 2M: `latents` (B, C, H, W) at sigmas[0] -> latents at sigmas[-1], one prediction per step.

    DPM-Solver++ (Lu et al., arXiv 2211.01095, algorithm 2) on x_0 = x - sigma velocity, with alpha = 1 - sigma (Sana, arXiv
    2410.10629, algorithm 1). Good pictures take 14 to 20 steps.

    Args:
        latents: any floating dtype; computed and returned in float32 (float64 if given so), whatever `predict_velocity`
        returns.
        sigmas: (N + 1,) strictly decreasing in [0, 1], see `sampling_sigmas`. May start at 1.
        order: 2, or 1 (DDIM).

    Raises:
        ValueError: order is neither 1 nor 2.
    """
    if order not in (1, 2):
        raise ValueError(f"order={order} must be 1 or 2")
    latents = _at_least_float32(latents)
    sigma = sigmas.double()
    alpha = 1 - sigma
    log_snr = torch.log(alpha / sigma)
    h = log_snr.diff()
    x0_before = latents
    for i in range(len(h)):
        x0 = D = latents - sigma[i] * predict_velocity(latents, sigmas[i]).to(latents.dtype)
        # The first step is of first order, since there is no x0 before it. So is the step to sigma 0, where the log-SNR step h
        # is infinite and r would be 0. From sigma 1 the first h is infinite too; then r of the next step is infinite and D is
        # x0.
        if order == 2 and i > 0 and sigma[i + 1] > 0:
            r = h[i - 1] / h[i]
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        latents = sigma[i + 1] / sigma[i] * latents - alpha[i + 1] * torch.expm1(-h[i]) * D
        x0_before = x0
        if on_step is not None:
            on_step(i, latents)
    return latents


def flow_euler(predict_velocity: PredictVelocity, latents: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None) -> Tensor:
    """Euler's method: `latents` (B, C, H, W) at sigmas[0] -> latents at sigmas[-1], one prediction per step.

    The baseline in Sana's paper, with 28 to 50 steps. dtypes and `sigmas` are as in `flow_dpm_solver`; the usual grid is
    `euler_sigmas`.
    """
    latents = _at_least_float32(latents)
    for i in range(len(sigmas) - 1):
        velocity = predict_velocity(latents, sigmas[i]).to(latents.dtype)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
        if on_step is not None:
            on_step(i, latents)
    return latents


def classifier_free_guidance(
    predict_both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    predict_conditional: PredictVelocity,
    guidance_scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> PredictVelocity:
    """Guide: v_null + guidance_scale (v_cond - v_null), in the dtype of the latents (Ho and Salimans, arXiv 2207.12598).

    Guidance acts where lo < sigma < hi (Kynkäänniemi et al., arXiv 2404.07724), strictly inside as in NVlabs' code; with the
    interval (0, 1), the default, everywhere. At other noise levels, and at every level if guidance_scale is 1, only
    `predict_conditional` is called, at half the cost.

    Args:
        predict_both: (latents, sigma) -> (v_null, v_cond), from one doubled batch.
        predict_conditional: (latents, sigma) -> v_cond.
        interval: (lo, hi), in sigma.

    Raises:
        ValueError: not 0 <= lo < hi <= 1.
    """
    lo, hi = interval
    if not 0 <= lo < hi <= 1:
        raise ValueError(f"guidance interval {interval} must be (lo, hi) in sigma with 0 <= lo < hi <= 1")

    def predict_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        inside = (lo, hi) == (0, 1) or lo < sigma < hi
        if guidance_scale == 1 or not inside:
            return predict_conditional(latents, sigma)
        null, conditional = (velocity.to(latents.dtype) for velocity in predict_both(latents, sigma))
        return null + guidance_scale * (conditional - null)

    return predict_velocity


def scm_sigmas(num_steps: int) -> Tensor:
    """Make the grid of `scm`: (num_steps + 1,) float32, decreasing to 0.

    Sana-Sprint (arXiv 2503.09641) counts time as the angle t of TrigFlow, from 1.57080, just above pi / 2, to 0; with two steps
    it passes 1.3, with others the angles are equally far apart. The noise level is sigma = sin t / (cos t + sin t).

    Raises:
        ValueError: num_steps < 1.
    """
    _check_num_steps(num_steps)
    angles = torch.tensor([1.57080, 1.3, 0.0]) if num_steps == 2 else torch.linspace(1.57080, 0, num_steps + 1)
    return angles.sin() / (angles.cos() + angles.sin())


def scm(
    predict_velocity: PredictVelocity,
    latents: Tensor,
    sigmas: Tensor,
    *,
    draw_noise: Callable[[], Tensor],
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw with a consistency model (sCM, arXiv 2410.11081): `latents` (B, C, H, W) at sigmas[0] -> latents at sigmas[-1] = 0.

    Each step predicts x_0 = x - sigma velocity, and noises it anew to the next level. This is NVlabs' SCMScheduler: the flow's
    (1 - sigma) x_0 + sigma eps is TrigFlow's cos t x_0 + sin t eps, divided by cos t + sin t. Sana-Sprint takes one to four
    steps; the usual grid is `scm_sigmas`.

    Args:
        latents, sigmas: as in `flow_dpm_solver`.
        draw_noise: returns new standard normal noise of the shape of `latents`, for every step but the last.
    """
    latents = _at_least_float32(latents)
    for i in range(len(sigmas) - 1):
        x0 = latents - sigmas[i] * predict_velocity(latents, sigmas[i]).to(latents.dtype)
        latents = x0 if sigmas[i + 1] == 0 else (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * draw_noise()
        if on_step is not None:
            on_step(i, latents)
    return latents


class Solver(Protocol):
    """The signature that the solvers of `SOLVERS` share."""

    def __call__(
        self, predict_velocity: PredictVelocity, latents: Tensor, sigmas: Tensor, *, on_step: OnStep | None = None
    ) -> Tensor: ...


SOLVERS: dict[str, tuple[Solver, Callable[[int, float], Tensor]]] = {
    "flow_dpm_solver": (flow_dpm_solver, sampling_sigmas),
    "flow_euler": (flow_euler, euler_sigmas),
}
"""A solver's name in a configuration -> (solver, its grid: (num_steps, shift) -> sigmas). Besides there is `SCM`."""

SCM = "scm"
"""Name of the sampler of Sana-Sprint."""


def make_solver(name: str, num_steps: int, shift: float, draw_noise: Callable[[], Tensor]) -> tuple[Solver, Tensor]:
    """A solver of `SOLVERS`, or `SCM`, and its grid. `draw_noise`: as `scm` takes it. Raises ValueError as its grid does."""
    if name == SCM:
        return partial(scm, draw_noise=draw_noise), scm_sigmas(num_steps)
    solve, make_grid = SOLVERS[name]
    return solve, make_grid(num_steps, shift)


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")


def _at_least_float32(latents: Tensor) -> Tensor:
    return latents.to(torch.promote_types(latents.dtype, torch.float32))
