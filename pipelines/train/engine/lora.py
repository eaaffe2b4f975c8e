"""LoRA (arXiv 2106.09685): small trained matrices beside frozen weights, saved as an adapter that diffusers can load.

peft adds the adapters to the transformer, which changes names of weights: `qkv.base_layer.weight`, `qkv.lora_A.default.weight`,
`qkv.lora_B.default.weight`. Only this file knows these names.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipelines.train.engine.config import LoraConfig
from sana_model.files.lora import write_lora
from sana_model.nn.transformer import SanaTransformer

TARGETS = (
    "attention.qkv",
    "attention.proj",
    "cross_attention.query",
    "cross_attention.key_value",
    "cross_attention.proj",
    "ffn.expand",
    "ffn.project",
)
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def add_lora(model: SanaTransformer, config: LoraConfig, *, seed: int) -> None:
    """Freeze `model` and add adapters, which change nothing until they are trained. The same `seed` makes the same adapters."""
    import peft

    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(TARGETS), bias="none")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model)


def merge_lora(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Add each adapter to its matrix. Takes the weights of a transformer with adapters, returns those of a plain one."""
    merged = {}
    for name, weight in weights.items():
        if BASE in name and name.endswith(".weight"):
            down, up = (weights[name.replace(BASE, part)] for part in (DOWN, UP))
            weight = weight + config.scale * (up.to(weight) @ down.to(weight))
        if DOWN not in name and UP not in name:
            merged[name.replace(BASE, ".")] = weight
    return merged


def adapters_in(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the weights of a transformer with adapters those of the adapters."""
    return {name: weight for name, weight in weights.items() if DOWN in name or UP in name}


def save_lora(folder: Path, weights: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write the adapters in `weights` to `folder`, for diffusers' `SanaPipeline.load_lora_weights`. They include the scale."""
    ups = {name: up for name, up in weights.items() if UP in name}
    write_lora(
        folder,
        {f"{name.split(UP)[0]}.weight": (weights[name.replace(UP, DOWN)], config.scale * up) for name, up in ups.items()},
    )
