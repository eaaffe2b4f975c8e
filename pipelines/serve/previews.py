"""Estimates of pictures that are being drawn."""

from collections.abc import Callable
from io import BytesIO

import torch.nn.functional as F
from torch import Tensor

from pipelines.draw.config import DrawConfig
from sana_model.pictures import decode_pictures
from sana_model.pipeline import TextToImage
from sana_model.solver import SOLVERS, cut_sigmas

PREVIEW_SIDE = 512
"""Pixels. Latents of larger pictures are averaged before they are decoded."""

OnPreview = Callable[[int, int, int, bytes], None]
"""(picture's place in the batch, step from 1 on, number of steps, JPEG)."""


class PreviewMaker:
    """Called after each step of a batch (`on_step`): decodes what the pictures that want it will about become.

    Between two steps the latents moved from x_a at sigma_a to x_b at sigma_b, so about x_b - sigma_b (x_b - x_a) / (sigma_b -
    sigma_a) is where they end. That needs two steps: the first one has no preview, nor has the last, whose picture follows.
    Sana-Sprint adds new noise in each step: it has none.

    Args:
        config: with solver and number of steps.
        counts: for each picture of the batch, how many previews are wanted.
        strength: of pictures to start from; None: drawn from noise.
    """

    def __init__(
        self,
        pipeline: TextToImage,
        config: DrawConfig,
        strength: float | None,
        counts: list[int],
        on_preview: OnPreview,
    ):
        self._autoencoder, self._on_preview = pipeline.autoencoder, on_preview
        self._sigmas: Tensor | None = None
        if config.solver in SOLVERS and config.num_steps and strength != 0:
            sigmas = SOLVERS[config.solver][1](config.num_steps, pipeline.flow_shift)
            self._sigmas = sigmas if strength is None else cut_sigmas(sigmas, strength)
        self._num_steps = 0 if self._sigmas is None else len(self._sigmas) - 1
        self._steps = [preview_steps(self._num_steps, count) for count in counts]
        self._before: Tensor | None = None

    def __call__(self, index: int, latents: Tensor) -> None:
        wanted = [place for place, steps in enumerate(self._steps) if index in steps]
        if wanted and self._sigmas is not None and self._before is not None:
            sigma, sigma_before = float(self._sigmas[index + 1]), float(self._sigmas[index])
            velocity = (latents[wanted] - self._before[wanted]) / (sigma - sigma_before)
            for place, content in zip(wanted, self._encode(latents[wanted] - sigma * velocity), strict=True):
                self._on_preview(place, index + 1, self._num_steps, content)
        self._before = latents

    def _encode(self, latents: Tensor) -> list[bytes]:
        factor = -(-max(latents.shape[-2:]) * self._autoencoder.compression // PREVIEW_SIDE)
        files = []
        for image in decode_pictures(self._autoencoder, F.avg_pool2d(latents, factor) if factor > 1 else latents):
            buffer = BytesIO()
            image.save(buffer, "JPEG", quality=85)
            files.append(buffer.getvalue())
        return files


def preview_steps(num_steps: int, count: int) -> set[int]:
    """The steps, counted from 0, after which `count` previews are made, evenly; never after the first or the last one."""
    possible = range(1, num_steps - 1)
    if count >= len(possible):
        return set(possible)
    return {possible[(2 * number + 1) * len(possible) // (2 * count)] for number in range(count)}
