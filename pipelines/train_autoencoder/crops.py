"""Crops as pure functions of an image's bytes and of a key for chance. Loads no torch: processes that decode start fast."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.tables.chance import uniform
from pipelines.tables.rejects import RowRefused
from pipelines.workers.images import decode, resize_and_crop


@dataclass(frozen=True)
class CropJob:
    """A crop to cut.

    image_bytes: the encoded image. size: side of the crop after resizing, in pixels. least, largest: its side before, as shares
    of the image's shorter side. flip: whether it may be mirrored. key: what chance depends on.
    """

    image_bytes: bytes
    size: int
    least: float
    largest: float
    flip: bool
    key: str


def fits(shorter: int, size: int, *, largest: float, max_upscale: float) -> bool:
    """Whether an image of this shorter side has crops that need not be enlarged by more than `max_upscale`."""
    return shorter * largest * max_upscale >= size


def crop_box(width: int, height: int, job: CropJob) -> tuple[float, float, float]:
    """Left, top and side of the crop in an image of this size."""
    shorter = min(width, height)
    share = job.least + (job.largest - job.least) * uniform(job.key, "side")
    side = shorter * min(share, 1.0)
    return (width - side) * uniform(job.key, "left"), (height - side) * uniform(job.key, "top"), side


def cut_crop(job: CropJob) -> np.ndarray | str:
    """The crop, (size, size, 3) uint8, or why the image cannot be used."""
    try:
        image = decode(job.image_bytes)
    except RowRefused as refused:
        return str(refused)
    left, top, side = crop_box(image.width, image.height, job)
    box = (left, top, left + side, top + side)
    crop = image.resize((job.size, job.size), Image.Resampling.BICUBIC, box=box)
    if job.flip and uniform(job.key, "flip") < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop)


def center_square(image_bytes: bytes, size: int) -> np.ndarray:
    """The image scaled and cut to its center square, (size, size, 3) uint8. Raises RowRefused."""
    return np.asarray(resize_and_crop(decode(image_bytes), size, size))
