"""CAME (arXiv 2307.02047), the optimizer that Sana was trained with, and a variant that keeps its momentum in 8 bits.

The momentum is nearly all of the memory that CAME takes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes.functional as bnb
import torch
from came_pytorch.CAME import CAME
from torch import Tensor

VALUES_PER_SCALE = 256
MIN_QUANTIZED = 4096
"""Weights with fewer elements keep their momentum in float32, as with bitsandbytes' own optimizers."""


class PublishedCAME(CAME):
    """The authors' class, but only 2-D weights are factored into rows and columns, as in NVlabs' code for Sana.

    The authors also factor the 3x3 kernels of depth-wise convolutions, whose first updates are then tens of times too large.
    """

    factor_1x1 = False
    """Whether 1x1 convolutions are factored too, as the matrices that they are."""

    def _get_options(self, param_shape: torch.Size) -> bool:
        return len(param_shape) == 2

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        with self._as_matrices():
            super().step()
        return loss

    @contextmanager
    def _as_matrices(self) -> Iterator[None]:
        """Show 1x1 convolutions (out, in, 1, 1) that have a gradient as matrices (out, in) meanwhile, if they are factored."""
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        seen = [(weight, weight.shape) for weight in weights if self.factor_1x1 and is_1x1(weight)]
        try:
            for weight, _ in seen:
                _reshape(weight, weight.shape[:2])
            yield
        finally:
            for weight, shape in seen:
                _reshape(weight, shape)


def is_1x1(weight: Tensor) -> bool:
    """Whether a weight is that of a 1x1 convolution."""
    return weight.ndim == 4 and weight.shape[2:] == (1, 1)


def _reshape(weight: Tensor, shape: torch.Size) -> None:
    """Give a weight and its gradient another shape, without a copy."""
    gradient = weight.grad
    assert gradient is not None
    weight.grad = None
    weight.data = weight.data.view(shape)
    weight.grad = gradient.view(shape)


class Came8bit(PublishedCAME):
    """CAME with its momentum in bitsandbytes' dynamic 8-bit format: a float32 scale for each 256 values.

    A step updates one weight at a time, whose momentum is float32 meanwhile.
    """

    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure is not None else None
        groups = self.param_groups
        try:
            for group in groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        self.param_groups = [group | {"params": [weight]}]
                        self._step_one(weight)
        finally:
            self.param_groups = groups
        return loss

    def _step_one(self, weight: Tensor) -> None:
        state = self.state[weight]
        if "exp_avg_8bit" in state:
            values, scales = state.pop("exp_avg_8bit"), state.pop("exp_avg_scales")
            state["exp_avg"] = bnb.dequantize_blockwise(values, absmax=scales, blocksize=VALUES_PER_SCALE)
        super().step()
        if weight.numel() >= MIN_QUANTIZED:
            state["exp_avg_8bit"], quantized = bnb.quantize_blockwise(state.pop("exp_avg"), blocksize=VALUES_PER_SCALE)
            state["exp_avg_scales"] = quantized.absmax
