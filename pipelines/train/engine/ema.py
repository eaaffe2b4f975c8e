"""The moving average of the weights, in float32. Each rank averages the part of the weights that it holds."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipelines.train.engine.config import EmaConfig


class EMA:
    """Moving averages of `weights`, the float32 master weights of this rank.

    An average is elementwise, so the parts of all ranks together equal the average that a single process would compute.
    `averages` and `num_updates` are all of its state.
    """

    def __init__(self, weights: Sequence[Tensor], config: EmaConfig):
        self.config = config
        self.num_updates = 0
        self.averages = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """Move the averages towards `weights`. Call it after each optimizer step."""
        self.num_updates += 1
        torch._foreach_lerp_(self.averages, list(weights), 1 - self.decay)

    @property
    def decay(self) -> float:
        """Decay of the last update."""
        return min(self.config.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @contextmanager
    def in_place_of(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Within, `weights` hold the averages; afterwards they hold exactly what they held before."""
        self._swap(weights)
        try:
            yield
        finally:
            self._swap(weights)

    @torch.no_grad()
    def _swap(self, weights: Sequence[Tensor]) -> None:
        for average, weight in zip(self.averages, weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
