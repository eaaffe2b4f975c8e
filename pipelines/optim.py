"""The optimizer, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. The learning rate is what is written here: nothing scales it with batch or workers.

    Args:
        lr: the highest learning rate.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW, for all weights.
        max_grad_norm: gradients of a larger norm are scaled down to it; 0: never.
        schedule: "constant", or "cosine" down to `final_lr_share` at the last step.
        warmup_steps: steps of linear rise.
        final_lr_share: of `lr`, where "cosine" ends.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    final_lr_share: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Of the step with this index, of `num_steps`. Rises to `lr` at index `warmup_steps`, from lr / (warmup_steps + 1)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(num_steps - 1 - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * cosine)
