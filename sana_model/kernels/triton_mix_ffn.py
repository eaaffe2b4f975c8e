"""SiLU, depth-wise 3x3 convolution and gate of the Mix-FFN in Triton, in one pass over the widest tensor of the model.

The backward pass computes the convolution again, so training keeps one wide tensor where torch keeps five. Sums are in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 8  # of a program of the forward pass: it reads ROWS + 2
BLOCK_W, BLOCK_C, BLOCK_PIXELS = 8, 64, 16
ENOUGH_PROGRAMS = 1024


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_slope(x):
    sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return sigmoid * (1.0 + x * (1.0 - sigmoid))


@triton.jit
def _tap(weight, channels, inside, TAP: tl.constexpr):
    """One of the nine weights of each channel, as a row."""
    return tl.load(weight + channels * 9 + TAP, mask=inside, other=0.0).to(tl.float32)[None]


@triton.jit
def _active(row_start, columns, channels, inside, width, stride, known):
    """SiLU of one column shift of an input row, (BLOCK_W, BLOCK_C), zeros outside the image. `known`: the row is inside."""
    mask = (known & (columns >= 0) & (columns < width))[:, None] & inside[None]
    return _silu(tl.load(row_start + columns[:, None] * stride + channels[None], mask=mask, other=0.0).to(tl.float32))


@triton.jit
def _weigh(left, middle, right, weight, channels, inside, KERNEL_ROW: tl.constexpr):
    """One row of the kernel applied to one row of the image."""
    total = left * _tap(weight, channels, inside, 3 * KERNEL_ROW)
    total += middle * _tap(weight, channels, inside, 3 * KERNEL_ROW + 1)
    return total + right * _tap(weight, channels, inside, 3 * KERNEL_ROW + 2)


@triton.jit
def _forward_kernel(
    expanded, weight, bias, grad, output, height, width, hidden, segments,
    ROWS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Convolve ROWS rows of some columns and channels. `output`: the gated product, or (BACKWARD) the convolution's gradient.

    Each input row adds to three output rows, whose sums go round in two accumulators for each half of the channels.
    """
    place, channels = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    blocks = tl.cdiv(width, BLOCK_W)
    columns = (place % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    first = (place // blocks) % segments * ROWS
    batch = (place // blocks // segments).to(tl.int64)
    last = tl.minimum(first + ROWS, height)
    inside = channels < hidden
    mask = (columns < width)[:, None] & inside[None]
    gates = channels + hidden
    bias_x = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)[None]
    bias_gate = tl.load(bias + gates, mask=inside, other=0.0).to(tl.float32)[None]
    above_x = tl.zeros((BLOCK_W, BLOCK_C), tl.float32) + bias_x
    above_gate = tl.zeros((BLOCK_W, BLOCK_C), tl.float32) + bias_gate
    here_x, here_gate = above_x, above_gate
    for row in range(first - 1, last + 1):
        start = expanded + (batch * height + row) * width * 2 * hidden
        rows = row + columns * 0
        known = (rows >= 0) & (rows < height)
        left = _active(start, columns - 1, channels, inside, width, 2 * hidden, known)
        middle = _active(start, columns, channels, inside, width, 2 * hidden, known)
        right = _active(start, columns + 1, channels, inside, width, 2 * hidden, known)
        x = above_x + _weigh(left, middle, right, weight, channels, inside, 2)
        above_x = here_x + _weigh(left, middle, right, weight, channels, inside, 1)
        here_x = bias_x + _weigh(left, middle, right, weight, channels, inside, 0)
        left = _active(start, columns - 1, gates, inside, width, 2 * hidden, known)
        middle = _active(start, columns, gates, inside, width, 2 * hidden, known)
        right = _active(start, columns + 1, gates, inside, width, 2 * hidden, known)
        gate = above_gate + _weigh(left, middle, right, weight, gates, inside, 2)
        above_gate = here_gate + _weigh(left, middle, right, weight, gates, inside, 1)
        here_gate = bias_gate + _weigh(left, middle, right, weight, gates, inside, 0)
        done = mask & (rows > first)[:, None]
        pixels = (batch * height + row - 1) * width + columns[:, None]
        if BACKWARD:
            upstream = tl.load(grad + pixels * hidden + channels[None], mask=done, other=0.0).to(tl.float32)
            to = output + pixels * 2 * hidden + channels[None]
            tl.store(to, (upstream * _silu(gate)).to(output.dtype.element_ty), mask=done)
            tl.store(to + hidden, (upstream * x * _silu_slope(gate)).to(output.dtype.element_ty), mask=done)
        else:
            tl.store(output + pixels * hidden + channels[None], (x * _silu(gate)).to(output.dtype.element_ty), mask=done)


@triton.jit
def _near(grad, pixels, rows, columns, channels, inside, height, width, stride, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """The convolution's gradient at a neighbour of each pixel, (BLOCK_PIXELS, BLOCK_C), zeros outside the image."""
    known = (rows + DOWN >= 0) & (rows + DOWN < height) & (columns + RIGHT >= 0) & (columns + RIGHT < width)
    place = grad + (pixels + DOWN * width + RIGHT)[:, None] * stride + channels[None]
    return tl.load(place, mask=known[:, None] & inside[None], other=0.0).to(tl.float32)


@triton.jit
def _backward_kernel(
    expanded, weight, grad, grad_expanded, sums, num_pixels, height, width, channels_all, per_program,
    BLOCK_PIXELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of some pixels of `expanded`, and what they add to those of weight and bias, (parts, 10, 2C).

    `grad`: of the convolution's output. A pixel's neighbour below it met it with the kernel's upper row, and so on.
    """
    part, channels = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channels < channels_all
    zeros = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    t0, t1, t2, t3, t4, t5, t6, t7, t8, plain = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    end = tl.minimum((part + 1).to(tl.int64) * per_program, num_pixels)
    for start in range(part.to(tl.int64) * per_program, end, BLOCK_PIXELS):
        pixels = start + tl.arange(0, BLOCK_PIXELS)
        columns, rows = pixels % width, pixels // width % height
        rows = tl.where(pixels < end, rows, -2)  # outside: none of its neighbours counts
        mask = (pixels < end)[:, None] & inside[None]
        place = pixels[:, None] * channels_all + channels[None]
        raw = tl.load(expanded + place, mask=mask, other=0.0).to(tl.float32)
        active = _silu(raw)
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, 1, 1)
        total = near * _tap(weight, channels, inside, 0)
        t0 += near * active
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, 1, 0)
        total += near * _tap(weight, channels, inside, 1)
        t1 += near * active
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, 1, -1)
        total += near * _tap(weight, channels, inside, 2)
        t2 += near * active
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, 0, 1)
        total += near * _tap(weight, channels, inside, 3)
        t3 += near * active
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, 0, 0)
        total += near * _tap(weight, channels, inside, 4)
        t4 += near * active
        plain += near
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, 0, -1)
        total += near * _tap(weight, channels, inside, 5)
        t5 += near * active
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, -1, 1)
        total += near * _tap(weight, channels, inside, 6)
        t6 += near * active
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, -1, 0)
        total += near * _tap(weight, channels, inside, 7)
        t7 += near * active
        near = _near(grad, pixels, rows, columns, channels, inside, height, width, channels_all, -1, -1)
        total += near * _tap(weight, channels, inside, 8)
        t8 += near * active
        tl.store(grad_expanded + place, (total * _silu_slope(raw)).to(grad_expanded.dtype.element_ty), mask=mask)
    to = sums + part * 10 * channels_all + channels
    tl.store(to, tl.sum(t0, axis=0), mask=inside)
    tl.store(to + channels_all, tl.sum(t1, axis=0), mask=inside)
    tl.store(to + 2 * channels_all, tl.sum(t2, axis=0), mask=inside)
    tl.store(to + 3 * channels_all, tl.sum(t3, axis=0), mask=inside)
    tl.store(to + 4 * channels_all, tl.sum(t4, axis=0), mask=inside)
    tl.store(to + 5 * channels_all, tl.sum(t5, axis=0), mask=inside)
    tl.store(to + 6 * channels_all, tl.sum(t6, axis=0), mask=inside)
    tl.store(to + 7 * channels_all, tl.sum(t7, axis=0), mask=inside)
    tl.store(to + 8 * channels_all, tl.sum(t8, axis=0), mask=inside)
    tl.store(to + 9 * channels_all, tl.sum(plain, axis=0), mask=inside)


def fused_silu_depthwise_gate(expanded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`silu_depthwise_gate` of (B, H, W, 2C), (2C, 1, 3, 3) and (2C,) on a CUDA device, with gradients: (B, H, W, C)."""
    return _MixFFN.apply(expanded.contiguous(), weight.contiguous(), bias.contiguous())


class _MixFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, expanded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(expanded, weight, bias)
        output = expanded.new_empty(*expanded.shape[:3], expanded.shape[3] // 2)
        _run_forward(expanded, weight, bias, expanded, output, backward=False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expanded, weight, bias = ctx.saved_tensors
        batch_size, height, width, channels = expanded.shape
        grad_mixed, grad_expanded = torch.empty_like(expanded), torch.empty_like(expanded)
        _run_forward(expanded, weight, bias, grad.contiguous(), grad_mixed, backward=True)
        num_pixels, blocks = batch_size * height * width, triton.cdiv(channels, BLOCK_C)
        per_program = triton.cdiv(num_pixels, max(triton.cdiv(ENOUGH_PROGRAMS, blocks), 1))
        per_program = triton.cdiv(per_program, BLOCK_PIXELS) * BLOCK_PIXELS
        parts = triton.cdiv(num_pixels, per_program)
        sums = torch.empty(parts, 10, channels, dtype=torch.float32, device=expanded.device)
        _backward_kernel[parts, blocks](
            expanded, weight, grad_mixed, grad_expanded, sums, num_pixels, height, width, channels, per_program,
            BLOCK_PIXELS=BLOCK_PIXELS, BLOCK_C=BLOCK_C,
        )  # fmt: skip
        *taps, plain = sums.sum(0).to(weight.dtype)
        return grad_expanded, torch.stack(taps, dim=1).view_as(weight), plain


def _run_forward(expanded: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, output: Tensor, *, backward: bool) -> None:
    batch_size, height, width, channels = expanded.shape
    segments, hidden = triton.cdiv(height, ROWS), channels // 2
    grid = batch_size * segments * triton.cdiv(width, BLOCK_W), triton.cdiv(hidden, BLOCK_C)
    _forward_kernel[grid](
        expanded, weight, bias, grad, output, height, width, hidden, segments,
        ROWS=ROWS, BLOCK_W=BLOCK_W, BLOCK_C=BLOCK_C, BACKWARD=backward,
    )  # fmt: skip
