"""Read our configuration from a published checkpoint (its tensors and config.json), and make the config.json for diffusers."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_model.files.checkpoint import OtherModelError, config_from_json
from sana_model.files.key_maps import (
    NVLABS_POSITIONS,
    TRANSFORMER_DIFFUSERS,
    TRANSFORMER_NVLABS,
    KeyMap,
    translate,
)
from sana_model.files.kinds import GUIDANCE_EMBEDDERS
from sana_model.nn.config import LINEAR_HEAD_DIM, NullCaption, SanaConfig, TimeInput
from sana_model.nn.embeddings import GUIDANCE_FACTOR, sincos_position_embedding
from sana_model.zoo.published import PUBLISHED, find_published

DIFFUSERS_VERSION = "0.42.1"  # the version whose layout we write
PUBLISHED_CROSS_HEADS = {1152: 16, 2240: 20}  # by width: tensors do not show the number of cross-attention heads


UNIT_SCALE = 0.001
"""diffusers' `timestep_scale` of weights whose time input is "unit"."""


def transformer_config_from_diffusers(settings: dict[str, Any], state: dict[str, Tensor], source: Path) -> SanaConfig:
    """Configuration from diffusers' config.json (`settings`) and tensors. Raises ValueError for an unsupported variant.

    The inputs are what diffusers' pipelines give to the weights, unless an earlier save of ours wrote there what they were
    trained to see.
    """
    guided, guidance_factor = bool(settings.get("guidance_embeds")), settings.get("guidance_embeds_scale", GUIDANCE_FACTOR)
    if guided and guidance_factor != GUIDANCE_FACTOR:
        raise ValueError(
            f"{source}: guidance_embeds_scale={guidance_factor} is not supported, Sana-Sprint's is {GUIDANCE_FACTOR}"
        )
    scale = settings.get("timestep_scale", 1.0)
    if scale not in (1.0, UNIT_SCALE):
        raise ValueError(f"{source}: timestep_scale={scale} is not supported: published are 1.0 and {UNIT_SCALE}")
    names = ("attention_head_dim", "num_cross_attention_heads", "sample_size", "patch_size")
    for name in names:
        if type(settings.get(name)) is not int or settings[name] < 1:
            raise ValueError(f"{source}: {name}={settings.get(name)!r} in its configuration must be a whole number from 1")
    if settings["attention_head_dim"] != LINEAR_HEAD_DIM:
        raise ValueError(f"{source}: attention_head_dim={settings['attention_head_dim']}, Sana's is {LINEAR_HEAD_DIM}")
    shape = shape_from_weights(state, TRANSFORMER_DIFFUSERS, source)
    if settings["patch_size"] != shape["patch_size"]:
        raise ValueError(
            f"{source}: its configuration says patch_size={settings['patch_size']}, and its weights are of "
            f"{shape['patch_size']}: the two are of different models"
        )
    return SanaConfig(
        **shape,
        num_cross_heads=settings["num_cross_attention_heads"],
        position_scale=settings.get("interpolation_scale"),
        base_size=settings["sample_size"] // settings["patch_size"],
        guidance_embeds=guided,
        time_input=settings.get("_time_input", "unit" if guided or scale == UNIT_SCALE else "whole"),
        null_caption=settings.get("_null_caption", "own_mask"),
    )


def transformer_config_from_nvlabs(
    state: dict[str, Tensor], told: dict[str, Any], source: Path, overrides: dict[str, Any]
) -> SanaConfig:
    """Configuration of a file with NVlabs' names.

    Args:
        state: its tensors.
        told: the configuration that an earlier save of ours put into the file; {} if there is none.
        overrides: fields that are given by hand, which need not be known.

    Raises ValueError if neither tells `num_cross_heads` (which is known for published widths), or `time_input` where tensors do
    not show it.
    """
    if told:
        return config_from_json(SanaConfig, told, source)
    return config_from_tensors(state, TRANSFORMER_NVLABS, source, overrides, null_caption="caption_mask")


