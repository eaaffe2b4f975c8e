"""The middle of the Mix-FFN: SiLU, depth-wise 3x3 convolution, gate."""

import torch.nn.functional as F
from torch import Tensor

from sana_model.kernels import fused, reuse


def silu_depthwise_gate(expanded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU(gate) * x, where x and gate are the halves of the depth-wise convolution of SiLU(expanded) (Sana section 2.2).

    Args:
        expanded: (B, H, W, 2C). May be overwritten where no gradients are recorded.
        weight, bias: of the 3x3 convolution, (2C, 1, 3, 3) and (2C,).

    Returns (B, H, W, C).
    """
    if fused.serves("mix_ffn", expanded, weight, bias):
        from sana_model.kernels.triton_mix_ffn import fused_silu_depthwise_gate

        return fused_silu_depthwise_gate(expanded, weight, bias)
    return plain_silu_depthwise_gate(expanded, weight, bias)


def plain_silu_depthwise_gate(expanded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`silu_depthwise_gate` in torch's own operations."""
    active = F.silu(expanded, inplace=not reuse.is_recorded(expanded)).permute(0, 3, 1, 2)
    mixed = F.conv2d(active, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1)
    x, gate = mixed.chunk(2, dim=-1)
    return reuse.multiply(F.silu(gate), x)
