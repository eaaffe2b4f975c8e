"""DC-AE's blocks (arXiv 2410.10733). Maps are (B, C, H, W) in channels-last memory: a pixel's channels lie side by side."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_model.kernels import reuse
from sana_model.kernels.linear import Linear
from sana_model.kernels.linear_attention import relu_linear_attention
from sana_model.kernels.rms_norm import rms_norm
from sana_model.kernels.upsample_conv import upsample_conv
from sana_model.nn.config import ATTENTION_HEAD_DIM, DecoderVariant, Variant
from sana_model.nn.transformer_blocks import MixFFN

FFN_EXPANSION = 4
# A shortcut moves each 2x2 block of pixels to channels, in the order (channel, row, column), and averages groups of 1, 2 or 4
# neighbouring channels. A group of 2 is the two columns of a row, a group of 4 is the whole block. The table gives, by size of
# the group, the (rows, columns) of the block that are still apart after the mean.
_REST_OF_BLOCK = {1: (2, 2), 2: (2, 1), 4: (1, 1)}


class ChannelRMSNorm(nn.Module):
    """RMSNorm over the channels of a map (B, C, H, W), with a bias. May overwrite its input: nobody else may use that."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, 1e-5).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a residual, with RMSNorm and SiLU, or (decoders of the "in" family) batch norm and ReLU."""

    def __init__(self, channels: int, *, batch_norm: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels) if batch_norm else ChannelRMSNorm(channels)
        self.activation = F.relu if batch_norm else F.silu

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(x)
        hidden = self.conv2(self.activation(hidden, inplace=not reuse.is_recorded(hidden)))
        return reuse.add(self.norm(hidden), x)


class MultiScaleAttention(nn.Module):
    """ReLU linear attention over all pixels of a map (B, C, H, W) (EfficientViT, arXiv 2205.14756).

    With `multiscale`, further heads attend over queries, keys and values pooled by a 5x5 kernel. The 3C channels are in the
    published order, head by head: 32 query, 32 key, 32 value channels, then the next head.
    """

    def __init__(self, channels: int, *, multiscale: bool):
        super().__init__()
        self.qkv = Linear(channels, 3 * channels, bias=False)
        if multiscale:
            width = 3 * channels
            self.pool_depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
            self.pool_pointwise = nn.Conv2d(width, width, 1, groups=width // ATTENTION_HEAD_DIM, bias=False)
        self.multiscale = multiscale
        self.proj = Linear((2 if multiscale else 1) * channels, channels, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        qkv = self.qkv(x.permute(0, 2, 3, 1))  # (B, H, W, 3C)
        if self.multiscale:
            pooled = self.pool_pointwise(self.pool_depthwise(qkv.permute(0, 3, 1, 2)))
            qkv = torch.cat([qkv, pooled.permute(0, 2, 3, 1)], dim=-1)
        heads = qkv.flatten(1, 2).unflatten(-1, (-1, 3 * ATTENTION_HEAD_DIM))  # (B, H*W, heads, 96)
        attended = relu_linear_attention(*heads.chunk(3, dim=-1)).flatten(2)
        return self.norm(self.proj(attended).unflatten(1, size).permute(0, 3, 1, 2))


class EfficientViTBlock(nn.Module):
    """Linear attention, then the Mix-FFN; each ends in a norm and has a residual."""

    def __init__(self, channels: int, *, multiscale: bool):
        super().__init__()
        self.attention = MultiScaleAttention(channels, multiscale=multiscale)
        self.ffn = MixFFN(channels, FFN_EXPANSION * channels)
        self.ffn_norm = ChannelRMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = reuse.add(self.attention(x), x)
        return reuse.add(self.ffn_norm(self.ffn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)), x)


class Downsample(nn.Module):
    """Halve height and width, with the shortcut without parameters of DC-AE section 3.2."""

    def __init__(self, in_channels: int, out_channels: int, variant: Variant, *, shortcut: bool = True):
        super().__init__()
        self.out_channels, self.variant, self.shortcut = out_channels, variant, shortcut
        if variant == "in":
            self.conv = nn.Conv2d(in_channels, out_channels // 4, 3, padding=1)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        down = F.pixel_unshuffle(self.conv(x), 2) if self.variant == "in" else self.conv(x)
        return reuse.add(down, space_to_channel(x, self.out_channels)) if self.shortcut else down


class Upsample(nn.Module):
    """Double height and width, with the shortcut without parameters of DC-AE section 3.2."""

    def __init__(self, in_channels: int, out_channels: int, variant: DecoderVariant, *, shortcut: bool = True):
        super().__init__()
        self.out_channels, self.shuffles, self.shortcut = out_channels, variant != "sana", shortcut
        self.conv = nn.Conv2d(in_channels, out_channels * (4 if self.shuffles else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.shuffles:
            up = F.pixel_shuffle(self.conv(x), 2)
        else:
            up = upsample_conv(x, self.conv.weight, self.conv.bias)
        return add_channel_to_space(up, x) if self.shortcut else up


def space_to_channel(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) to (B, channels, H/2, W/2): move 2x2 pixels to channels and average groups of 4C/channels of them.

    Equals `pixel_unshuffle` and a mean over groups of channels, but takes the mean first, while it is a mean over pixels.
    """
    rows, columns = _REST_OF_BLOCK[4 * x.shape[1] // channels]
    blocks = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, row, W/2, column, C)
    if columns == 1:  # not `mean` or `avg_pool2d`: their gradients take several times as long on CPUs
        blocks = blocks[:, :, :, :, :1].lerp(blocks[:, :, :, :, 1:], 0.5)
    if rows == 1:
        blocks = blocks[:, :, :1].lerp(blocks[:, :, 1:], 0.5)
    return blocks.permute(0, 1, 3, 5, 2, 4).flatten(3).permute(0, 3, 1, 2)


def add_channel_to_space(up: Tensor, x: Tensor) -> Tensor:
    """Add x (B, C, H, W), its channels repeated 4C_out/C times and moved to 2x2 pixels, to `up` (B, C_out, 2H, 2W).

    May overwrite `up`.
    """
    channels = up.shape[1]
    rows, columns = _REST_OF_BLOCK[4 * channels // x.shape[1]]
    moved = x.permute(0, 2, 3, 1).unflatten(-1, (channels, rows, columns)).permute(0, 1, 4, 2, 5, 3)
    blocks = up.permute(0, 2, 3, 1).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))  # (B, H, 2, W, 2, C_out)
    return reuse.add(blocks, moved).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def average_channels(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) to (B, channels, H, W): average groups of neighbouring channels."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def duplicate_channels(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) to (B, channels, H, W): repeat each channel, copies side by side."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def make_encoder_stage(index: int, channels: int, depth: int, variant: Variant) -> list[nn.Module]:
    """Make the blocks of one resolution: residual blocks in the first three stages, EfficientViT blocks in the later ones."""
    if index < 3:
        return [ResBlock(channels, batch_norm=False) for _ in range(depth)]
    return [EfficientViTBlock(channels, multiscale=variant == "sana") for _ in range(depth)]


def make_decoder_stage(index: int, channels: int, depth: int, variant: DecoderVariant) -> list[nn.Module]:
    """Make the blocks of one resolution: as the encoder has them, or residual blocks in all stages ("lite")."""
    if index < 3 or variant == "lite":
        return [ResBlock(channels, batch_norm=variant == "in") for _ in range(depth)]
    return [EfficientViTBlock(channels, multiscale=variant == "sana") for _ in range(depth)]
