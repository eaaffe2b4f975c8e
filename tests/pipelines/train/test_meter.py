"""How much a step computes, against what torch counts."""

import pytest
import torch
from torch import Tensor

from jobs.benchmark.timing import count_flops
from pipelines.train.engine.config import LoraConfig
from pipelines.train.engine.lora import add_lora
from pipelines.train.meter import step_flops
from sana_model.nn.transformer import SanaTransformer


def forward(model: SanaTransformer) -> Tensor:
    """Of 2 samples of 256 image tokens and 7 caption tokens."""
    latents, embeds = torch.randn(2, model.config.in_channels, 16, 16), torch.randn(2, 7, model.config.caption_dim)
    out: Tensor = model(latents, torch.tensor([100.0, 500.0]), embeds, torch.ones(2, 7, dtype=torch.bool))
    return out


def test_three_times_the_forward_pass_or_two_for_frozen_weights() -> None:
    """The backward pass of depth-wise convolutions is counted by torch as if they were dense: adapters do without it."""
    model = SanaTransformer.from_preset("tiny")
    config = model.config
    sizes = {"batch_size": 2, "image_tokens": 256 // config.patch_size**2, "caption_tokens": 7}
    assert step_flops(config, **sizes) == pytest.approx(3 * count_flops(lambda: forward(model)), rel=0.1)
    add_lora(model, LoraConfig(rank=4), seed=0)
    counted = count_flops(lambda: forward(model).sum().backward())
    assert step_flops(config, **sizes, adapters=True) == pytest.approx(counted, rel=0.1)
