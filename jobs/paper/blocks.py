"""The designs of a block that the paper compares, and what they cost."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.benchmark.timing import count_flops
from jobs.common.text_table import format_table
from sana_model.kernels.linear import Linear
from sana_model.nn.config import PRESETS, SanaConfig
from sana_model.nn.transformer import SanaTransformer
from sana_model.nn.transformer_blocks import CaptionTokens


class SoftmaxAttention(nn.Module):
    """The self-attention of DiT on tokens (B, N, D), in place of `LinearAttention`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in self.qkv(tokens).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class PlainFFN(nn.Module):
    """The feed-forward of DiT, four times as wide as a token, in place of `MixFFN`: no token sees another."""

    def __init__(self, dim: int):
        super().__init__()
        self.expand = Linear(dim, 4 * dim)
        self.project = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x), approximate="tanh"))


@dataclass(frozen=True)
class Design:
    """A design of the block, by what is not Sana's in it."""

    softmax: bool = False
    plain_ffn: bool = False

    def make(self, config: SanaConfig) -> SanaTransformer:
        """A freshly initialised transformer of such blocks."""
        model = SanaTransformer(config)
        for block in model.blocks:
            if self.softmax:
                block.attention = SoftmaxAttention(config.dim, config.num_cross_heads)
            if self.plain_ffn:
                block.ffn = PlainFFN(config.dim)
        model.reset_parameters()
        return model


DESIGNS = {
    "softmax attention, FFN": Design(softmax=True, plain_ffn=True),
    "linear attention, FFN": Design(plain_ffn=True),
    "linear attention, Mix-FFN": Design(),
}
CAPTION_TOKENS = 300
F8C4P2 = replace(PRESETS["sana-0.6b"], in_channels=4, patch_size=2)
COSTS: dict[tuple[str, str], tuple[float, str]] = {
    ("softmax attention, FFN", "F8C4P2"): (6.48, "0.49"),
    ("linear attention, FFN", "F8C4P2"): (4.30, "0.52"),
    ("linear attention, Mix-FFN", "F8C4P2"): (4.19, "0.46, fused 0.53"),
    ("linear attention, Mix-FFN", "F32C32P1"): (1.08, "1.75, fused 2.06"),
}
"""Table 8 of the paper, at 1024 px: 10^12 MACs, and pictures a second on an A100, by design and autoencoder with patches."""


def count_design_macs(design: Design, config: SanaConfig, latents: tuple[int, ...], caption_tokens: int) -> float:
    """Multiply-accumulates of one forward of latents (B, C, H, W), counted while it runs on tensors without values."""
    with torch.device("meta"), torch.no_grad():
        model, batch_size = design.make(config).eval(), latents[0]
        embeds = torch.zeros(batch_size * caption_tokens, config.caption_dim)

        def forward() -> Tensor:
            captions = CaptionTokens(model.caption_proj(embeds), torch.arange(len(embeds)), None, batch_size, caption_tokens)
            return model(torch.zeros(latents), torch.zeros(batch_size), captions)

        return count_flops(forward) / 2


def print_costs() -> None:
    """Print what each design of Table 8 costs at 1024 px, beside the published numbers."""
    rows = []
    for (name, autoencoder), (published, throughput) in COSTS.items():
        config, latents = (F8C4P2, (2, 4, 128, 128)) if autoencoder == "F8C4P2" else (PRESETS["sana-0.6b"], (2, 32, 32, 32))
        ours = count_design_macs(DESIGNS[name], config, latents, CAPTION_TOKENS) / 1e12
        batch_size, _, height, width = latents
        tokens = height * width // config.patch_size**2
        alike = ours - 2 * batch_size * config.depth * config.dim * tokens * CAPTION_TOKENS / 1e12
        rows.append(
            [name, autoencoder, f"{ours:.3g}", f"{alike:.3g}", f"{published:.2f}", f"{alike / published:.3f}", throughput]
        )
    columns = ["block of Sana-0.6B", "autoencoder", "10^12 MACs", "as published", "published", "ratio", "published: pictures/s"]
    print(format_table(columns, rows))
    print(
        f"at 1024 px, {CAPTION_TOKENS} caption tokens, both forwards of a guided step. As published: without the products of\n"
        "cross-attention's queries with keys, and of its weights with values. Table 8 calls its numbers those of a single\n"
        "forward, but they fit two. Not measured: its throughput and latency on an A100, and fused kernels."
    )