def config_from_tensors(
    state: dict[str, Tensor], key_map: KeyMap, source: Path, overrides: dict[str, Any], *, null_caption: NullCaption
) -> SanaConfig:
    """Configuration of weights without any, by their shapes and, for a published model, by the name of its file.

    Raises ValueError that asks for what neither shows and `overrides` does not give.
    """
    shape = shape_from_weights(state, key_map, source)
    guided = any(part in name for name in state for part in GUIDANCE_EMBEDDERS)
    known = find_published(source)
    published = None if known is None else known.config
    if published is not None and (published.qk_norm, published.guidance_embeds) != (shape["qk_norm"], guided):
        published = None  # the name is another model's
    time_input: TimeInput = "unit" if guided else "whole"
    if published is not None:
        time_input = published.time_input
    elif shape["qk_norm"] and not guided and "time_input" not in overrides:
        raise ValueError(
            f"{source} may hold Sana 1.5 or a teacher of Sana-Sprint, whose tensors look the same: pass time_input='whole' "
            "for Sana 1.5, time_input='unit' for the teacher"
        )
    return SanaConfig(
        **shape,
        **_positions(state, shape, published, source, overrides),
        num_cross_heads=cross_heads(shape["dim"], overrides.get("num_cross_heads"), source),
        guidance_embeds=guided,
        time_input=time_input,
        null_caption=null_caption,
    )


def _positions(
    state: dict[str, Tensor], shape: dict[str, Any], published: SanaConfig | None, source: Path, overrides: dict[str, Any]
) -> dict[str, Any]:
    """`base_size` and `position_scale` by the file's `pos_embed`, or as the published model of its name has them.

    Where neither tells them, published shapes of which none has positions are taken to have none, with a warning. Raises
    ValueError for other shapes, unless `overrides` has `position_scale`.
    """
    if NVLABS_POSITIONS in state:
        return positions_from_nvlabs(state[NVLABS_POSITIONS], source)
    if published is not None:
        return {"base_size": published.base_size, "position_scale": published.position_scale}
    if "position_scale" in overrides:
        return {}
    same = [
        model.config
        for model in PUBLISHED
        if model.config is not None and all(getattr(model.config, name) == shape[name] for name in ("dim", "qk_norm"))
    ]
    without = f"{source} does not tell whether its model has a positional embedding"
    if not same or any(config.position_scale is not None for config in same):
        raise ValueError(
            f"{without}: it holds no pos_embed. Pass position_scale=None if it has none, as at 512 and 1024 px, or "
            "position_scale=1.0, base_size=64 (2048 px) or position_scale=2.0, base_size=128 (4096 px); "
            "jobs.convert takes --position_scale, 0 for none"
        )
    warnings.warn(
        f"{without} (it holds no pos_embed), nor for which size it was made: taken to have none and 1024 px, as the published "
        "ones of its shape; position_scale= and base_size= say otherwise",
        stacklevel=2,
    )
    return {}


def cross_heads(dim: int, given: int | None, source: Path) -> int:
    """The number of cross-attention heads: the given one, or that of the published model of this width.

    Raises ValueError if it is neither given nor known.
    """
    heads = PUBLISHED_CROSS_HEADS.get(dim) if given is None else given
    if heads is None:
        raise ValueError(
            f"{source} has width {dim}, which is not a published one ({PUBLISHED_CROSS_HEADS}): "
            "weights do not show the number of cross-attention heads, pass num_cross_heads="
        )
    return heads


def shape_from_weights(state: dict[str, Tensor], key_map: KeyMap, source: Path) -> dict[str, Any]:
    """The fields of `SanaConfig` that the shapes and names of tensors show.

    Raises OtherModelError if they are of another model, ValueError for a bad shape.
    """

    def their_name(key: str) -> str:
        return translate(key, key_map).names[0]

    dimensions = {"patch_embed.proj.weight": 4, "blocks.0.ffn.project.weight": 4, "caption_proj.linear_1.weight": 2}
    for key, ndim in dimensions.items():
        name = their_name(key)
        if name not in state:
            raise OtherModelError(f"{source} is no checkpoint of a linear DiT: it has no {name}")
        if state[name].ndim != ndim:
            raise ValueError(f"{source}: misshapen {name}: {tuple(state[name].shape)}, expected {ndim} dimensions")
    patch_embed, ffn_project, caption = (state[their_name(key)].shape for key in dimensions)
    depth = 0
    while their_name(f"blocks.{depth}.modulation") in state:
        depth += 1
    return {
        "dim": patch_embed[0],
        "in_channels": patch_embed[1],
        "patch_size": patch_embed[2],
        "ffn_dim": ffn_project[1],
        "caption_dim": caption[1],
        "depth": depth,
        "qk_norm": their_name("blocks.0.attention.query_norm.weight") in state,
        "cross_qk_norm": their_name("blocks.0.cross_attention.query_norm.weight") in state,
        "caption_norm": their_name("caption_proj.norm.weight") in state,
    }


