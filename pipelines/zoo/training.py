"""The training loop of every tiny checkpoint: AdamW, warm-up and cosine decay, gradient clipping, regular saves."""

import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.zoo.config import LoopConfig

Figures = dict[str, float]
ComputeLoss = Callable[[np.ndarray, np.random.Generator, float], Tensor]
"""(indices of rows, generator, progress in [0, 1]) -> scalar loss."""


def fit(
    parameters: Iterable[nn.Parameter],
    compute_loss: ComputeLoss,
    *,
    num_rows: int,
    config: LoopConfig,
    save: Callable[[], None],
    evaluate: Callable[[], Figures],
    after_step: Callable[[], None] = lambda: None,
    is_good_enough: Callable[[Figures], bool] = lambda figures: False,
) -> Figures:
    """Train on batches of random rows below `num_rows`; evaluate and save every `eval_every` steps and at the end.

    `after_step` is called after each optimizer step. The training also ends when `is_good_enough` says so of the figures.
    Returns `step`, `minutes`, `loss` (mean over the last 100 steps) and the last figures of `evaluate`.
    Raises FloatingPointError if the loss is not finite.
    """
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    start = time.monotonic()
    recent: list[float] = []
    figures: Figures = {}
    bar = tqdm(range(config.num_steps), mininterval=10, smoothing=0.05)
    for step in bar:
        progress = max(step / config.num_steps, (time.monotonic() - start) / 60 / config.minutes)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step, progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss = compute_loss(rng.integers(num_rows, size=config.micro_batch_size), rng, progress)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss={loss.item()} at step {step}: lower the learning rate, lr={config.lr}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        after_step()
        recent = [*recent[-99:], loss.item()]
        bar.set_postfix(loss=f"{np.mean(recent):.4f}", refresh=False)
        is_last = progress >= 1 or step + 1 == config.num_steps
        if is_last or (step + 1) % config.eval_every == 0:
            minutes = (time.monotonic() - start) / 60
            figures = {"step": step + 1, "minutes": minutes, "loss": float(np.mean(recent)), **evaluate()}
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
            save()
            if is_last or is_good_enough(figures):
                break
    return figures


def _learning_rate(config: LoopConfig, step: int, progress: float) -> float:
    """A linear warm-up, then a cosine from `lr` down to 2 % of it."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return config.lr * warmup * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0))))
