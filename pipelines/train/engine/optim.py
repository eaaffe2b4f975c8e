"""The optimizers, and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from pipelines.train.engine.config import OptimConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Make the configured optimizer for those of `parameters` that are trained."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.optimizer in ("came", "came_8bit"):
        from pipelines.train.engine.came import Came8bit, PublishedCAME

        make, came = Came8bit if config.optimizer == "came_8bit" else PublishedCAME, config.came
        made = make(trained, lr=config.lr, betas=came.betas, eps=came.eps, weight_decay=config.weight_decay)
        made.factor_1x1 = came.factor_1x1
        return made
    betas, eps, weight_decay = config.betas, config.eps, config.weight_decay
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=config.lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return torch.optim.AdamW(trained, lr=config.lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Return the learning rate of the step with index `step`, from 0, of `num_steps`.

    In the warm-up it rises linearly from lr / (warmup_steps + 1), and reaches `lr` at index `warmup_steps`.
    """
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
