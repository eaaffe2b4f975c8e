"""How a picture becomes Inception's input of 299x299, by the protocol's name: the figures of two protocols do not compare."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.evaluate.inception_v3 import SIDE

Resize = Callable[[Image.Image, int], Tensor]
"""An RGB picture and the protocol's `size` -> (3, 299, 299), values from -1 to 1."""


def scale_and_crop(image: Image.Image, size: int) -> Image.Image:
    """torchvision's Resize(size) and CenterCrop(size) of a PIL image: bilinear, the shorter side to `size`."""
    width, height = image.size
    if min(width, height) != size:
        scaled = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def resize_pytorch_fid(image: Image.Image, size: int) -> Tensor:
    """As published by Sana: Resize(size), CenterCrop(size), ToTensor; then as pytorch-fid does, bilinear without antialias."""
    values = _to_tensor(scale_and_crop(image, size)) / 255
    return 2 * F.interpolate(values[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1


def resize_clean_fid(image: Image.Image, size: int) -> Tensor:
    """As clean-fid does: bicubic with antialias, each channel in float, clipped to 0 to 255 and not rounded; no center crop.

    `size` plays no part.
    """
    channels = [
        np.asarray(Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for channel in np.asarray(image, np.float32).transpose(2, 0, 1)
    ]
    return (torch.from_numpy(np.stack(channels)).clamp(0, 255) - 128) / 128


def resize_torch_fidelity(image: Image.Image, size: int) -> Tensor:
    """As torch-fidelity and TensorFlow 1 do: bilinear, from corner to corner, without antialias. `size` plays no part."""
    values = _to_tensor(image)
    for axis in (1, 2):
        length = values.shape[axis]
        places = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(length / SIDE, dtype=torch.float32)
        low = places.long()
        share = (places - low).view(-1, 1) if axis == 1 else places - low
        first = values.index_select(axis, low)
        values = first + (values.index_select(axis, (low + 1).clamp_max(length - 1)) - first) * share
    return (values - 128) / 128


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W), values from 0 to 255 in float32."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32))


RESIZE: Mapping[str, Resize] = {
    "pytorch-fid": resize_pytorch_fid,
    "clean-fid": resize_clean_fid,
    "torch-fidelity": resize_torch_fidelity,
}
