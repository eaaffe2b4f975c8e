"""Detection of bad steps: gradients that are not finite, or a loss that suddenly leaps."""

import math
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.train.loop.config import BadStepConfig

NUM_RECENT = 50
"""The usual loss is the median over this many steps; before a training has made them, no leap is detected."""


class BadStepGuard:
    """Tells bad steps from good ones. All ranks reach the same verdict, since they judge by values reduced over all ranks.

    num_bad: bad steps of the whole training. num_in_a_row: bad steps since the last good one.
    """

    def __init__(self, config: BadStepConfig, device: torch.device):
        self.config = config
        self.device = device
        self.num_bad = 0
        self.num_in_a_row = 0
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)
        self._loss = 0.0  # this rank's loss of the micro-batches so far, each weighted with its share of the step

    def watch(self, loss: Tensor, *, share: float, last: bool) -> Tensor:
        """Note the loss of a micro-batch. Returns the loss for the backward pass.

        If the step's loss leaps, the loss returned for its last micro-batch is NaN, so that its gradients are not applied.

        Args:
            loss: mean loss of the micro-batch, a scalar.
            share: share of the micro-batch in the step.
            last: it is the last micro-batch of the step; then all ranks must call together.
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
        """Judge a step after `Engine.step`, and count it. All ranks must call together.

        Args:
            grad_norm: norm of the gradients.
            losses: this rank's losses of the step's samples, (B,) for each micro-batch.
            scaled: the loss is scaled (fp16). Then gradients may overflow, which the loss scale adapts to: the step is bad only
                if a loss is not finite either.
        """
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
