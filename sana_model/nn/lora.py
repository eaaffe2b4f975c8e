"""LoRA (arXiv 2106.09685) and its kin while drawing: changes of a model's weights, kept beside them or added to them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_model.nn.quantized import QuantizedLinear


@dataclass(frozen=True)
class WeightChange:
    """What is added to a weight, at scale 1: the product of two matrices, or one tensor.

    up: (out, rank); or, without `down`, the whole change, of the weight's shape. down: (rank, in).
    """

    up: Tensor
    down: Tensor | None = None

    def whole(self) -> Tensor:
        """The change in float32: (out, in), or of the weight's shape."""
        return self.up.float() if self.down is None else self.up.float() @ self.down.float()


class _Branch(nn.Module):
    """Computes what a change adds to a layer's output. Its tensors move with the model, and are in no state dict."""

    up: Tensor
    down: Tensor | None

    def __init__(self, change: WeightChange, scale: float, weight: Tensor):
        super().__init__()
        self.scale = scale
        self.register_buffer("up", change.up.to(weight), persistent=False)
        self.register_buffer("down", None if change.down is None else change.down.to(weight), persistent=False)

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            return self.scale * layer._conv_forward(x, self.up, None)
        return self.scale * F.linear(x if self.down is None else F.linear(x, self.down), self.up)


class _Branches(nn.ModuleList):
    """The branches of a layer, and the hook that adds them up."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.hook = layer.register_forward_hook(_add_branches)


def _add_branches(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    for branch in layer.lora:
        output = output + branch(layer, inputs[0])
    return output


def attach_changes(model: nn.Module, changes: Mapping[str, WeightChange], scale: float) -> None:
    """Compute changes beside the weights, which stay as they are, from now on; further ones add to those that are there.

    `changes`: by the names of weights of linear layers and convolutions, which may be quantized.
    """
    for name, change in changes.items():
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        if not hasattr(layer, "lora"):
            layer.lora = _Branches(layer)
        like = layer.scale if isinstance(layer, QuantizedLinear) else layer.weight
        layer.lora.append(_Branch(change, scale, like))


def detach_changes(model: nn.Module) -> None:
    """Take away everything that `attach_changes` has added: the model computes what it did before, bit for bit."""
    for layer in [module for module in model.modules() if isinstance(getattr(module, "lora", None), _Branches)]:
        layer.lora.hook.remove()  # type: ignore[union-attr, operator]
        del layer.lora


@torch.no_grad()
def merge_changes(model: nn.Module, changes: Mapping[str, WeightChange], scale: float) -> None:
    """Add changes to the weights themselves, for good. The sum is made in float32 and rounded to the weight's dtype.

    Raises ValueError, before anything is changed, if a weight is quantized: small changes would be rounded away.
    """
    for name in changes:
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, QuantizedLinear):
            raise ValueError(
                f"an adapter cannot be merged into weights that are {layer.precision}: load it with merge=False, or merge it "
                "into weights in full precision, and quantize those"
            )
    for name, change in changes.items():
        weight = model.get_parameter(name)
        weight.copy_(weight.float() + scale * change.whole().to(weight.device).view_as(weight))
