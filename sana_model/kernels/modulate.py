"""LayerNorm with the modulation of adaLN-single."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.kernels import fused

EPS = 1e-6


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm of tokens (B, N, D) without weights, then times 1 + scale, plus shift; both (B, 1, D)."""
    if tokens.shape[-1] <= fused.LARGEST_LAYER_NORM and fused.serves("layer_norm", tokens, shift, scale):
        from sana_model.kernels.triton_modulate import fused_modulate

        return fused_modulate(tokens, shift, scale, EPS)
    return plain_modulate(tokens, shift, scale)


def plain_modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`modulate` in torch's own operations."""
    return torch.addcmul(shift, F.layer_norm(tokens, tokens.shape[-1:], eps=EPS), 1 + scale)
