"""Nearest-neighbour upsampling by two followed by a 3x3 convolution, without computing on the repeated pixels.

After the repetition, the nine taps of an output pixel fall on only four source pixels. So each of the four output phases (even
or odd row, even or odd column) is a 2x2 convolution of the source with summed taps. This is exact, and takes 16 multiplications
per source pixel in place of 36.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.kernels.reuse import is_recorded


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, H, W), (C_out, C, 3, 3), (C_out,) to (B, C_out, 2H, 2W): equals `upsample_conv_reference` up to rounding.

    The summed kernels are computed in each call, which takes about 1 % of a 512-px decode, so they always fit the weight.
    """
    batch_size, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    phases = (
        F.conv2d(padded[:, :, i // 2 : i // 2 + height + 1, i % 2 : i % 2 + width + 1], kernel, bias)
        for i, kernel in enumerate(_make_phase_kernels(weight))
    )
    if is_recorded(x, weight, bias):
        pixels = [phase.permute(0, 2, 3, 1) for phase in phases]  # the channels of a pixel lie side by side
        blocks = torch.stack(pixels, dim=3).unflatten(3, (2, 2))  # (B, H, W, row, column, C_out)
        return blocks.transpose(2, 3).reshape(batch_size, 2 * height, 2 * width, len(weight)).permute(0, 3, 1, 2)
    shape = (batch_size, len(weight), 2 * height, 2 * width)
    output = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for i, phase in enumerate(phases):
        output[:, :, i // 2 :: 2, i % 2 :: 2] = phase
    return output


def _make_phase_kernels(weight: Tensor) -> list[Tensor]:
    """Sum a 3x3 kernel to 2x2 kernels for the phases (even row, even column), (even, odd), (odd, even), (odd, odd)."""
    top, middle, bottom = weight.permute(0, 2, 3, 1).unbind(1)  # (C_out, 3, C) each, channels last
    kernels = []
    for rows in ((top, middle + bottom), (top + middle, bottom)):
        left, centre, right = torch.stack(rows, dim=1).unbind(2)
        for columns in ((left, centre + right), (left + centre, right)):
            kernels.append(torch.stack(columns, dim=2).permute(0, 3, 1, 2))
    return kernels


def upsample_conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain form of `upsample_conv`: repeat every pixel twice in both directions, then convolve. Tests compare the two."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
