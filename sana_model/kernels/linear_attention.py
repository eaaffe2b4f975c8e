"""ReLU linear attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_model.kernels import fused

EPS = 1e-15  # as in diffusers (NVlabs: 1e-8). Matters only where every product is 0: the result is then 0 and not NaN


def relu_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """ReLU linear attention of (B, N, heads, head_dim), in the dtype of `value`, computed in float32 (Sana section 2.2).

    O_i = ReLU(Q_i) sum_j ReLU(K_j)^T V_j / ReLU(Q_i) sum_j ReLU(K_j)^T. The sums over j are one (head_dim x head_dim) matrix
    and one vector per head, so the N x N weights are never formed.
    """
    if query.shape[-1] in fused.HEAD_DIMS and fused.serves("attention", query, key, value):
        from sana_model.kernels.triton_attention import fused_linear_attention

        return fused_linear_attention(query, key, value, EPS)
    return plain_linear_attention(query, key, value)


def plain_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`relu_linear_attention` in torch's own operations."""
    dtype = value.dtype
    query = F.relu(query).float().transpose(1, 2)  # (B, heads, N, head_dim)
    key = F.relu(key).float().transpose(1, 2)
    value = value.float().transpose(1, 2)
    key_value = key.transpose(-1, -2) @ value  # (B, heads, head_dim, head_dim)
    key_sum = key.sum(dim=-2).unsqueeze(-1)  # (B, heads, head_dim, 1)
    attended = (query @ key_value) / (query @ key_sum + EPS)
    return attended.transpose(1, 2).to(dtype)


def relu_attention_reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition of `relu_linear_attention`, with the explicit N x N weights. Tests compare the two."""
    weights = torch.einsum("bihd,bjhd->bhij", F.relu(query).float(), F.relu(key).float())
    weights = weights / (weights.sum(dim=-1, keepdim=True) + EPS)
    return torch.einsum("bhij,bjhd->bihd", weights, value.float()).to(value.dtype)
