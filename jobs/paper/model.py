"""Parameters, multiply-accumulates and attention: what follows from the shape of a model, and needs no weights."""

import statistics
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.benchmark.timing import measure_seconds, readable
from jobs.common.text_table import format_table
from jobs.paper.config import AttentionConfig, MacsConfig, ParametersConfig
from pipelines.train.meter import step_flops
from sana_model.kernels.linear_attention import relu_linear_attention
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AUTOENCODER_PRESETS, LINEAR_HEAD_DIM, PRESETS, SanaConfig
from sana_model.nn.transformer import SanaTransformer

PIXELS_PER_TOKEN = 32  # along a side, of f32c32 with patches of 1
PARAMETERS = {
    "sana-0.6b": 591_747_872,
    "sana-1.6b": 1_604_462_752,
    "sana-4.8b": 4_721_825_952,
    "dc-ae-f32c32-in-1.0": 323_356_460,
    "dc-ae-f32c32-sana-1.0": 312_250_275,
    "dc-ae-f32c32-sana-1.1": 312_250_275,
    "dc-ae-f64c128-in-1.0": 676_896_140,
    "dc-ae-f128c512-in-1.0": 1_120_682_252,
}
"""Weights of the published configurations."""
MACS = {
    "sana-0.6b": {512: 0.158, 1024: 0.561, 2048: 2.17, 4096: 8.62},
    "sana-1.6b": {512: 0.418, 1024: 1.48, 2048: 5.74, 4096: 22.8},
}
"""10^12 multiply-accumulates of one forward of the published configurations with 300 caption tokens, by image side."""


def known(name: str, presets: dict[str, SanaConfig]) -> SanaConfig:
    """The shape of that name. Raises ValueError if there is none."""
    if name not in presets:
        raise ValueError(f"there is no model {name!r}: choose from {', '.join(presets)}")
    return presets[name]


def count_parameters(name: str) -> int:
    """Weights of a transformer or an autoencoder by the name of its shape. Raises ValueError for an unknown one."""
    with torch.device("meta"):
        is_autoencoder = name in AUTOENCODER_PRESETS and name not in PRESETS
        model = DCAutoencoder.from_preset(name) if is_autoencoder else SanaTransformer(known(name, PRESETS))
    return sum(weight.numel() for weight in model.parameters())


def print_parameters(config: ParametersConfig) -> None:
    """Print the number of weights of each model, and that of the published configuration."""
    rows = []
    for name in [*config.models, *config.autoencoders]:
        ours, published = count_parameters(name), PARAMETERS.get(name)
        rows.append([name, f"{ours:,}", f"{published:,}" if published else "-", f"{ours - published:,}" if published else "-"])
    print(format_table(["weights", "ours", "published", "difference"], rows))
    print(
        "published: counted from the published configurations. The paper itself gives 0.6, 1.6 and 4.8 billion for the\n"
        "transformers, in their names."
    )


def count_macs(name: str, size: int, caption_tokens: int) -> float:
    """Multiply-accumulates of one forward of a picture of `size` x `size` pixels.

    A step of training is counted as three forwards in FLOPs, two for each multiply-accumulate: `step_flops`.
    """
    tokens = (size // PIXELS_PER_TOKEN) ** 2
    return step_flops(known(name, PRESETS), batch_size=1, image_tokens=tokens, caption_tokens=caption_tokens) / 6


def print_macs(config: MacsConfig) -> None:
    """Print the multiply-accumulates of one forward by image side, ours and those of the published configuration."""
    rows = []
    for name in config.models:
        for size in config.sizes:
            ours = count_macs(name, size, config.caption_tokens) / 1e12
            published = MACS.get(name, {}).get(size) if config.caption_tokens == 300 else None
            cells = [f"{published:.3g}", f"{ours / published:.3f}"] if published else ["-", "-"]
            rows.append([name, f"{size} px", f"{ours:.3g}", *cells])
    print(format_table(["10^12 MACs of one forward", "side", "ours", "published", "ratio"], rows))
    print(
        "published: counted from the published configurations with 300 caption tokens. With guidance a step takes two\n"
        "forwards; real captions are shorter, and only their real tokens are computed here (--caption_tokens). Table 8 of the\n"
        "paper, which compares designs of the block: python -m jobs.paper blocks --num_steps 0."
    )


def attention_inputs(config: AttentionConfig, size: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values, each (1, tokens, heads, dim / heads)."""
    shape = (1, (size // PIXELS_PER_TOKEN) ** 2, heads, known(config.model, PRESETS).dim // heads)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(config.device, getattr(torch, config.dtype)) for _ in range(3)]
    return made[0], made[1], made[2]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of (B, N, heads, head_dim) by torch's fused kernel."""
    return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


def print_attention(config: AttentionConfig) -> None:
    """Print what the core of self-attention costs by image side: operations, and seconds on this machine."""
    shape, device = known(config.model, PRESETS), torch.device(config.device)
    rows = []
    for size in config.sizes:
        tokens = (size // PIXELS_PER_TOKEN) ** 2
        seconds = []
        for attend, heads in ((relu_linear_attention, shape.num_heads), (softmax_attention, shape.num_cross_heads)):
            inputs = attention_inputs(config, size, heads)
            with torch.inference_mode():
                attend(*inputs)
                times = [measure_seconds(partial(attend, *inputs), device) for _ in range(config.repeats)]
            seconds.append(statistics.median(times))
        softmax_macs, linear_macs = 2 * tokens**2 * shape.dim, 2 * (LINEAR_HEAD_DIM + 1) * tokens * shape.dim
        cells = [f"{linear_macs / 1e9:.3g}", f"{softmax_macs / 1e9:.3g}", f"{softmax_macs / linear_macs:.1f}x"]
        rows.append([f"{size} px", f"{tokens:,}", *cells, *map(readable, seconds), f"{seconds[1] / seconds[0]:.1f}x"])
    columns = ["side", "tokens", "linear, 10^9 MACs", "softmax", "ratio", "linear, time", "softmax", "ratio"]
    print(f"{config.model}: {shape.dim} wide, heads: {shape.num_heads} linear, {shape.num_cross_heads} softmax; {config.dtype}")
    print(format_table(columns, rows))
    print(
        "published ratio of operations: tokens / 33 (7.8, 31, 124, 496 at 512, 1024, 2048, 4096 px). Not comparable:\n"
        "published latencies, which are of whole models on an A100. Projections, which cost both the same, are left out."
    )
