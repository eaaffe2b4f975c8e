"""The optimizers, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class CameConfig:
    """CAME (arXiv 2307.02047), as Sana is published with it. Its momentum takes 4 bytes a weight, the rest next to none.

    Args:
        betas: of the momentum, of the square gradients, and of the instability.
        eps: added to the square gradients, and to the instability.
    """

    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: tuple[float, float] = (1e-30, 1e-16)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """An optimizer and its schedule. The learning rate is what is written here: nothing scales it with batch or workers.

    Args:
        optimizer: "adamw", "adamw_8bit" (states in 8 bits), or, at ZeRO stage 0, which alone leaves the weights their shapes,
            "came" or "came_8bit" (its momentum in 8 bits).
        lr: the highest learning rate.
        betas: of AdamW.
        eps: of AdamW.
        came: what CAME has in their place.
        weight_decay: for all weights.
        max_grad_norm: gradients of a larger norm are scaled down to it; 0: never.
        schedule: "constant"; "cosine" down to `final_lr_share` at the last step; or "wsd": constant, and then down to it in a
            straight line over the last `decay_steps`.
        warmup_steps: steps of linear rise.
        decay_steps: of "wsd".
        final_lr_share: of `lr`, where "cosine" and "wsd" end.
    """

    optimizer: Literal["adamw", "adamw_8bit", "came", "came_8bit"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    came: CameConfig = field(default_factory=CameConfig)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_lr_share: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr={self.lr} must be positive")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ValueError(
                f"schedule={self.schedule} with decay_steps={self.decay_steps}: only wsd reads them, and needs them"
            )

    def check_sharding(self, zero_stage: int) -> None:
        """Raises ValueError if this optimizer cannot work on what a ZeRO stage makes of the weights."""
        if self.optimizer in ("came", "came_8bit") and zero_stage:
            raise ValueError(
                f"optimizer={self.optimizer} with zero_stage={zero_stage}: CAME keeps square gradients by row and column of "
                "each matrix, and ZeRO flattens matrices into vectors, in which it would keep all of them, unfactored and "
                "without a word. Set engine.zero_stage=0 (came_8bit needs less memory there than adamw_8bit), or take adamw"
            )


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Of the parameters that are trained."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.optimizer in ("came", "came_8bit"):
        from pipelines.came import Came8bit, PublishedCAME

        make, came = Came8bit if config.optimizer == "came_8bit" else PublishedCAME, config.came
        return make(trained, lr=config.lr, betas=came.betas, eps=came.eps, weight_decay=config.weight_decay)
    betas, eps, weight_decay = config.betas, config.eps, config.weight_decay
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=config.lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return torch.optim.AdamW(trained, lr=config.lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Of the step with this index, of `num_steps`. Rises to `lr` at index `warmup_steps`, from lr / (warmup_steps + 1)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        share = min(max(num_steps - 1 - step, 0) / config.decay_steps, 1.0)
    else:
        progress = (step - config.warmup_steps) / max(num_steps - 1 - config.warmup_steps, 1)
        share = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * share)
