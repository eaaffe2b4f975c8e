"""Linear layers whose weights are 8-bit or 4-bit numbers, and which layers of a model become such layers."""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from sana_model.kernels.linear import linear
from sana_model.kernels.quantized import (
    fp8_linear,
    from_fp8,
    from_int4,
    from_int8,
    to_fp8,
    to_int4,
    to_int8,
    w8a8_linear,
)
from sana_model.memory import Precision

FULL_IN_BLOCKS = ("cross_attention.key_value",)
"""Layers of a block that keep their precision: the projections of a caption to keys and values (Sana, section 4)."""

_QUANTIZE = {"w8a8": to_int8, "int8": to_int8, "int4": to_int4, "fp8": to_fp8}


class QuantizedLinear(nn.Module):
    """A linear layer with a weight of small numbers, and their scales. Made of an `nn.Linear`; for drawing, not for training.

    `weight` and `scale` are buffers: int8 (out, in) and (out, 1) for "w8a8" and "int8"; pairs of 4-bit numbers, uint8, and
    (out, in / 32) for "int4"; float8 seen as uint8 and (out, 1) for "fp8". `scale` and `bias` have the dtype of the model.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, precision: Precision):
        super().__init__()
        self.in_features, self.out_features, self.precision = layer.in_features, layer.out_features, precision
        weight, scale = _QUANTIZE[precision](layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.precision == "w8a8":
            return w8a8_linear(x, self.weight, self.scale, self.bias)
        if self.precision == "fp8":
            return fp8_linear(x, self.weight, self.scale, self.bias)
        return linear(x, self.converted().to(x.dtype), self.bias)

    def converted(self) -> Tensor:
        """The weight as floating-point numbers (out, in), of the dtype of `scale`."""
        if self.precision == "int4":
            return from_int4(self.weight, self.scale, self.in_features)
        return (from_fp8 if self.precision == "fp8" else from_int8)(self.weight, self.scale)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.precision}"


def quantize_blocks(model: nn.Module, precision: Precision) -> None:
    """Quantize the linear layers in the blocks of a transformer or a ControlNet, in place, all but `FULL_IN_BLOCKS`.

    In full precision stay, as in the paper: norms, the linear attention itself (not its projections), and keys and values of
    captions; besides them what lies outside the blocks (embeddings, head) and depthwise convolutions, which hold few weights.

    Raises ValueError if they are quantized already.
    """
    quantize_layers(cast(nn.Module, model.blocks), precision, leave=FULL_IN_BLOCKS)


def quantize_layers(model: nn.Module, precision: Precision, *, leave: tuple[str, ...] = ()) -> None:
    """Quantize every linear layer in `model`, in place, but those whose name ends as one in `leave`.

    Raises ValueError if they are quantized already.
    """
    if (found := precision_of(model)) != "full":
        raise ValueError(f"the weights are {found} already: {precision} is made of weights in full precision")
    if precision == "full":
        return
    for name, layer in list(linear_layers(model, leave)):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, QuantizedLinear(layer, precision))


def linear_layers(model: nn.Module, leave: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers in a model by name, but those whose name ends as one in `leave`."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and not name.endswith(leave))


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized layers of a model by name."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear))


def precision_of(model: nn.Module) -> Precision:
    """The precision of a model's quantized layers; "full" if it has none."""
    return next((layer.precision for _, layer in quantized_layers(model)), "full")


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights and scales of a model, which may be on the device "meta"."""
    return sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
