"""Measurements of an autoencoder's training: each part of the loss, and the discriminator's."""

from collections.abc import Mapping

import torch
from torch import Tensor

from pipelines.train.loop.meter import StepMeter


class AutoencoderMeter(StepMeter):
    """Measures parts of the loss too. All ranks measure the same parts in the same steps."""

    def _clear(self) -> None:
        super()._clear()
        self._step_parts: dict[str, list[Tensor]] = {}
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Add a micro-batch: its loss (B,), and parts of it, each (B,)."""
        self.add_losses(loss, flops=0.0)
        self.add_parts(parts)

    def add_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Add further measurements of a micro-batch, each (B,) or a scalar."""
        for name, part in parts.items():
            self._step_parts.setdefault(name, []).append(part.detach().float().mean())

    def end_step(self, *, lr: float, grad_norm: float) -> None:
        for name, values in self._step_parts.items():
            self._parts.setdefault(name, []).extend(values)
        self._step_parts = {}
        super().end_step(lr=lr, grad_norm=grad_norm)

    def drop_step(self) -> None:
        super().drop_step()
        self._step_parts = {}

    def _measure_more(self, seconds: float) -> dict[str, float]:
        """The mean of each part over micro-batches and ranks."""
        if not self._parts:
            return {}
        means = self._sum_over_ranks(torch.stack([torch.stack(values).mean() for values in self._parts.values()]))
        return dict(zip(self._parts, (means / torch.distributed.get_world_size()).tolist(), strict=True))
