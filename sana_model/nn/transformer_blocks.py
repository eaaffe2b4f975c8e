"""The linear DiT's block: ReLU linear attention, cross-attention to the caption, Mix-FFN, adaLN-single modulation."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_model.kernels.linear import Linear
from sana_model.kernels.linear_attention import relu_linear_attention
from sana_model.kernels.mix_ffn import silu_depthwise_gate
from sana_model.kernels.modulate import modulate
from sana_model.nn.config import SanaConfig


class LinearAttention(nn.Module):
    """ReLU linear self-attention of tokens (B, N, D) (Sana section 2.2, equation 2). Its cost is linear in N."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)
        self.query_norm = nn.RMSNorm(dim, eps=1e-5) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(dim, eps=1e-5) if qk_norm else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)  # each (B, N, D)
        query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)) for x in (query, key, value))
        return self.proj(relu_linear_attention(query, key, value).flatten(2))


class CaptionTokens:
    """The real tokens of a batch of captions, without the padding, so that nothing is computed for padding.

    `packed` (T, D) holds the T real tokens of the batch one after another, `positions` (T,) their places in the padded
    (B * L), and `attention_mask` (B, 1, 1, L) is False at padding; None: no caption is padded.
    """

    def __init__(self, packed: Tensor, positions: Tensor, attention_mask: Tensor | None, batch_size: int, length: int):
        self.packed, self.positions, self.attention_mask = packed, positions, attention_mask
        self.batch_size, self.length = batch_size, length

    def pad(self, packed: Tensor) -> Tensor:
        """Spread packed tokens (T, D) to (B, L, D), with zeros at the padding."""
        if self.attention_mask is None:
            return packed.unflatten(0, (self.batch_size, self.length))
        padded = packed.new_zeros(self.batch_size * self.length, packed.shape[-1])
        return padded.index_copy(0, self.positions, packed).unflatten(0, (self.batch_size, self.length))


@dataclass(frozen=True)
class CaptionMemory:
    """A batch of captions as one block's cross-attention uses it. Independent of the step: computed once for all."""

    key_value: tuple[Tensor, Tensor] | None
    """Keys and values (B - S, heads, L, head_dim) of all captions but the first S; None if there are none."""
    constant: Tensor | None
    """(S, 1, D): what cross-attention returns for the first S captions, which have one token; None if there are none."""

    def drop(self, num_single: int, num_others: int) -> "CaptionMemory":
        """The memory without the first `num_single` captions of one token and the first `num_others` of the rest."""
        keeps_single = self.constant is not None and len(self.constant) > num_single
        constant = self.constant[num_single:] if self.constant is not None and keeps_single else None
        key_value = self.key_value and (self.key_value[0][num_others:], self.key_value[1][num_others:])
        return CaptionMemory(key_value, constant)


class CrossAttention(nn.Module):
    """Softmax attention from image tokens (B, N, D) to the caption. It is neither modulated nor gated."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(dim, dim)
        self.key_value = Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        # As NVlabs trained the published weights; diffusers has 1e-5 here too, as in self-attention.
        self.query_norm = nn.RMSNorm(dim, eps=1e-6) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(dim, eps=1e-6) if qk_norm else nn.Identity()

    def remember(self, caption: CaptionTokens | None, single: CaptionTokens | None = None) -> CaptionMemory:
        """Project captions to keys and values. `single`: the captions of one token, which come first in the batch.

        With a single token the softmax gives it all the weight, whatever the query: every query's result is that token's value.
        """
        key_value = constant = None
        if caption is not None:
            key, value = self.key_value(caption.packed).chunk(2, dim=-1)
            key_value = self._split_heads(caption.pad(self.key_norm(key))), self._split_heads(caption.pad(value))
        if single is not None:
            constant = self.proj(self.key_value(single.packed).chunk(2, dim=-1)[1]).unsqueeze(1)
        return CaptionMemory(key_value, constant)

    def forward(self, tokens: Tensor, caption: CaptionMemory, attention_mask: Tensor | None) -> Tensor:
        if caption.constant is None:
            return self._attend(tokens, caption, attention_mask)
        constant = caption.constant.expand(-1, tokens.shape[1], -1)
        if caption.key_value is None:
            return constant
        return torch.cat([constant, self._attend(tokens[len(constant) :], caption, attention_mask)])

    def _attend(self, tokens: Tensor, caption: CaptionMemory, attention_mask: Tensor | None) -> Tensor:
        assert caption.key_value is not None
        query = self._split_heads(self.query_norm(self.query(tokens)))
        attended = F.scaled_dot_product_attention(query, *caption.key_value, attn_mask=attention_mask)
        return self.proj(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MixFFN(nn.Module):
    """GLUMBConv: 1x1 expand, SiLU, depth-wise 3x3, gate, 1x1 project (Sana section 2.2; DC-AE's EfficientViT block).

    Works on maps (B, H, W, D), where a 1x1 convolution is a matrix product. The 3x3 convolution tells the model where tokens
    are, which is why it needs no positional embedding.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.expand = Linear(dim, 2 * hidden_dim)
        self.depthwise = nn.Conv2d(2 * hidden_dim, 2 * hidden_dim, kernel_size=3, padding=1, groups=2 * hidden_dim)
        self.project = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        assert self.depthwise.bias is not None
        return self.project(silu_depthwise_gate(self.expand(x), self.depthwise.weight, self.depthwise.bias))


class SanaBlock(nn.Module):
    """A block of the linear DiT: linear attention, cross-attention, Mix-FFN. adaLN-single modulates the first and the last."""

    def __init__(self, config: SanaConfig):
        super().__init__()
        self.attention = LinearAttention(config.dim, config.num_heads, config.qk_norm)
        self.cross_attention = CrossAttention(config.dim, config.num_cross_heads, config.cross_qk_norm)
        self.ffn = MixFFN(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.empty(6, config.dim))

    def forward(
        self,
        tokens: Tensor,
        modulation: Tensor,
        caption: CaptionTokens | CaptionMemory,
        attention_mask: Tensor | None,
        size: tuple[int, int],
    ) -> Tensor:
        """Transform tokens (B, H*W, D), given modulation (B, 6, D) and the caption, as tokens or as this block's memory."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (modulation + self.modulation).chunk(6, dim=1)
        tokens = torch.addcmul(tokens, gate_1, self.attention(modulate(tokens, shift_1, scale_1)))
        memory = caption if isinstance(caption, CaptionMemory) else self.cross_attention.remember(caption)
        tokens = tokens + self.cross_attention(tokens, memory, attention_mask)
        mixed = self.ffn(modulate(tokens, shift_2, scale_2).unflatten(1, size)).flatten(1, 2)
        return torch.addcmul(tokens, gate_2, mixed)
