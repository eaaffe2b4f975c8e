"""The solvers against diffusers' schedulers, exact flows and each other."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from sana_model.flow import sigma_to_timestep
from sana_model.solver import (
    SOLVERS,
    PredictVelocity,
    classifier_free_guidance,
    cut_sigmas,
    euler_sigmas,
    flow_dpm_solver,
    flow_euler,
    keep_known,
    make_solver,
    sampling_sigmas,
    watch_estimates,
)

STEPS = (8, 14, 20, 28, 50)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dpm_scheduler(shift: float, order: int = 2) -> Any:  # diffusers' schedulers have no types
    return DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift, solver_order=order
    )


def euler_scheduler(shift: float) -> Any:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


class ConvVelocity(nn.Module):
    """A small seeded network of (latents, timestep)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

    @torch.no_grad()
    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        velocity: Tensor = self.leave(torch.tanh(2 * self.enter(latents) + torch.sin(timestep / 100)))
        return latents + velocity


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_grids_are_those_of_diffusers_to_the_bit(shift: float) -> None:
    dpm, euler = dpm_scheduler(shift), euler_scheduler(shift)
    for num_steps in range(1, 51):
        dpm.set_timesteps(num_steps)
        euler.set_timesteps(num_steps)
        for ours, theirs in (
            (sampling_sigmas(num_steps, shift), dpm.sigmas),
            (euler_sigmas(num_steps, shift), euler.sigmas),
        ):
            assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
            assert (ours.diff() < 0).all() and ours[-1] == 0


@pytest.mark.parametrize("num_steps", [1, 2, 14, 15, 20])
@pytest.mark.parametrize("order", [1, 2])
def test_flow_dpm_solver_draws_what_diffusers_draws(num_steps: int, order: int) -> None:
    model = ConvVelocity()
    start = torch.randn(2, 4, 8, 8, generator=generator())
    scheduler = dpm_scheduler(3.0, order)
    scheduler.set_timesteps(num_steps)
    expected = start
    for timestep in scheduler.timesteps:  # int64
        expected = scheduler.step(model(expected, timestep), timestep, expected).prev_sample

    latents = flow_dpm_solver(
        lambda latents, sigma: model(latents, sigma_to_timestep(sigma).trunc()),
        start,
        sampling_sigmas(num_steps, 3.0),
        order=order,
    )
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("num_steps", [1, 2, 14, 15, 20])
def test_flow_euler_draws_what_diffusers_draws(num_steps: int) -> None:
    model = ConvVelocity()
    start = torch.randn(2, 4, 8, 8, generator=generator())
    scheduler = euler_scheduler(3.0)
    scheduler.set_timesteps(num_steps)
    expected = start
    for timestep in scheduler.timesteps:
        expected = scheduler.step(model(expected, timestep), timestep, expected).prev_sample

    latents = flow_euler(lambda latents, sigma: model(latents, sigma_to_timestep(sigma)), start, euler_sigmas(num_steps, 3.0))
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("solver_name", SOLVERS)
@pytest.mark.parametrize("grid_name", SOLVERS)
def test_one_step_is_exact_when_all_data_is_one_point(solver_name: str, grid_name: str) -> None:
    solver, grid = SOLVERS[solver_name][0], SOLVERS[grid_name][1]
    point = torch.randn(1, 4, 3, 3, generator=generator(1))
    start = torch.randn(5, 4, 3, 3, generator=generator(2))
    for num_steps in (1, 7):
        latents = solver(lambda latents, sigma: (latents - point) / sigma, start, grid(num_steps, 3.0))
        torch.testing.assert_close(latents, point.expand_as(start))


@pytest.mark.parametrize("num_steps", [1, 2, 3, 20])
def test_a_grid_from_exactly_1_stays_finite_and_close(num_steps: int) -> None:
    model = ConvVelocity()
    start = torch.randn(2, 4, 8, 8, generator=generator())
    sigmas = sampling_sigmas(num_steps, 3.0)
    from_1 = torch.cat([torch.ones(1), sigmas[1:]])  # 0.99967 -> 1
    drawn = [flow_dpm_solver(lambda x, sigma: model(x, 1000 * sigma), start, grid) for grid in (sigmas, from_1)]
    assert torch.isfinite(drawn[1]).all()
    # Not closer, because the second step is of second order from 0.99967 and of first order from 1.
    assert (drawn[0] - drawn[1]).abs().max() < 0.05 * drawn[0].abs().max()


