"""Measurements of a training: losses over all workers, by step and by noise level, and speed, in samples and in FLOPs.

`TrainingMeter` collects them between two reports, `LossHistory` keeps losses over the whole training, and `step_flops` counts
the floating-point operations of a step, from which the share of the device's peak (MFU) follows.
"""

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
"""The loss at the start, or at the end, of a training is the mean over this many steps."""
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
"""Published peak of dense 16-bit FLOPs per second, by a part of the device's name; the first part that occurs in it counts."""


@dataclass(frozen=True)
class MeterReport:
    """Measurements since the last report.

    losses: loss of each step, a mean over the global batch. metrics: name -> value, as logged to MLflow.
    """

    losses: list[float]
    metrics: dict[str, float]

    @property
    def mean_loss(self) -> float:
        """Mean over the steps."""
        return self.metrics["loss"]


class TrainingMeter:
    """Collects measurements of the steps without waiting for the device; only `collect` waits for it.

    For each step call `add` for each micro-batch, then `end_step`, or `drop_step` if the step does not count.

    started_at: `time.time()` of the first step. num_samples, seconds: of all steps that were collected.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.started_at = 0.0
        self.num_samples = 0
        self.seconds = 0.0
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
        """Begin to measure time, right before the first step."""
        self.started_at = time.time()
        self._clock = time.monotonic()

    def restart(self, wait_seconds: float) -> None:
        """Forget the steps since the last `collect`, which will be repeated. `wait_seconds`: see `collect`."""
        self._clear()
        self._clock, self._waited = time.monotonic(), wait_seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, time does not count as time of the steps."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def add(self, loss: Tensor, sigma: Tensor, *, num_tokens: int, flops: float) -> None:
        """Add a micro-batch: loss (B,), noise levels (B,), number of its image tokens, and FLOPs to compute it."""
        self._step.append((loss.detach(), sigma))
        self._num_tokens += num_tokens
        self._flops += flops

    def end_step(self, *, lr: float, grad_norm: float) -> None:
        """Count the current step."""
        self._step_losses.append(torch.stack([loss.mean() for loss, _ in self._step]).mean())
        self._losses += [loss for loss, _ in self._step]
        self._sigmas += [sigma for _, sigma in self._step]
        self._step = []
        self._grad_norms.append(grad_norm)
        self._lr = lr

    @property
    def step_losses(self) -> list[Tensor]:
        """Losses of the current step: (B,) for each micro-batch so far."""
        return [loss for loss, _ in self._step]

    def drop_step(self) -> None:
        """Forget the losses of the current step."""
        self._step = []

    def collect(self, wait_seconds: float, global_batch_size: int) -> MeterReport | None:
        """Return the measurements since the last call, over all ranks; None if no step counted. Collective call.

        Args:
            wait_seconds: time that this rank has waited for samples since the training began.
            global_batch_size: samples of a step.
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
        """Return the loss of each step, and the mean loss by range of noise levels, for ranges in which there are samples."""
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
    """The loss over the whole training; it is part of the checkpoints, so restarts do not interrupt it."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        """(step, mean loss since the point before)."""
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=NUM_END_STEPS)

    def add(self, step: int, losses: list[float]) -> None:
        """Add the losses of the steps up to `step` since the last call."""
        self.points.append((step, float(np.mean(losses))))
        self._first += losses[: NUM_END_STEPS - len(self._first)]
        self._last.extend(losses)

    def ends(self) -> tuple[float, float]:
        """Return the mean loss of the first and of the last NUM_END_STEPS steps, or of all steps if there are fewer."""
        return float(np.mean(self._first)), float(np.mean(self._last))

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points, "first": self._first, "last": list(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points = [(step, loss) for step, loss in state["points"]]
        self._first = list(state["first"])
        self._last = deque(state["last"], maxlen=NUM_END_STEPS)


def peak_flops(device: torch.device) -> float | None:
    """Return a device's peak of dense 16-bit FLOPs per second; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def step_flops(config: SanaConfig, *, batch_size: int, image_tokens: int, caption_tokens: int, adapters: bool = False) -> float:
    """Return the FLOPs of a forward and a backward pass, without what gradient checkpointing recomputes.

    Args:
        config: the transformer.
        batch_size: number of samples.
        image_tokens: image tokens of a sample.
        caption_tokens: caption tokens of a sample.
        adapters: only adapters are trained, so the frozen weights need no gradients. The adapters' own FLOPs are not counted.
    """
    by_image, by_caption, by_sample = _weights_by_use(config)
    matmuls = by_image * image_tokens + by_caption * caption_tokens + by_sample
    attention = 2 * config.depth * config.dim * image_tokens * (LINEAR_HEAD_DIM + caption_tokens)
    return 2.0 * batch_size * ((2 if adapters else 3) * matmuls + 3 * attention)


@cache
def _weights_by_use(config: SanaConfig) -> tuple[int, int, int]:
    """Return the numbers of weights that multiply each image token, each caption token, and each sample's time input."""
    with torch.device("meta"):
        model = SanaTransformer(config)
    counts = {"image": 0, "caption": 0, "sample": 0}
    for name, weight in model.named_parameters():
        if name.endswith("weight") and weight.ndim > 1:
            caption = name.startswith("caption_proj") or "key_value" in name
            counts["caption" if caption else "sample" if name.startswith("time_embed") else "image"] += weight.numel()
    return counts["image"], counts["caption"], counts["sample"]
