"""Previews of pictures that are being drawn."""

import logging
from collections.abc import Callable
from io import BytesIO

import torch.nn.functional as F
from torch import Tensor

from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.pictures import decode_pictures

LOG = logging.getLogger("ray.serve")
PREVIEW_SIDE = 512
"""Pixels. Latents of larger pictures are averaged before they are decoded, so that a preview costs little beside a step."""

OnPreview = Callable[[int, int, bytes], None]
"""(place in the batch, step from 1 on, JPEG)."""


class PreviewMaker:
    """An `on_estimate` of `TextToImage`: decodes what pictures will about become, where a preview is wanted.

    A preview that fails costs the batch its other previews, and no picture.

    Args:
        num_steps: of the batch.
        counts: how many previews are wanted of each picture of the batch.
    """

    def __init__(self, autoencoder: DCAutoencoder, num_steps: int, counts: list[int], on_preview: OnPreview):
        self._autoencoder, self._on_preview = autoencoder, on_preview
        self._steps = [preview_steps(num_steps, count) for count in counts]
        self._failed = False

    def __call__(self, index: int, latents: Tensor) -> None:
        if self._failed or len(latents) != len(self._steps):  # a part of the batch, halved for want of memory: whose is unknown
            return
        wanted = [place for place, steps in enumerate(self._steps) if index in steps]
        if not wanted:
            return
        try:
            for place, content in zip(wanted, self._encode(latents[wanted]), strict=True):
                self._on_preview(place, index + 1, content)
        except Exception:  # whatever it was, the pictures themselves may succeed
            self._failed = True
            LOG.exception("a preview failed: this batch is drawn without further ones")

    def _encode(self, latents: Tensor) -> list[bytes]:
        factor = -(-max(latents.shape[-2:]) * self._autoencoder.compression // PREVIEW_SIDE)
        files = []
        if factor > 1:
            latents = F.avg_pool2d(latents, factor, ceil_mode=True)  # a side may be shorter than the factor
        for image in decode_pictures(self._autoencoder, latents):
            buffer = BytesIO()
            image.save(buffer, "JPEG", quality=85)
            files.append(buffer.getvalue())
        return files


def preview_steps(num_steps: int, count: int) -> set[int]:
    """The steps, counted from 0, with a preview, evenly; the last one has none, because its picture follows at once."""
    possible = max(num_steps - 1, 0)
    if count >= possible:
        return set(range(possible))
    return {(2 * number + 1) * possible // (2 * count) for number in range(count)}
