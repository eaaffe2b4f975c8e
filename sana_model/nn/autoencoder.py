"""DC-AE, the deep-compression autoencoder (arXiv 2410.10733). `encode` and `decode` apply the scale of the latents."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_model.nn.autoencoder_blocks import (
    ChannelRMSNorm,
    Downsample,
    Upsample,
    average_channels,
    duplicate_channels,
    make_decoder_stage,
    make_encoder_stage,
)
from sana_model.nn.config import AUTOENCODER_PRESETS, AutoencoderConfig


class Encoder(nn.Module):
    """Image (B, 3, H, W) to unscaled latents (B, C, H/f, W/f)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, depths, variant = config.widths, config.encoder_depths, config.variant
        self.latent_channels, self.residual = config.latent_channels, config.residual
        if depths[0] > 0:
            self.conv_in: nn.Module = nn.Conv2d(3, widths[0], 3, padding=1)
        else:
            self.conv_in = Downsample(3, widths[1], variant, shortcut=False)
        self.stages = nn.ModuleList()
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = make_encoder_stage(index, width, depth, variant)
            if depth > 0 and index + 1 < len(widths):
                blocks.append(Downsample(width, widths[index + 1], variant, shortcut=config.residual))
            self.stages.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_in(image.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            x = stage(x)
        latents = self.conv_out(x)
        return latents + average_channels(x, self.latent_channels) if self.residual else latents


class Decoder(nn.Module):
    """Unscaled latents (B, C, h, w) to image (B, 3, h*f, w*f)."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, depths, variant = config.widths, config.decoder_depths, config.decoder
        self.residual = config.residual
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList()
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = make_decoder_stage(index, width, depth, variant)
            if depth > 0 and index + 1 < len(widths):
                blocks.insert(0, Upsample(widths[index + 1], width, variant, shortcut=config.residual))
            self.stages.append(nn.Sequential(*blocks))
        last_width = widths[0] if depths[0] > 0 else widths[1]
        self.norm_out = ChannelRMSNorm(last_width)
        self.activation_out = F.silu if variant == "lite" else F.relu
        if depths[0] > 0:
            self.conv_out: nn.Module = nn.Conv2d(last_width, 3, 3, padding=1)
        else:
            self.conv_out = Upsample(last_width, 3, variant, shortcut=False)

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(latents)
        if self.residual:
            x = x + duplicate_channels(latents, self.conv_in.out_channels)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.conv_out(self.activation_out(self.norm_out(x)))


class DCAutoencoder(nn.Module):
    """Encodes images in [-1, 1] to scaled latents and decodes them; a latent's side is 32, 64 or 128 pixels.

    Without gradients, feature maps are overwritten after use: a forward hook that keeps one must clone it.
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "DCAutoencoder":
        """Make a freshly initialised model of a published shape, e.g. `from_preset("dc-ae-f32c32-sana-1.1")`.

        Raises ValueError for an unknown name, TypeError for an unknown override.
        """
        if name not in AUTOENCODER_PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(AUTOENCODER_PRESETS)}")
        return cls(replace(AUTOENCODER_PRESETS[name], **overrides))

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype | None = None, scaling_factor: float | None = None
    ) -> "DCAutoencoder":
        """Load our own, a diffusers or an efficientvit (mit-han-lab) checkpoint: see `files.models.load_autoencoder`."""
        from sana_model.files.models import load_autoencoder

        return load_autoencoder(path, dtype=dtype, scaling_factor=scaling_factor)

    def save_pretrained(self, path: str | Path, *, layout: str = "sana") -> None:
        """Write the weights in the layout "sana", "diffusers" or "nvlabs": see `files.models.save_autoencoder`."""
        from sana_model.files.models import save_autoencoder

        save_autoencoder(self, path, layout=layout)

    @property
    def compression(self) -> int:
        """Pixels along one side of a latent: 32 for f32."""
        return self.config.compression

    def encode(self, image: Tensor, *, tile_size: int | None = None, tile_overlap: int | None = None) -> Tensor:
        """Encode an image (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H/f, W/f).

        Args:
            tile_size: side of the tiles in pixels; tiles bound the memory that a large image takes. None: in one piece.
            tile_overlap: pixels over which neighbouring tiles are blended; None: an eighth of the tile.

        Raises ValueError if the shape is another, or if H, W, tile or overlap is not a multiple of the factor f.
        """
        factor = self.compression
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image has shape {tuple(image.shape)}: encode takes (B, 3, H, W) in [-1, 1]")
        if image.shape[2] % factor or image.shape[3] % factor or 0 in image.shape[2:]:
            raise ValueError(
                f"image is {image.shape[2]}x{image.shape[3]}: height and width must be multiples of {factor}; resize or crop it"
            )
        tile, overlap = self._check_tile(tile_size, tile_overlap)
        if tile is None:
            return self.encoder(image) * self.config.scaling_factor
        channels = self.config.latent_channels
        latents = _tiled(self.encoder, image, tile, overlap, in_scale=factor, out_scale=1, out_channels=channels)
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor, *, tile_size: int | None = None, tile_overlap: int | None = None) -> Tensor:
        """Decode scaled latents (B, C, h, w) to an image (B, 3, h*f, w*f), roughly in [-1, 1] and not clamped.

        Tiles are those of `encode`, in pixels. Raises ValueError if the latents have another number of channels, or if tile or
        overlap is not a multiple of the factor f.
        """
        channels = self.config.latent_channels
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}: this autoencoder takes (B, {channels}, h, w)")
        tile, overlap = self._check_tile(tile_size, tile_overlap)
        latents = latents / self.config.scaling_factor
        if tile is None:
            return self.decoder(latents)
        return _tiled(self.decoder, latents, tile, overlap, in_scale=1, out_scale=self.compression, out_channels=3)

    def _check_tile(self, tile_size: int | None, tile_overlap: int | None) -> tuple[int | None, int]:
        """Check tile and overlap, given in pixels, and return them in latents; (None, 0) without tiles."""
        if tile_size is None:
            return None, 0
        factor = self.compression
        overlap = max(tile_size // 8 // factor, 1) * factor if tile_overlap is None else tile_overlap
        if tile_size % factor or overlap % factor or not 0 <= overlap <= tile_size // 2 or tile_size <= 0:
            raise ValueError(
                f"tile_size={tile_size} and tile_overlap={overlap} must be multiples of {factor} pixels, "
                "and the overlap at most half the tile"
            )
        return tile_size // factor, overlap // factor


def _tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int,
    overlap: int,
    *,
    in_scale: int,
    out_scale: int,
    out_channels: int,
) -> Tensor:
    """Apply `function` to overlapping tiles of `x` (B, C, H, W), and blend the results linearly where they overlap.

    `tile` and `overlap` are in latents; along a side a latent is `in_scale` elements of the input and `out_scale` of the
    output. Only the output grows with `x`: each tile is weighted, added into it, and dropped.
    """
    height, width = x.shape[-2] // in_scale, x.shape[-1] // in_scale
    output = x.new_zeros(x.shape[0], out_channels, height * out_scale, width * out_scale)
    rows, columns = (_tile_spans(size, tile, overlap, out_scale, x) for size in (height, width))
    for top, bottom, row_weights in rows:
        for left, right, column_weights in columns:
            result = function(x[:, :, top * in_scale : bottom * in_scale, left * in_scale : right * in_scale])
            region = output[:, :, top * out_scale : bottom * out_scale, left * out_scale : right * out_scale]
            region.addcmul_(result, row_weights[:, None] * column_weights)
    return output


