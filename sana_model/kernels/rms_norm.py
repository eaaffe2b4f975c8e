"""RMSNorm over the last dimension, with weight and bias.

torch's own RMSNorm is not fused on CPUs and reads memory five times; the vector norm is one quick pass. With gradients, a chain
of torch's operations makes three new tensors in the forward pass and some ten in the backward pass, all of them larger than any
cache, and keeps two for the backward pass. `_RMSNorm` goes over the rows in chunks that fit into a cache, and keeps its input
alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sana_model.kernels import reuse

MOST_CHUNKS = 16
SMALLEST_CHUNK = 1 << 18
"""Elements of a chunk on a CPU. On a GPU, where each chunk is some launches of kernels, they are 64 times as many."""


def rms_norm(fresh: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """RMSNorm of (..., C) over C, with weight and bias (C,); means in float32. May overwrite `fresh` without gradients."""
    if (
        reuse.is_recorded(fresh, weight, bias)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    ):
        return _RMSNorm.apply(fresh, weight, bias, eps)
    return plain_rms_norm(fresh, weight, bias, eps)


def plain_rms_norm(fresh: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`rms_norm` in torch's own operations. Tests compare the gradients of the two."""
    normed = reuse.multiply(fresh, _scale(fresh, eps)).to(weight.dtype)
    return reuse.add(reuse.multiply(normed, weight), bias)


def _scale(x: Tensor, eps: float) -> Tensor:
    """The factor of each row, (..., 1) in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(norm.square() / x.shape[-1] + eps)


class _RMSNorm(torch.autograd.Function):
    """`plain_rms_norm` with its gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        scale = _scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        normed = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        for out, rows, factor in _chunks(normed, x, scale):
            torch.mul(rows, factor, out=out).mul_(weight).add_(bias)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        wide = weight.float()
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight, grad_bias = torch.zeros_like(wide), torch.zeros_like(wide)
        for out, rows, factor, back in _chunks(grad_x, x, scale, grad):
            rows, back = rows.float(), back.float()
            product = (back * rows).mul_(factor)
            grad_weight += product.sum(0)
            grad_bias += back.sum(0)
            # of x_i * factor(x) * weight_i: through x_i, and through the factor, whose gradient is -factor^3 x / C
            through_factor = (product @ wide)[:, None] * factor.square()
            out.copy_((back * wide).mul_(factor).addcmul_(rows, through_factor, value=-1 / x.shape[-1]))
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None


def _chunks(*maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Chunks of rows of maps (..., C), which have the same number of rows, each (N, C)."""
    first = maps[0]
    smallest = SMALLEST_CHUNK if first.device.type == "cpu" else 64 * SMALLEST_CHUNK
    size = max(1, -(-first.numel() // MOST_CHUNKS), smallest) // first.shape[-1]
    return zip(*(one.reshape(-1, one.shape[-1]).split(max(1, size)) for one in maps), strict=True)
