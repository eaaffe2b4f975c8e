"""Flow-DPM-Solver against flow-Euler where the velocity is known exactly."""

import torch
from torch import Tensor

from jobs.benchmark.config import SolverConfig
from sana_model.flow import shift_sigmas
from sana_model.solver import SOLVERS, flow_euler

STEPS = (8, 14, 20, 28, 50)


def mixture_velocity(latents: Tensor, sigma: Tensor, means: Tensor, std: float) -> Tensor:
    """Exact velocity E[eps - x0 | x_t] = (x_t - E[x0 | x_t]) / sigma of data from equal Gaussians N(means[k], std^2 I).

    Args: latents (N, D), sigma 0-d, means (K, D). Returns (N, D).
    """
    alpha = 1 - sigma
    variance = (alpha * std) ** 2 + sigma**2
    log_weight = (alpha * latents @ means.T - 0.5 * alpha**2 * means.square().sum(1)) / variance  # (N, K)
    shrink = alpha * std**2 / variance
    x0 = (1 - alpha * shrink) * log_weight.softmax(1) @ means + shrink * latents
    return (latents - x0) / sigma


def mixture_errors(seed: int = 0, shift: float = 3.0, std: float = 0.3) -> dict[str, dict[int, float]]:
    """RMSE of each solver at each of STEPS to a 2000-step Euler run in float64, on a 32-d mixture of 16 Gaussians."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(16, 32, generator=generator, dtype=torch.float64)
    start = torch.randn(512, 32, generator=generator, dtype=torch.float64)

    def exact(latents: Tensor, sigma: Tensor) -> Tensor:
        return mixture_velocity(latents, sigma.double(), means, std)

    reference = flow_euler(exact, start, shift_sigmas(torch.linspace(1, 0, 2001, dtype=torch.float64), shift))
    return {
        name: {n: (solver(exact, start, grid(n, shift)) - reference).square().mean().sqrt().item() for n in STEPS}
        for name, (solver, grid) in SOLVERS.items()
    }


def benchmark_solver(config: SolverConfig) -> None:
    """Print the solvers' errors by number of steps on a Gaussian mixture with the exact velocity (32-d, 16 modes)."""
    seed, shift, std = config.seed, config.shift, config.std
    errors = mixture_errors(seed, shift, std)
    print(f"RMSE to a 2000-step reference, shift {shift}, std {std}, seed {seed}")
    print("steps".ljust(18) + "".join(f"{n:>8}" for n in STEPS))
    for name, row in errors.items():
        print(name.ljust(18) + "".join(f"{value:8.4f}" for value in row.values()))
    ratios = [errors["flow_euler"][n] / errors["flow_dpm_solver"][n] for n in STEPS]
    print("euler / dpm".ljust(18) + "".join(f"{ratio:8.2f}" for ratio in ratios))