def positions_from_nvlabs(pos_embed: Tensor, source: Path) -> dict[str, Any]:
    """`base_size` and `position_scale` from NVlabs' `pos_embed` (1, base_size^2, D).

    It is all zeros if the model has no positional embedding. Else the scale is read from the first value of the second column:
    its frequency is 1, so it is sin(1 / interpolation scale).

    Raises ValueError for a tensor that is no such embedding.
    """
    count = pos_embed.shape[1] if pos_embed.ndim == 3 and len(pos_embed) == 1 else 0
    base_size = math.isqrt(count)
    if count and base_size**2 == count and not pos_embed.any():
        return {"base_size": base_size}
    first = float(pos_embed[0, 1, 0]) if count > 1 else 0.0
    if base_size**2 != count or not 0 < first <= 1:
        raise ValueError(
            f"{source}: pos_embed {tuple(pos_embed.shape)} is no sine-cosine embedding of a square picture, "
            "(1, base_size^2, width): the file is damaged, or of another model"
        )
    return {"base_size": base_size, "position_scale": round(1 / math.asin(first), 2)}


def positions_for_nvlabs(config: SanaConfig, dtype: torch.dtype) -> Tensor:
    """Make NVlabs' `pos_embed` (1, base_size^2, D): zeros if the model has no positional embedding."""
    if config.position_scale is None:
        return torch.zeros(1, config.base_size**2, config.dim, dtype=dtype)
    size = config.base_size
    positions = sincos_position_embedding(config.dim, size, size, size, config.position_scale)
    return positions[None].to(dtype)


def diffusers_transformer_config(config: SanaConfig) -> dict[str, Any]:
    """Make the config.json of a `SanaTransformer2DModel`.

    diffusers gives all weights whole timesteps, or sigma itself, and the null caption's own mask. What ours were trained to see
    is written beside that, and only we read it.

    Raises ValueError for a transformer that diffusers has no form of.
    """
    if not config.caption_norm:
        raise ValueError(
            "diffusers normalizes every caption, and this transformer has caption_norm=False: choose another layout"
        )
    if config.qk_norm != config.cross_qk_norm:
        raise ValueError(
            f"diffusers has norms of queries and keys in both attentions or in none, and this transformer has "
            f"qk_norm={config.qk_norm} and cross_qk_norm={config.cross_qk_norm}: choose another layout"
        )
    mlp_ratio = config.ffn_dim / config.dim
    if int(mlp_ratio * config.dim) < config.ffn_dim:  # diffusers truncates the product
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return {
        "_class_name": "SanaTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": LINEAR_HEAD_DIM,
        "num_layers": config.depth,
        "num_cross_attention_heads": config.num_cross_heads,
        "cross_attention_head_dim": config.dim // config.num_cross_heads,
        "cross_attention_dim": config.dim,
        "caption_channels": config.caption_dim,
        "mlp_ratio": mlp_ratio,
        "attention_bias": False,
        "sample_size": config.base_size * config.patch_size,
        "patch_size": config.patch_size,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": config.position_scale,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "guidance_embeds": config.guidance_embeds,
        "guidance_embeds_scale": GUIDANCE_FACTOR,
        "timestep_scale": UNIT_SCALE if config.time_input == "unit" and not config.guidance_embeds else 1.0,
        "_time_input": config.time_input,  # diffusers ignores names that begin with an underscore
        "_null_caption": config.null_caption,
    }
