"""The PatchGAN discriminator, which is needed to train an autoencoder and never afterwards."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

MAX_WIDENING = 8
GROUPS = 32
SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image (B, 3, H, W): logits (B, 1, h, w), above 0 for what it holds for real.

    The shape is that of pix2pix (arXiv 1611.07004), and VQGAN's: `layers` convolutions of 4x4 with stride 2, which double the
    channels from `width` on up to eight times, and two without a stride. With 3 layers each logit sees 70x70 pixels. Group
    norms stand in place of batch norms, so that a sample's logits depend neither on its batch nor on the number of workers.
    """

    def __init__(self, *, layers: int = 3, width: int = 64):
        super().__init__()
        widths = [width * min(2**index, MAX_WIDENING) for index in range(layers + 1)]
        self.conv_in = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2 if index + 1 < layers else 1, padding=1, bias=False)
            for index, (before, after) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(_groups(after), after) for after in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(image), SLOPE)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), SLOPE)
        return self.conv_out(x)


def _groups(channels: int) -> int:
    return next(groups for groups in range(min(GROUPS, channels), 0, -1) if channels % groups == 0)
