"""Small previews of latents without the decoder: the colour of a latent's pixels as a linear function of its channels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.nn.autoencoder import DCAutoencoder

CELLS = 12
"""Latents along a side of each picture that the colours are fitted to."""
PICTURES = 4
RIDGE = 1e-3
"""Weight that keeps the fit from growing where channels say the same."""


@torch.no_grad()
def fit_colors(autoencoder: DCAutoencoder) -> tuple[Tensor, Tensor]:
    """Fit colours to an autoencoder, which is an encoding of a few smooth random pictures.

    Returns factors (C, 3) and bias (3,), float32 on the CPU: for scaled latents (B, C, h, w),
    `torch.einsum("bchw,cd->bdhw", latents, factors) + bias[:, None, None]` are colours near [-1, 1], a pixel for each latent.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(PICTURES, 3, CELLS // 2, CELLS // 2, generator=generator) * 2 - 1
    side = CELLS * autoencoder.compression
    images = F.interpolate(coarse, (side, side), mode="bicubic").clamp(-1, 1)
    weight = autoencoder.decoder.conv_in.weight
    latents = torch.cat([autoencoder.encode(image[None].to(weight.device, weight.dtype)) for image in images]).float().cpu()
    colors = F.avg_pool2d(images, autoencoder.compression)
    features, targets = (values.permute(0, 2, 3, 1).flatten(0, 2) for values in (latents, colors))
    center, mean = features.mean(0), targets.mean(0)
    covariance = (features - center).T @ (features - center)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    factors = torch.linalg.solve(covariance, (features - center).T @ (targets - mean))
    return factors, mean - center @ factors
