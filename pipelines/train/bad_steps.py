"""What a training does when gradients are not finite, or the loss leaps."""

import math
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.train.config import BadStepConfig

NUM_RECENT = 50
"""Steps whose median is the usual loss; no leap is seen before there are as many."""


class BadStepGuard:
    """Tells bad steps from good ones, on all ranks alike: they judge by what is the same on all of them."""

    def __init__(self, config: BadStepConfig, device: torch.device):
        self.config = config
        self.device = device
        self.num_bad = 0
        self.num_in_a_row = 0
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self._loss = 0.0  # of the step so far, on this rank

    def watch(self, loss: Tensor, *, share: float, last: bool) -> Tensor:
        """The loss of a micro-batch to go backward from.

        Args:
            share: of the micro-batch in the step.
            last: of the step's. Where the step's loss leaps this one becomes NaN: no optimizer applies its gradients then.
        """
        if self.config.spike_factor is None:
            return loss
        self._loss += float(loss.detach()) * share
        if not last:
            return loss
        total = torch.tensor(self._loss, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        step_loss, self._loss = total.item() / torch.distributed.get_world_size(), 0.0
        if len(self._recent) == NUM_RECENT and step_loss > self.config.spike_factor * float(np.median(self._recent)):
            return loss * float("nan")
        if math.isfinite(step_loss):
            self._recent.append(step_loss)
        return loss

    def is_bad(self, grad_norm: float, losses: list[Tensor], *, scaled: bool) -> bool:
        """Of a step, from the norm of its gradients. With a `scaled` loss they may overflow, which the scale takes care of."""
        bad = not math.isfinite(grad_norm)
        if bad and scaled:
            broken = (~torch.isfinite(torch.cat(losses)).all()).to(self.device, torch.float32)
            torch.distributed.all_reduce(broken, op=torch.distributed.ReduceOp.MAX)
            bad = bool(broken.item())
        self.num_bad += bad
        self.num_in_a_row = self.num_in_a_row + 1 if bad else 0
        return bad

    def state_dict(self) -> dict[str, Any]:
        return {"num_bad": self.num_bad, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_bad = state["num_bad"]
        self._recent = deque(state["recent"], maxlen=NUM_RECENT)
