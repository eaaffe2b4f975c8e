"""ComfyUI's tensors as this package takes pictures: IMAGE (B, H, W, 3) and MASK (B, H, W), floats from 0 to 1."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pictures(image: Tensor) -> list[Image.Image]:
    """The pictures of an IMAGE (B, H, W, 3), or 4 with transparency."""
    return [Image.fromarray(values) for values in _to_bytes(image).numpy()]


def to_masks(mask: Tensor, size: tuple[int, int], count: int) -> list[Image.Image]:
    """The masks of a MASK (B, H, W) or (H, W), at a size (width, height): `count` of them, or one.

    Raises ValueError for another number.
    """
    masks = [Image.fromarray(values) for values in _to_bytes(mask if mask.ndim == 3 else mask[None]).numpy()]
    if len(masks) not in (1, count):
        raise ValueError(f"{len(masks)} masks came with {count} pictures: give one for all, or one to each")
    return [one if one.size == size else one.resize(size, Image.Resampling.BILINEAR) for one in masks]


def _to_bytes(values: Tensor) -> Tensor:
    return (values.float().cpu().clamp(0, 1) * 255).round().byte()


def from_pictures(pictures: Sequence[Image.Image]) -> Tensor:
    """An IMAGE of RGB pictures of one size, or a MASK of gray ones."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255
