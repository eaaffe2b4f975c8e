"""The inputs of the linear DiT: latents to tokens, timestep, caption, and (at 2K and 4K) the positional embedding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_model.kernels.linear import Linear
from sana_model.nn.config import NUM_TRAIN_TIMESTEPS, SanaConfig, TimeInput

TIMESTEP_FREQUENCIES = 256
GUIDANCE_FACTOR = 0.1
"""The guidance scale is multiplied by it before it is embedded."""


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) to tokens (B, H/p * W/p, D)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents).flatten(2).transpose(1, 2)


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Cosines then sines of `timestep` (B,) at `dim`/2 frequencies from 1 to 1/10000 (DDPM; DiT's order): (B, dim), fp32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def to_time_input(timestep: Tensor, time_input: TimeInput) -> Tensor:
    """Convert a timestep to what the weights were trained to see, in its shape, in at least float32. The model itself does so.

    Where 1000 sigma is a whole number (only in grids of shift 1 whose number of steps divides by 3 or 37), diffusers may be
    one lower than "whole": its float64 product lies just below that number.
    """
    timestep = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
    if time_input == "whole":
        return timestep.trunc()
    return timestep / NUM_TRAIN_TIMESTEPS if time_input == "unit" else timestep


class TimestepEmbedding(nn.Module):
    """Timestep (B,) to its embedding (B, D) and the shared adaLN-single modulation (B, 6, D) (PixArt-alpha, section 2.3).

    With `guidance`, the embedding of the guidance scale (B,) is added to that of the timestep (Sana-Sprint, arXiv 2503.09641).
    """

    def __init__(self, dim: int, time_input: TimeInput, *, guidance: bool):
        super().__init__()
        self.time_input = time_input
        self.linear_1 = Linear(TIMESTEP_FREQUENCIES, dim)
        self.linear_2 = Linear(dim, dim)
        self.modulation = Linear(dim, 6 * dim)
        if guidance:
            self.guidance_1 = Linear(TIMESTEP_FREQUENCIES, dim)
            self.guidance_2 = Linear(dim, dim)

    def forward(self, timestep: Tensor, guidance_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        time = to_time_input(timestep, self.time_input)
        frequencies = sinusoidal_embedding(time, TIMESTEP_FREQUENCIES).to(self.linear_1.weight.dtype)
        embedding = self.linear_2(F.silu(self.linear_1(frequencies)))
        if guidance_scale is not None:
            frequencies = sinusoidal_embedding(guidance_scale * GUIDANCE_FACTOR, TIMESTEP_FREQUENCIES).to(frequencies.dtype)
            embedding = embedding + self.guidance_2(F.silu(self.guidance_1(frequencies)))
        return embedding, self.modulation(F.silu(embedding)).unflatten(-1, (6, -1))


class CaptionProjection(nn.Module):
    """Project captions (..., caption_dim) to (..., D): an MLP, then an RMSNorm, as in the published code.

    The norm's weight starts at 0.01, because the embeddings of a decoder-only LLM are orders of magnitude larger than T5's and
    would make training diverge (Sana section 2.3). Without `norm` there is none.
    """

    def __init__(self, caption_dim: int, dim: int, *, norm: bool):
        super().__init__()
        self.linear_1 = Linear(caption_dim, dim)
        self.linear_2 = Linear(dim, dim)
        self.norm = nn.RMSNorm(dim, eps=1e-5) if norm else nn.Identity()

    def forward(self, caption_embeds: Tensor) -> Tensor:
        return self.norm(self.linear_2(F.gelu(self.linear_1(caption_embeds), approximate="tanh")))


def sincos_position_embedding(dim: int, height: int, width: int, base_size: int, interpolation_scale: float) -> Tensor:
    """2-D sine-cosine positional embedding of a grid of tokens: (height * width, dim), fp32, on the CPU.

    The first half of `dim` encodes the column, the second the row. Positions are stretched so that a grid of any size spans
    `base_size / interpolation_scale` (PixArt-Sigma, section 2.4; Sana uses scale 1.0 at 2048 px and 2.0 at 4096 px).
    """
    rows, columns = (_sincos_positions(dim // 2, size, base_size, interpolation_scale) for size in (height, width))
    by_column, by_row = columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1)


def add_positions(tokens: Tensor, size: tuple[int, int], config: SanaConfig) -> Tensor:
    """Add the positional embedding to tokens (B, H*W, D) of a grid of `size`, if the model has one."""
    if config.position_scale is None:
        return tokens
    positions = sincos_position_embedding(config.dim, *size, config.base_size, config.position_scale)
    return tokens + positions.to(tokens.device, tokens.dtype)


def _sincos_positions(dim: int, size: int, base_size: int, interpolation_scale: float) -> Tensor:
    """Embedding of one coordinate: (size, dim). Computed on the CPU, since some devices have no float64."""
    positions = torch.arange(size, dtype=torch.float32, device="cpu") / (size / base_size) / interpolation_scale
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim // 2))
    angles = positions.double()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
