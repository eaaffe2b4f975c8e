"""HED: a network that finds the outlines of a picture (arXiv 1504.06375), in the form of `ControlNetHED.pth`.

Those weights (lllyasviel/Annotators on the Hugging Face hub, Apache licence) made the control pictures of the published Sana
ControlNets.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)


class HedNetwork(nn.Module):
    """Five stages of 3x3 convolutions, each at half the resolution of the one before; each gives a map of outlines.

    The parameters have the names of the published file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))  # the mean color, of 0 to 255
        for index, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            self.add_module(f"block{index + 1}", HedStage(WIDTHS[max(index - 1, 0)] if index else 3, width, depth))

    def forward(self, pixels: Tensor) -> Tensor:
        """Find outlines of pictures (B, 3, H, W) of values from 0 to 255: (B, 1, H, W), from 0 (none) to 1."""
        size, x, maps = pixels.shape[2:], pixels - self.norm, []
        for index in range(len(WIDTHS)):
            x = self.get_submodule(f"block{index + 1}")(F.max_pool2d(x, 2) if index else x)
            projected = self.get_submodule(f"block{index + 1}.projection")(x)
            maps.append(F.interpolate(projected, size=size, mode="bilinear"))
        return torch.sigmoid(torch.stack(maps).mean(0))


class HedStage(nn.Module):
    """Convolutions of one resolution, and the projection of their result to a map."""

    def __init__(self, in_channels: int, width: int, depth: int):
        super().__init__()
        channels = (in_channels, *[width] * depth)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x