def _tile_spans(size: int, tile: int, overlap: int, out_scale: int, like: Tensor) -> list[tuple[int, int, Tensor]]:
    """Spread tiles evenly along one side: (start, end, weights of its outputs) of each.

    All tiles have full size, so that none sees too little of the image. A tile's weight falls linearly over `overlap` towards
    its neighbours; at each pixel the weights of all tiles sum to one.
    """
    tile = min(tile, size)
    count = 1 if size == tile else math.ceil((size - overlap) / (tile - overlap))
    starts = [i * (size - tile) // max(count - 1, 1) for i in range(count)]
    steps = overlap * out_scale
    ramp = (torch.arange(steps, device=like.device) + 0.5) / max(steps, 1)
    weights = torch.zeros(count, size * out_scale, device=like.device)
    for row, start in zip(weights, starts, strict=True):
        inside = row[start * out_scale : (start + tile) * out_scale]
        inside.fill_(1.0)
        if start > 0 and steps:
            inside[:steps] = ramp
        if start + tile < size and steps:
            inside[-steps:] = ramp.flip(0)
    weights = (weights / weights.sum(dim=0)).to(like.dtype)
    return [
        (start, start + tile, row[start * out_scale : (start + tile) * out_scale])
        for start, row in zip(starts, weights, strict=True)
    ]
