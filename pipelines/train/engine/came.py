"""CAME as Sana was trained with it, and with its momentum, which is nearly all that it remembers, in 8 bits."""

from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import torch
from came_pytorch.CAME import CAME
from torch import Tensor

BLOCK = 256  # values that share a scale
SMALLEST = 4096  # weights with fewer elements keep it in float32, as bitsandbytes' own optimizers do


class PublishedCAME(CAME):
    """The authors' class, which keeps rows and columns of matrices alone.

    Theirs takes the 3x3 of a depth-wise convolution for matrices too, whose updates are then tens of times too large at first;
    NVlabs' code does not.
    """

    def _get_options(self, param_shape: torch.Size) -> bool:
        return len(param_shape) == 2


class Came8bit(PublishedCAME):
    """The authors' steps, weight by weight: before each the momentum becomes float32, and after it 8 bits again.

    The 8 bits are bitsandbytes' dynamic ones, with a float32 scale for each 256 values.
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
            state["exp_avg"] = bnb.dequantize_blockwise(values, absmax=scales, blocksize=BLOCK)
        super().step()
        if weight.numel() >= SMALLEST:
            state["exp_avg_8bit"], quantized = bnb.quantize_blockwise(state.pop("exp_avg"), blocksize=BLOCK)
            state["exp_avg_scales"] = quantized.absmax
