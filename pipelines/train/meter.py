"""What a training measures: losses over all workers, by step and by noise level, and its speed."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sana_model.flow import loss_by_sigma
from sana_model.nn.config import LINEAR_HEAD_DIM, SanaConfig
from sana_model.nn.transformer import SanaTransformer

NUM_SIGMA_BINS = 5
NUM_END_STEPS = 20
"""Steps whose mean is the loss at the start, and at the end, of a training."""
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10G": 70e12,
    "L4": 121e12,
    "V100": 125e12,
}
"""Dense, with 16-bit inputs, as the makers publish them, by a part of the device's name; the first that fits counts."""


@dataclass(frozen=True)
class MeterReport:
    """Losses of the steps since the last report, mean over the global batch, and what else goes to MLflow."""

    losses: list[float]
    metrics: dict[str, float]

    @property
    def mean_loss(self) -> float:
        return self.metrics["loss"]


class TrainingMeter:
    """Collects what happens in the steps without waiting for the device; `collect` brings it together."""

    def __init__(self, device: torch.device):
        self.device = device
        self.started_at = 0.0  # time.time() of the first step
        self.num_samples = 0
        self.seconds = 0.0  # in steps
        self._clock = 0.0
        self._waited = 0.0
        self._peak_flops = peak_flops(device)
        self._clear()

    def _clear(self) -> None:
        self._step_losses: list[Tensor] = []
        self._step: list[tuple[Tensor, Tensor]] = []
        self._losses: list[Tensor] = []
        self._sigmas: list[Tensor] = []
        self._num_tokens = 0
        self._flops = 0.0
        self._grad_norms: list[float] = []
        self._lr = 0.0

    def start(self) -> None:
        self.started_at = time.time()
        self._clock = time.monotonic()

    def restart(self, wait_seconds: float) -> None:
        """Forget the steps since the last `collect`: they did not count."""
        self._clear()
        self._clock, self._waited = time.monotonic(), wait_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time within is not the steps'."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def add(self, loss: Tensor, sigma: Tensor, *, num_tokens: int, flops: float) -> None:
        """Of a micro-batch: loss and sigma (B,), its image tokens, and what computing it takes."""
        self._step.append((loss.detach(), sigma))
        self._num_tokens += num_tokens
        self._flops += flops

    def end_step(self, *, lr: float, grad_norm: float) -> None:
        self._step_losses.append(torch.stack([loss.mean() for loss, _ in self._step]).mean())
        self._losses += [loss for loss, _ in self._step]
        self._sigmas += [sigma for _, sigma in self._step]
        self._step = []
        self._grad_norms.append(grad_norm)
        self._lr = lr

    @property
    def step_losses(self) -> list[Tensor]:
        """Of the micro-batches of the step that goes on: (B,) each."""
        return [loss for loss, _ in self._step]

    def drop_step(self) -> None:
        """The step that goes on did not count."""
        self._step = []

    def collect(self, wait_seconds: float, global_batch_size: int) -> MeterReport | None:
        """What happened since the last time, over all ranks, all of which must call it; None if no step counted.

        `wait_seconds`: for data, since the beginning.
        """
        if not self._step_losses:
            return None
        losses, by_sigma = self._reduce()
        now = time.monotonic()
        seconds, waited = now - self._clock, wait_seconds - self._waited
        self._clock, self._waited = now, wait_seconds
        num_samples = len(losses) * global_batch_size
        self.num_samples += num_samples
        self.seconds += seconds
        metrics = {
            "loss": float(np.mean(losses)),
            "lr": self._lr,
            "grad_norm": float(np.mean(self._grad_norms)),
            "samples_per_second": num_samples / seconds,
            "seconds_per_step": seconds / len(losses),
            "tokens_per_second": torch.distributed.get_world_size() * self._num_tokens / seconds,
            "data_wait_share": waited / seconds,
            **by_sigma,
        }
        if self._peak_flops:
            metrics["mfu"] = self._flops / seconds / self._peak_flops
        if self.device.type == "cuda":
            metrics["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._clear()
        return MeterReport(losses, metrics)

    def _reduce(self) -> tuple[list[float], dict[str, float]]:
        """The loss of each step, and the mean loss of each range of noise levels in which a sample fell."""
        mean, count = loss_by_sigma(torch.cat(self._losses), torch.cat(self._sigmas), num_bins=NUM_SIGMA_BINS)
        total = torch.where(count > 0, mean * count, 0)
        values = torch.cat([torch.stack(self._step_losses), total, count.to(total)]).to(self.device, torch.float64)
        torch.distributed.all_reduce(values)
        num_steps, world_size = len(self._step_losses), torch.distributed.get_world_size()
        losses = (values[:num_steps] / world_size).tolist()
        total, count = values[num_steps:].chunk(2)
        edges = [bin_index / NUM_SIGMA_BINS for bin_index in range(NUM_SIGMA_BINS + 1)]
        by_sigma = {
            f"loss_sigma.{edges[index]:.1f}-{edges[index + 1]:.1f}": (total[index] / count[index]).item()
            for index in range(NUM_SIGMA_BINS)
            if count[index] > 0
        }
        return losses, by_sigma


class LossHistory:
    """The loss over the whole training, also across restarts."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        """(step, mean loss since the point before)."""
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=NUM_END_STEPS)

    def add(self, step: int, losses: list[float]) -> None:
        """The losses of the steps that end with `step`."""
        self.points.append((step, float(np.mean(losses))))
        self._first += losses[: NUM_END_STEPS - len(self._first)]
        self._last.extend(losses)

    def ends(self) -> tuple[float, float]:
        """Mean loss of the first and of the last NUM_END_STEPS steps (of all, where there are fewer)."""
        return float(np.mean(self._first)), float(np.mean(self._last))

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "first": self._first, "last": list(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points = [(step, loss) for step, loss in state["points"]]
        self._first = list(state["first"])
        self._last = deque(state["last"], maxlen=NUM_END_STEPS)


def peak_flops(device: torch.device) -> float | None:
    """None for a CPU, or a GPU that is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def step_flops(config: SanaConfig, *, batch_size: int, image_tokens: int, caption_tokens: int, adapters: bool = False) -> float:
    """Of a forward and a backward pass; what checkpointing recomputes is not counted.

    Args:
        image_tokens, caption_tokens: of one sample.
        adapters: only they are trained: frozen weights get no gradients. What the adapters compute is not counted.
    """
    by_image, by_caption, by_sample = _weights_by_use(config)
    matmuls = by_image * image_tokens + by_caption * caption_tokens + by_sample
    attention = 2 * config.depth * config.dim * image_tokens * (LINEAR_HEAD_DIM + caption_tokens)
    return 2.0 * batch_size * ((2 if adapters else 3) * matmuls + 3 * attention)


@cache
def _weights_by_use(config: SanaConfig) -> tuple[int, int, int]:
    """Numbers of weights that multiply each image token, each caption token, and each sample's time input."""
    with torch.device("meta"):
        model = SanaTransformer(config)
    counts = {"image": 0, "caption": 0, "sample": 0}
    for name, weight in model.named_parameters():
        if name.endswith("weight") and weight.ndim > 1:
            caption = name.startswith("caption_proj") or "key_value" in name
            counts["caption" if caption else "sample" if name.startswith("time_embed") else "image"] += weight.numel()
    return counts["image"], counts["caption"], counts["sample"]
