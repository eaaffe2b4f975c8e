"""What the pixels of a picture are worth. Imports no torch."""

import numpy as np
from PIL import Image


def to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16*, I and F to L by their range, 0 to 65535 or to 1.0 (Pillow's `convert` clips at 255); others as they are.

    Raises ValueError for values out of that range.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    white = 1.0 if image.mode == "F" else 65535.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # NaN too
        raise ValueError(f"mode {image.mode} with values from {low} to {high}: they must lie in 0 to {white:g}")
    return Image.fromarray((values.astype(np.float32) * np.float32(255 / white)).round().astype(np.uint8))
