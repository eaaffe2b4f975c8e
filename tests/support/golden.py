"""Weights and inputs from seeds, and what NVlabs' own code computed from them (`tests/sana_model/golden`).

The values were computed once, in float32 on a CPU, by the code of the repositories and commits in the file's header; none of
that code is here. Whoever computes them again needs the same weights and inputs, which this file makes.
"""

import hashlib
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sana_model.files.checkpoint import export
from sana_model.files.key_maps import efficientvit_names
from sana_model.files.published_configs import positions_for_nvlabs
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import AutoencoderConfig, SanaConfig
from tests.support.peers import nvlabs_shapes

NVLABS_VALUES = Path(__file__).parents[1] / "sana_model" / "golden" / "nvlabs.safetensors"
CONTROLNET_VALUES = NVLABS_VALUES.with_name("controlnet.safetensors")
PLAIN = SanaConfig(dim=1152, depth=2, num_cross_heads=16, ffn_dim=96, in_channels=8, caption_dim=48, base_size=8)
"""Of a published width, so that a file tells all that is to be known."""
GUIDANCE_SCALE = 4.5
FLOW_SHIFT = 3.0


def seeded(name: str, *shape: int) -> Tensor:
    """Standard normal values that depend on the name alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def nvlabs_weights(config: SanaConfig) -> dict[str, Tensor]:
    """A state dict with NVlabs' names, all values far from their defaults: norms, biases and modulations too."""
    state: dict[str, Tensor] = {}
    for name, shape in nvlabs_shapes(config).items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 4
        offset = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        state[name] = seeded(name, *shape) / fan_in**0.5 + offset
    state["y_embedder.y_embedding"] = seeded("y_embedding", *nvlabs_shapes(config)["y_embedder.y_embedding"])
    state["pos_embed"] = positions_for_nvlabs(config, torch.float32)
    return state


@dataclass(frozen=True)
class Inputs:
    """Two samples: latents and noise (2, 8, 4, 6), caption_embeds (2, 12, 48), caption_mask with 12 and 5 tokens."""

    latents: Tensor
    noise: Tensor
    caption_embeds: Tensor
    caption_mask: Tensor


def inputs(config: SanaConfig = PLAIN) -> Inputs:
    shape = (2, config.in_channels, 4, 6)
    caption_mask = torch.arange(12) < torch.tensor([[12], [5]])
    return Inputs(
        seeded("latents", *shape), seeded("noise", *shape), seeded("caption", 2, 12, config.caption_dim), caption_mask
    )


def autoencoder_weights(config: AutoencoderConfig) -> dict[str, Tensor]:
    """A state dict with efficientvit's names, all values far from their defaults."""
    state: dict[str, Tensor] = {}
    for name, shape in efficientvit_shapes(config).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
        elif name.endswith("running_var"):
            state[name] = seeded(name, *shape).abs() + 0.5
        else:
            fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 4
            offset = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
            state[name] = seeded(name, *shape) / fan_in**0.5 + offset
    return state


def efficientvit_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an autoencoder's tensors as we write them for efficientvit."""
    with torch.device("meta"):
        state = DCAutoencoder(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in export(state, efficientvit_names(config)).items()}


def digest(shapes: dict[str, tuple[int, ...]]) -> Tensor:
    """32 bytes that any other name or shape would change."""
    text = "".join(f"{name} {tuple(shape)}\n" for name, shape in sorted(shapes.items()))
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)


def summary(gradients: dict[str, Tensor]) -> Tensor:
    """(tensors, 5): of each gradient, in the order of names, its norm and its first four values."""
    return torch.stack([torch.cat([one.norm()[None], one.flatten()[:4]]) for _, one in sorted(gradients.items())])


def golden(name: str, path: Path = NVLABS_VALUES) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


SPRINT = replace(PLAIN, qk_norm=True, cross_qk_norm=True, guidance_embeds=True)
WITH_POSITIONS = replace(PLAIN, position_scale=1.0)
SANA_1_5 = replace(PLAIN, qk_norm=True, cross_qk_norm=True)

CONTROLLED = replace(PLAIN, depth=4)
CONTROL_BLOCKS = 2


def nvlabs_controlnet_weights(config: SanaConfig) -> dict[str, Tensor]:
    """A state dict of NVlabs' transformer with its ControlNet, whose blocks differ from those that they were copied from."""
    state = nvlabs_weights(config)
    for block in range(CONTROL_BLOCKS):
        prefix = f"blocks.{block}."
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in state.items() if name.startswith(prefix)}
        for name, shape in shapes.items():
            fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 4
            copied = f"controlnet.{block}.copied_block.{name}"
            state[copied] = seeded(copied, *shape) / fan_in**0.5
    for name in ("0.before_proj", *(f"{block}.after_proj" for block in range(CONTROL_BLOCKS))):
        state[f"controlnet.{name}.weight"] = seeded(name, config.dim, config.dim) / config.dim**0.5
        state[f"controlnet.{name}.bias"] = seeded(f"{name}.bias", config.dim) / 2
    return state


def control_latents(config: SanaConfig = CONTROLLED) -> Tensor:
    return seeded("control", 2, config.in_channels, 4, 6)
