"""Measurements of a training: losses over all workers by step, gradients and speed.

`StepMeter` collects them between two reports, `LossHistory` keeps losses over the whole training.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


class StepMeter:
    """Collects measurements of the steps without waiting for the device; only `collect` waits for it.

    For each step call `add` for each micro-batch, then `end_step`, or `drop_step` if the step does not count. A training that
    measures more extends these methods and `_measure_more`.

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
        self.step_losses: list[Tensor] = []
        """Losses of the current step: (B,) for each micro-batch so far."""
        self._step_means: list[Tensor] = []
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

    def add_losses(self, loss: Tensor, *, flops: float) -> None:
        """Add a micro-batch: loss (B,), and FLOPs to compute it."""
        self.step_losses.append(loss.detach())
        self._flops += flops

    def end_step(self, *, lr: float, grad_norm: float) -> None:
        """Count the current step."""
        self._step_means.append(torch.stack([loss.mean() for loss in self.step_losses]).mean())
        self.step_losses = []
        self._grad_norms.append(grad_norm)
        self._lr = lr

    def drop_step(self) -> None:
        """Forget the losses of the current step."""
        self.step_losses = []

    def collect(self, wait_seconds: float, global_batch_size: int) -> MeterReport | None:
        """Return the measurements since the last call, over all ranks; None if no step counted. Collective call.

        Args:
            wait_seconds: time that this rank has waited for samples since the training began.
            global_batch_size: samples of a step.
        """
        if not self._step_means:
            return None
        sums = self._sum_over_ranks(torch.stack(self._step_means))
        losses = (sums / torch.distributed.get_world_size()).tolist()
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
            "data_wait_share": waited / seconds,
            **self._measure_more(seconds),
        }
        if self._peak_flops and self._flops:
            metrics["mfu"] = self._flops / seconds / self._peak_flops
        if self.device.type == "cuda":
            metrics["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._clear()
        return MeterReport(losses, metrics)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of all ranks' values, in float64. Collective call."""
        values = values.to(self.device, torch.float64)
        torch.distributed.all_reduce(values)
        return values

    def _measure_more(self, seconds: float) -> dict[str, float]:
        """Return further metrics of the steps since the last `collect`, which took so many seconds. Collective call."""
        return {}


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
