"""A linear layer that multiplies with oneDNN on CPUs.

torch multiplies float32 matrices on CPUs with MKL, which on AMD processors is slower than oneDNN (145 against 190 GFLOP/s on
two cores of an EPYC). torch contains oneDNN too, and this layer calls it. In bfloat16 torch calls oneDNN itself; there this
layer saves the separate pass that adds the bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sana_model.kernels.reuse import is_recorded

SMALLEST_WEIGHT = 1 << 14  # elements; with a smaller weight the call costs more than the product


class Linear(nn.Linear):
    """`nn.Linear`, with the same weights and the same result up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of (..., in), (out, in), (out,) -> (..., out); on CPUs by oneDNN where that is faster and allowed."""
    if torch.compiler.is_compiling() or not _served(x, weight):  # torch.compile chooses its own kernels
        return F.linear(x, weight, bias)
    if is_recorded(x, weight, bias):
        return _OneDnnLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _served(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN can and should compute this product."""
    return bool(
        x.device.type == "cpu"
        and weight.numel() >= SMALLEST_WEIGHT
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and (x.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """`_product` with its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)  # a frozen weight (LoRA) needs no x
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = _product(grad, weight.t(), None) if needs_x else None
        grad_weight = _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if needs_weight else None
        return grad_x, grad_weight, rows.sum(dim=0) if needs_bias else None
