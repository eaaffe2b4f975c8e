"""Tensor names in published weights. Only this file knows them.

An entry of a map translates a dotted piece of our tensor names (left) to theirs (right). `{q,k,v}`: they have several tensors
where we have their concatenation along the first dimension. `@1x1`: theirs is a 1x1 convolution (out, in, 1, 1), ours the same
matrix (out, in).
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sana_model.nn.config import AutoencoderConfig, SanaConfig


@dataclass(frozen=True)
class KeyMap:
    """How another layout names our tensors. An empty map names them as we do."""

    pieces: dict[str, str] = field(default_factory=dict)
    """A dotted piece of our names -> theirs."""
    patterns: tuple[tuple[str, str], ...] = ()
    """Then, in this order: (regular expression, replacement) for what depends on where in a name a piece stands."""


TRANSFORMER_NVLABS = KeyMap(
    {
        "patch_embed.proj": "x_embedder.proj",
        "time_embed.linear_1": "t_embedder.mlp.0",
        "time_embed.linear_2": "t_embedder.mlp.2",
        "time_embed.modulation": "t_block.1",
        "time_embed.guidance_1": "cfg_embedder.mlp.0",
        "time_embed.guidance_2": "cfg_embedder.mlp.2",
        "caption_proj.linear_1": "y_embedder.y_proj.fc1",
        "caption_proj.linear_2": "y_embedder.y_proj.fc2",
        "caption_proj.norm": "attention_y_norm",
        "modulation": "scale_shift_table",
        "attention.qkv": "attn.qkv",
        "attention.proj": "attn.proj",
        "attention.query_norm": "attn.q_norm",
        "attention.key_norm": "attn.k_norm",
        "cross_attention.query": "cross_attn.q_linear",
        "cross_attention.key_value": "cross_attn.kv_linear",
        "cross_attention.proj": "cross_attn.proj",
        "cross_attention.query_norm": "cross_attn.q_norm",
        "cross_attention.key_norm": "cross_attn.k_norm",
        "ffn.expand": "mlp.inverted_conv.conv@1x1",
        "ffn.depthwise": "mlp.depth_conv.conv",
        "ffn.project": "mlp.point_conv.conv@1x1",
        "final_modulation": "final_layer.scale_shift_table",
        "head": "final_layer.linear",
    }
)

TRANSFORMER_DIFFUSERS = KeyMap(
    {
        "time_embed.linear_1": "time_embed.emb.timestep_embedder.linear_1",
        "time_embed.linear_2": "time_embed.emb.timestep_embedder.linear_2",
        "time_embed.modulation": "time_embed.linear",
        "caption_proj.linear_1": "caption_projection.linear_1",
        "caption_proj.linear_2": "caption_projection.linear_2",
        "caption_proj.norm": "caption_norm",
        "blocks": "transformer_blocks",
        "modulation": "scale_shift_table",
        "attention.qkv": "attn1.to_{q,k,v}",
        "attention.proj": "attn1.to_out.0",
        "attention.query_norm": "attn1.norm_q",
        "attention.key_norm": "attn1.norm_k",
        "cross_attention.query": "attn2.to_q",
        "cross_attention.key_value": "attn2.to_{k,v}",
        "cross_attention.proj": "attn2.to_out.0",
        "cross_attention.query_norm": "attn2.norm_q",
        "cross_attention.key_norm": "attn2.norm_k",
        "ffn.expand": "ff.conv_inverted@1x1",
        "ffn.depthwise": "ff.conv_depth",
        "ffn.project": "ff.conv_point@1x1",
        "final_modulation": "scale_shift_table",
        "head": "proj_out",
    }
)

# The same for Sana-Sprint, whose time embedding is another class there.
TRANSFORMER_DIFFUSERS_SPRINT = KeyMap(
    {
        **TRANSFORMER_DIFFUSERS.pieces,
        "time_embed.linear_1": "time_embed.timestep_embedder.linear_1",
        "time_embed.linear_2": "time_embed.timestep_embedder.linear_2",
        "time_embed.guidance_1": "time_embed.guidance_embedder.linear_1",
        "time_embed.guidance_2": "time_embed.guidance_embedder.linear_2",
    }
)

AUTOENCODER_DIFFUSERS = KeyMap(
    {
        "encoder.stages": "encoder.down_blocks",
        "decoder.stages": "decoder.up_blocks",
        "attention.qkv": "attn.to_{q,k,v}",
        "attention.pool_depthwise": "attn.to_qkv_multiscale.0.proj_in",
        "attention.pool_pointwise": "attn.to_qkv_multiscale.0.proj_out",
        "attention.proj": "attn.to_out",
        "attention.norm": "attn.norm_out",
        "ffn.expand": "conv_out.conv_inverted@1x1",
        "ffn.depthwise": "conv_out.conv_depth",
        "ffn.project": "conv_out.conv_point@1x1",
        "ffn_norm": "conv_out.norm",
    }
)

# efficientvit numbers the blocks of a stage one level deeper than we do.
_OP_LIST = (r"\.stages\.(\d+)\.", r".stages.\1.op_list.")

# Names in efficientvit (mit-han-lab), the code of the published DC-AEs.
AUTOENCODER_NVLABS = KeyMap(
    {
        "encoder.conv_in": "encoder.project_in.conv",
        "encoder.conv_out": "encoder.project_out.main.op_list.0.conv",
        "decoder.conv_in": "decoder.project_in.main.conv",
        "decoder.norm_out": "decoder.project_out.op_list.0",
        "decoder.conv_out": "decoder.project_out.op_list.2.conv",
        "conv1": "main.conv1.conv",
        "conv2": "main.conv2.conv",
        "norm": "main.conv2.norm",
        "conv": "main.conv.conv",
        "attention.qkv": "context_module.main.qkv.conv@1x1",
        "attention.pool_depthwise": "context_module.main.aggreg.0.0",
        "attention.pool_pointwise": "context_module.main.aggreg.0.1",
        "attention.proj": "context_module.main.proj.conv@1x1",
        "attention.norm": "context_module.main.proj.norm",
        "ffn.expand": "local_module.main.inverted_conv.conv@1x1",
        "ffn.depthwise": "local_module.main.depth_conv.conv",
        "ffn.project": "local_module.main.point_conv.conv@1x1",
        "ffn_norm": "local_module.main.point_conv.norm",
        "encoder.conv_in.conv": "encoder.project_in.conv.conv",
        "decoder.conv_out.conv": "decoder.project_out.op_list.2.conv.conv",
    },
    (_OP_LIST,),
)

# The same for encoders that resample by a strided convolution, which efficientvit wraps once less than other convolutions.
AUTOENCODER_NVLABS_STRIDED = KeyMap(AUTOENCODER_NVLABS.pieces, ((r"^(encoder\.stages\..*main\.conv)\.conv", r"\1"), _OP_LIST))

CONTROLNET_PREFIX = "controlnet."  # of NVlabs' names, which stand in one file with those of the transformer

CONTROLNET_NVLABS = KeyMap(
    TRANSFORMER_NVLABS.pieces | {"control_proj": "controlnet.0.before_proj"},
    (
        (r"^blocks\.(\d+)\.", r"controlnet.\1.copied_block."),
        (r"^outputs\.(\d+)\.", r"controlnet.\1.after_proj."),
    ),
)

CONTROLNET_DIFFUSERS = KeyMap(TRANSFORMER_DIFFUSERS.pieces | {"control_proj": "input_block", "outputs": "controlnet_blocks"})

NVLABS_POSITIONS = "pos_embed"  # a buffer in a transformer's `.pth` that we compute from the config

# What a transformer's `.pth` holds besides its weights, by the name that a model keeps it under: the null caption, and a head
# that only the training of Sana-Sprint uses.
KEPT_NVLABS = {
    "null_caption_embeds": "y_embedder.y_embedding",
    "logvar_weight": "logvar_linear.weight",
    "logvar_bias": "logvar_linear.bias",
}


def diffusers_names(config: SanaConfig) -> KeyMap:
    """The names that diffusers has for the tensors of such a transformer."""
    return TRANSFORMER_DIFFUSERS_SPRINT if config.guidance_embeds else TRANSFORMER_DIFFUSERS


def diffusers_names_in(state: dict[str, Tensor]) -> KeyMap:
    """The names that diffusers has for the tensors of a transformer, found in its tensors."""
    sprints = any(name.startswith("time_embed.guidance_embedder.") for name in state)
    return TRANSFORMER_DIFFUSERS_SPRINT if sprints else TRANSFORMER_DIFFUSERS


def efficientvit_names(config: AutoencoderConfig) -> KeyMap:
    """The names that efficientvit has for the tensors of such an autoencoder."""
    return AUTOENCODER_NVLABS_STRIDED if config.variant == "sana" else AUTOENCODER_NVLABS


class Foreign(NamedTuple):
    """How another layout stores one of our tensors."""

    names: list[str]
    """Names of its parts, one or several."""
    is_1x1: bool
    """Whether it is stored as a 1x1 convolution."""


def translate(key: str, key_map: KeyMap) -> Foreign:
    """Translate the name of our tensor `key`. Names that the map does not mention stay as they are."""
    pieces = "|".join(re.escape(piece) for piece in sorted(key_map.pieces, key=len, reverse=True))
    name = re.sub(rf"(?:^|(?<=\.))(?:{pieces})(?=\.|$)", lambda match: key_map.pieces[match.group()], key)
    for pattern, replacement in key_map.patterns:
        name = re.sub(pattern, replacement, name)
    is_1x1 = "@1x1" in name and key.endswith(".weight")
    name = name.replace("@1x1", "")
    match = re.search(r"\{(.*)\}", name)
    if match is None:
        return Foreign([name], is_1x1)
    return Foreign([name.replace(match.group(), part) for part in match.group(1).split(",")], is_1x1)


def to_ours(foreign: Foreign, state: dict[str, Tensor]) -> Tensor:
    """Build our tensor from theirs, which must have the shape that `their_shape` gives."""
    tensors = [state[name] for name in foreign.names]
    if foreign.is_1x1:
        tensors = [tensor.flatten(1) for tensor in tensors]
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def their_shape(foreign: Foreign, our_shape: torch.Size) -> tuple[int, ...]:
    """The shape that each of their tensors has, given the shape of ours."""
    if len(foreign.names) > 1:
        our_shape = torch.Size((our_shape[0] // len(foreign.names), *our_shape[1:]))
    return (*our_shape, 1, 1) if foreign.is_1x1 else tuple(our_shape)


def from_ours(foreign: Foreign, tensor: Tensor) -> dict[str, Tensor]:
    """Build their tensors, by name, from ours."""
    if foreign.is_1x1:
        tensor = tensor[:, :, None, None]
    parts = tensor.chunk(len(foreign.names)) if len(foreign.names) > 1 else [tensor]
    return dict(zip(foreign.names, parts, strict=True))