def test_second_order_converges_with_the_square_of_the_step() -> None:
    """On a part of the trajectory without the first-order ends' singularity: halving the steps quarters the error."""

    def curved(latents: Tensor, sigma: Tensor) -> Tensor:
        return torch.sin(3 * latents) + 4 * sigma * latents.cos()

    start = torch.randn(1, 1, 4, 4, generator=generator(), dtype=torch.float64)

    def grid(num_steps: int) -> Tensor:
        return torch.linspace(0.9, 0.1, num_steps + 1, dtype=torch.float64)

    reference = flow_dpm_solver(curved, start, grid(6400))
    error = {
        (solver, num_steps): (solver(curved, start, grid(num_steps)) - reference).abs().max().item()
        for solver in (flow_dpm_solver, flow_euler)
        for num_steps in (200, 400)
    }
    assert error[flow_dpm_solver, 200] / error[flow_dpm_solver, 400] == pytest.approx(4, rel=0.15)
    assert error[flow_euler, 200] / error[flow_euler, 400] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("solver_name", SOLVERS)
def test_latents_stay_in_float32_around_a_bf16_model(solver_name: str) -> None:
    solver, grid = SOLVERS[solver_name]
    start = torch.randn(2, 4, 8, 8, generator=generator())
    seen, done = [], []

    def bf16_velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.ndim == 0
        seen.append(latents.dtype)
        return latents.bfloat16()

    latents = solver(bf16_velocity, start.bfloat16(), grid(5, 3.0), on_step=lambda i, x: done.append((i, x)))
    assert set(seen) == {torch.float32} and latents.dtype == torch.float32
    assert [i for i, _ in done] == [0, 1, 2, 3, 4]
    assert torch.equal(done[-1][1], latents)


@pytest.mark.parametrize("solver_name", [*SOLVERS, "scm"])
def test_estimates_come_once_a_step_end_at_the_result_and_change_nothing(solver_name: str) -> None:
    start, goal = (torch.randn(1, 4, 8, 8, generator=generator(seed)) for seed in (0, 1))

    def draw(predict: PredictVelocity) -> Tensor:
        noise = generator(2)
        solve, sigmas = make_solver(solver_name, 5, 3.0, lambda: torch.randn(start.shape, generator=noise))
        return solve(predict, start, sigmas)

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:  # towards what is near the goal
        return (latents - goal - 0.1 * torch.tanh(latents)) / sigma

    seen: list[tuple[int, Tensor]] = []
    drawn = draw(watch_estimates(velocity, lambda index, x0: seen.append((index, x0))))
    assert torch.equal(drawn, draw(velocity)) and [index for index, _ in seen] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(seen[-1][1], drawn)
    assert all((x0 - goal).abs().max() <= 0.11 for _, x0 in seen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver_name", SOLVERS)
def test_a_grid_on_the_cpu_serves_latents_on_a_gpu(solver_name: str) -> None:
    solver, grid = SOLVERS[solver_name]
    start = torch.randn(2, 4, 8, 8, generator=generator())

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(latents) + sigma

    on_gpu = solver(velocity, start.cuda(), grid(20, 3.0))
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), solver(velocity, start, grid(20, 3.0)), rtol=1e-4, atol=1e-5)


class TwoCaptions:
    """A conditional model with a count of the samples that it was asked for."""

    def __init__(self) -> None:
        self.num_samples = 0

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        self.num_samples += len(latents)
        return torch.tanh(latents) * condition.view(-1, 1, 1, 1) + sigma

    def predict_both(self, latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        condition = torch.tensor([0.0, 1.0]).repeat_interleave(len(latents))
        null, conditional = self(latents.repeat(2, 1, 1, 1), sigma, condition).bfloat16().chunk(2)
        return null, conditional

    def predict_conditional(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return self(latents, sigma, torch.ones(len(latents)))

    def guided(self, guidance_scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> PredictVelocity:
        return classifier_free_guidance(self.predict_both, self.predict_conditional, guidance_scale, interval)


def test_guidance_extrapolates_in_the_dtype_of_the_latents() -> None:
    latents, sigma = torch.randn(3, 4, 2, 2, generator=generator()), torch.tensor(0.4)
    model = TwoCaptions()
    null, conditional = model.predict_both(latents, sigma)
    velocity = model.guided(4.5)(latents, sigma)
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, null.float() + 4.5 * (conditional.float() - null.float()))


@pytest.mark.parametrize(
    ("guidance_scale", "interval", "num_guided"),
    [(4.5, (0.0, 1.0), 10), (1.0, (0.0, 1.0), 0), (4.5, (0.3, 0.8), 4), (0.0, (0.0, 0.15), 1)],
)
def test_guidance_costs_a_second_sample_only_inside_its_interval(
    guidance_scale: float, interval: tuple[float, float], num_guided: int
) -> None:
    model = TwoCaptions()
    velocity = model.guided(guidance_scale, interval)
    sigmas = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])  # 0.8 and 0.3 are not inside, as in NVlabs
    flow_euler(velocity, torch.randn(3, 4, 2, 2, generator=generator()), sigmas)
    assert model.num_samples == 3 * (10 + num_guided)


