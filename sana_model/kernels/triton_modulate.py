"""LayerNorm with modulation in Triton: each token is read once and written once. Means are in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ENOUGH_PROGRAMS = 512  # about four for each multiprocessor of a large card


@triton.jit
def _normalise(x, inside, dim, eps):
    """Normalised values in float32, and one over the standard deviation."""
    mean = tl.sum(x, axis=0) / dim
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / dim + eps)
    return centred * rstd, rstd


@triton.jit
def _forward_kernel(tokens, shift, scale, output, num_tokens, dim, eps, shift_b, scale_b, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    batch, channels = row // num_tokens, tl.arange(0, BLOCK)
    inside = channels < dim
    x = tl.load(tokens + row * dim + channels, mask=inside, other=0.0).to(tl.float32)
    normal, _ = _normalise(x, inside, dim, eps)
    times = 1.0 + tl.load(scale + batch * scale_b + channels, mask=inside, other=0.0).to(tl.float32)
    plus = tl.load(shift + batch * shift_b + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * dim + channels, (normal * times + plus).to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    tokens, scale, grad, grad_tokens, grad_shift, grad_scale, num_tokens, dim, per_program, eps, scale_b, BLOCK: tl.constexpr
):
    """Gradients of a part of one sample's tokens, and what they add to those of shift and scale."""
    batch, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = tl.arange(0, BLOCK)
    inside = channels < dim
    times = 1.0 + tl.load(scale + batch * scale_b + channels, mask=inside, other=0.0).to(tl.float32)
    to_shift, to_scale = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for token in range(part * per_program, tl.minimum((part + 1) * per_program, num_tokens)):
        place = (batch * num_tokens + token) * dim + channels
        x = tl.load(tokens + place, mask=inside, other=0.0).to(tl.float32)
        upstream = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normal, rstd = _normalise(x, inside, dim, eps)
        to_shift += upstream
        to_scale += upstream * normal
        inner = upstream * times
        gradient = rstd * (inner - tl.sum(inner, axis=0) / dim - normal * (tl.sum(inner * normal, axis=0) / dim))
        tl.store(grad_tokens + place, gradient.to(grad_tokens.dtype.element_ty), mask=inside)
    place = (batch * tl.num_programs(1) + part) * dim + channels
    tl.store(grad_shift + place, to_shift, mask=inside)
    tl.store(grad_scale + place, to_scale, mask=inside)


def fused_modulate(tokens: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`modulate` of tokens (B, N, D) by shift and scale (B or 1, 1, D) on a CUDA device, with gradients."""
    shift, scale = (x.expand(len(tokens), 1, -1) for x in (shift, scale))
    return _Modulate.apply(tokens.contiguous(), *(x if x.stride(-1) == 1 else x.contiguous() for x in (shift, scale)), eps)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        batch_size, num_tokens, dim = tokens.shape
        output = torch.empty_like(tokens)
        _forward_kernel[(batch_size * num_tokens,)](
            tokens, shift, scale, output, num_tokens, dim, eps, shift.stride(0), scale.stride(0),
            BLOCK=triton.next_power_of_2(dim), num_warps=_num_warps(dim),
        )  # fmt: skip
        ctx.eps = eps
        ctx.save_for_backward(tokens, scale)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        tokens, scale = ctx.saved_tensors
        batch_size, num_tokens, dim = tokens.shape
        per_program = triton.cdiv(num_tokens, min(triton.cdiv(ENOUGH_PROGRAMS, batch_size), num_tokens))
        parts = triton.cdiv(num_tokens, per_program)
        grad_tokens = torch.empty_like(tokens)
        sums = torch.empty(2, batch_size, parts, dim, dtype=torch.float32, device=tokens.device)
        _backward_kernel[batch_size, parts](
            tokens, scale, grad.contiguous(), grad_tokens, *sums, num_tokens, dim, per_program, ctx.eps, scale.stride(0),
            BLOCK=triton.next_power_of_2(dim), num_warps=_num_warps(dim),
        )  # fmt: skip
        grad_shift, grad_scale = sums.sum(2, keepdim=True).to(scale.dtype)
        return grad_tokens, grad_shift, grad_scale, None


def _num_warps(dim: int) -> int:
    """Warps of a program, for about 16 values a thread."""
    return min(max(triton.next_power_of_2(dim) // 512, 1), 16)