def test_without_guidance_the_velocity_is_the_conditional_one() -> None:
    latents = torch.randn(3, 4, 2, 2, generator=generator())
    model = TwoCaptions()
    for velocity, sigma in ((model.guided(1.0), 0.5), (model.guided(7.0, (0.1, 0.4)), 0.5)):
        assert torch.equal(velocity(latents, torch.tensor(sigma)), model.predict_conditional(latents, torch.tensor(sigma)))


def test_bad_input_is_refused_by_name() -> None:
    for grid in (sampling_sigmas, euler_sigmas):
        with pytest.raises(ValueError, match="num_steps=0"):
            grid(0, 3.0)
        with pytest.raises(ValueError, match="shift=0"):
            grid(20, 0)
    with pytest.raises(ValueError, match="order=3"):
        flow_dpm_solver(lambda x, sigma: x, torch.zeros(1, 1, 1, 1), sampling_sigmas(2, 1.0), order=3)
    for interval in ((0.5, 0.5), (0.8, 0.2), (-0.1, 1.0), (0.0, 1.5)):
        with pytest.raises(ValueError, match="guidance interval"):
            TwoCaptions().guided(4.5, interval)


def test_a_cut_grid_ends_as_the_whole_one_and_begins_where_the_strength_says() -> None:
    for make_grid in (sampling_sigmas, euler_sigmas):
        sigmas = make_grid(20, 3.0)
        assert torch.equal(cut_sigmas(sigmas, 1), sigmas)
        for steps in range(1, 21):
            assert torch.equal(cut_sigmas(sigmas, steps / 20), sigmas[20 - steps :]), steps
        starts = [cut_sigmas(sigmas, strength)[0].item() for strength in torch.linspace(0.01, 1, 100).tolist()]
        assert all(0 < after - before < 0.05 for before, after in pairwise(starts))
        cut = cut_sigmas(sigmas, 0.53)  # 10.6 steps
        assert len(cut) == 12 and torch.equal(cut[1:], sigmas[10:])
        assert cut[0].item() == pytest.approx((0.4 * sigmas[10] + 0.6 * sigmas[9]).item())
    for strength in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="strength="):
            cut_sigmas(sigmas, strength)


@pytest.mark.parametrize("solver", SOLVERS)
def test_kept_latents_are_those_of_replacing_them_after_every_step(solver: str) -> None:
    """Latent blending as it is usually written, with each solver's step taken by itself."""
    solve, make_grid = SOLVERS[solver]
    velocity = ConvVelocity()
    known, noise = (torch.randn(2, 4, 8, 8, generator=generator(seed)) for seed in (1, 2))
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6] = True
    sigmas = make_grid(12, 3.0)

    def predict(latents: Tensor, sigma: Tensor) -> Tensor:
        return velocity(latents, sigma_to_timestep(sigma))

    start = (1 - sigmas[0]) * known + sigmas[0] * noise
    kept = solve(keep_known(predict, known, mask), start, sigmas)
    blended: dict[int, Tensor] = {}

    def blend(step: int, latents: Tensor) -> None:
        after = sigmas[step + 1]
        latents.copy_(torch.where(mask, latents, (1 - after) * known + after * noise))
        blended[0] = latents

    if solver == "flow_euler":  # keeps nothing between its steps, so that changing its latents is all
        solve(predict, start, sigmas, on_step=blend)
        assert (kept - blended[0]).abs().max() <= 1e-4
    outside = (kept - known)[..., ~mask[0, 0]].abs().max()
    assert outside <= 1e-5 and (kept - known)[..., mask[0, 0]].abs().mean() > 0.1
