"""Read our configuration from a published checkpoint (its tensors and config.json), and make the config.json for diffusers."""

import math
from dataclasses import replace
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
from sana_model.nn.config import (
    ATTENTION_HEAD_DIM,
    AUTOENCODER_PRESETS,
    LINEAR_HEAD_DIM,
    AutoencoderConfig,
    SanaConfig,
    TimeInput,
    Variant,
)
from sana_model.nn.embeddings import GUIDANCE_FACTOR, sincos_position_embedding
from sana_model.zoo.published import find_published

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
    if settings["attention_head_dim"] != LINEAR_HEAD_DIM:
        raise ValueError(f"{source}: attention_head_dim={settings['attention_head_dim']}, Sana's is {LINEAR_HEAD_DIM}")
    return SanaConfig(
        **shape_from_weights(state, TRANSFORMER_DIFFUSERS, source),
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
    shape = shape_from_weights(state, TRANSFORMER_NVLABS, source)
    heads = cross_heads(shape["dim"], overrides.get("num_cross_heads"), source)
    guided = "cfg_embedder.mlp.0.weight" in state
    time_input: TimeInput = "unit" if guided else "whole"
    known = find_published(source)
    if known is not None and known.config is not None:
        time_input = known.config.time_input
    elif shape["qk_norm"] and not guided and "time_input" not in overrides:
        raise ValueError(
            f"{source} may hold Sana 1.5 or a teacher of Sana-Sprint, whose tensors look the same: pass time_input='whole' "
            "for Sana 1.5, time_input='unit' for the teacher"
        )
    positions = positions_from_nvlabs(state.get(NVLABS_POSITIONS))
    return SanaConfig(
        **shape,
        **positions,
        num_cross_heads=heads,
        guidance_embeds=guided,
        time_input=time_input,
        null_caption="caption_mask",
    )


def cross_heads(dim: int, given: int | None, source: Path) -> int:
    """The number of cross-attention heads: the given one, or that of the published model of this width.

    Raises ValueError if it is neither given nor known.
    """
    heads = given or PUBLISHED_CROSS_HEADS.get(dim)
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


def positions_from_nvlabs(pos_embed: Tensor | None) -> dict[str, Any]:
    """`base_size` and `position_scale` from NVlabs' `pos_embed` (1, base_size^2, D).

    It is all zeros if the model has no positional embedding. Else the scale is read from the first value of the second column:
    its frequency is 1, so it is sin(1 / interpolation scale).
    """
    if pos_embed is None:
        return {}
    base_size = math.isqrt(pos_embed.shape[1])
    if not pos_embed.any():
        return {"base_size": base_size}
    return {"base_size": base_size, "position_scale": round(1 / math.asin(float(pos_embed[0, 1, 0])), 2)}


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


def autoencoder_config_from_diffusers(settings: dict[str, Any], folder: Path) -> AutoencoderConfig:
    """Configuration from diffusers' config.json. Raises ValueError that names a setting which no published family has."""
    variant: Variant = "in" if settings["downsample_block_type"] == "pixel_unshuffle" else "sana"
    is_lite = variant == "sana" and settings["upsample_block_type"] == "pixel_shuffle"
    config = AutoencoderConfig(
        latent_channels=settings["latent_channels"],
        widths=tuple(settings["encoder_block_out_channels"]),
        encoder_depths=tuple(settings["encoder_layers_per_block"]),
        decoder_depths=tuple(settings["decoder_layers_per_block"]),
        variant=variant,
        scaling_factor=settings["scaling_factor"],
        decoder_variant="lite" if is_lite else None,
    )
    expected = diffusers_autoencoder_config(config)
    # Published Sana configurations write "Conv" for "conv"; diffusers, too, only checks for pixel_unshuffle. Residual blocks do
    # not look at the scales of attention.
    unread = {"_diffusers_version", "downsample_block_type", *(["decoder_qkv_multiscales"] if is_lite else [])}
    for name in set(expected) & set(settings) - unread:
        came, wanted = _spread(settings[name], len(config.widths)), _spread(expected[name], len(config.widths))
        if came != wanted:
            raise ValueError(f"{folder}: {name}={settings[name]} is of no published DC-AE family, which have {expected[name]}")
    return config


def _spread(value: Any, count: int) -> Any:
    """One value per stage, as a list: diffusers writes a single string where all stages have the same."""
    if isinstance(value, str):
        return [value] * count
    return (
        [list(item) if isinstance(item, list | tuple) else item for item in value] if isinstance(value, list | tuple) else value
    )


def diffusers_autoencoder_config(config: AutoencoderConfig) -> dict[str, Any]:
    """Make the config.json of an `AutoencoderDC`."""
    count, family, decoder = len(config.widths), config.variant, config.decoder
    blocks = ["ResBlock" if index < 3 else "EfficientViTBlock" for index in range(count)]
    multiscales = [[] if index < 3 or family == "in" else [5] for index in range(count)]
    old_norms = [decoder == "in" and index < 3 for index in range(count)]
    return {
        "_class_name": "AutoencoderDC",
        "_diffusers_version": DIFFUSERS_VERSION,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "attention_head_dim": ATTENTION_HEAD_DIM,
        "encoder_block_types": blocks,
        "decoder_block_types": ["ResBlock"] * count if decoder == "lite" else blocks,
        "encoder_block_out_channels": list(config.widths),
        "decoder_block_out_channels": list(config.widths),
        "encoder_layers_per_block": list(config.encoder_depths),
        "decoder_layers_per_block": list(config.decoder_depths),
        "encoder_qkv_multiscales": multiscales,
        "decoder_qkv_multiscales": multiscales,
        "upsample_block_type": "interpolate" if decoder == "sana" else "pixel_shuffle",
        "downsample_block_type": "conv" if family == "sana" else "pixel_unshuffle",
        "decoder_norm_types": ["batch_norm" if old else "rms_norm" for old in old_norms],
        "decoder_act_fns": ["relu" if old else "silu" for old in old_norms],
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
        "decoder_conv_act_fn": "silu" if decoder == "lite" else "relu",
        "scaling_factor": config.scaling_factor,
    }


def autoencoder_config_from_nvlabs(
    settings: dict[str, Any], told: dict[str, Any], state: dict[str, Tensor], source: Path, scaling_factor: float | None
) -> AutoencoderConfig:
    """Configuration from efficientvit's tensors, unless an earlier save of ours put it into the file (`told`).

    The scale of the latents is `scaling_factor` if given, else that of the model that config.json (`settings`) names, else the
    one that published autoencoders of this shape have. Raises ValueError if those have several.
    """
    if told:
        return config_from_json(AutoencoderConfig, told, source)
    config = _autoencoder_shape_from_weights(state, source)
    named = AUTOENCODER_PRESETS.get(str(settings.get("model_name")))
    if scaling_factor is None and named is not None:
        scaling_factor = named.scaling_factor
    if scaling_factor is None:
        scales = {
            name: preset.scaling_factor
            for name, preset in AUTOENCODER_PRESETS.items()
            if replace(preset, scaling_factor=1.0) == config
        }
        if len(set(scales.values())) != 1:
            raise ValueError(
                f"{source} does not hold the scale of its latents: pass scaling_factor=, published ones are {scales}"
            )
        scaling_factor = next(iter(scales.values()))
    return replace(config, scaling_factor=scaling_factor)


def _autoencoder_shape_from_weights(state: dict[str, Tensor], source: Path) -> AutoencoderConfig:
    """The shape that efficientvit's tensors show. They do not show the scale: it is set to 1."""

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    try:
        shuffles = "encoder.project_in.conv.conv.weight" in state
        depths: dict[str, list[int]] = {}
        widths: list[int] = []
        num_stages = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.stages."))
        for half in ("encoder", "decoder"):
            blocks = [count(f"{half}.stages.{stage}.op_list.") for stage in range(num_stages)]
            resamples = [depth > 0 and stage + 1 < num_stages for stage, depth in enumerate(blocks)]
            depths[half] = [depth - resample for depth, resample in zip(blocks, resamples, strict=True)]
        for stage in range(num_stages):
            prefix = f"encoder.stages.{stage}.op_list.0."
            norm = "main.conv2.norm.weight" if stage < 3 else "context_module.main.proj.norm.weight"
            widths.append(len(state[prefix + norm]) if depths["encoder"][stage] else 0)
        has_attention = any(name.startswith("decoder.") and ".context_module." in name for name in state)
        latent_channels = len(state["encoder.project_out.main.op_list.0.conv.bias"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source} is no checkpoint of a DC-AE: {error} is not in it") from error
    if widths[0] == 0:  # tensors do not show the width of a first stage without blocks; in published ones it is half the second
        widths[0] = widths[1] // 2
    return AutoencoderConfig(
        latent_channels=latent_channels,
        widths=tuple(widths),
        encoder_depths=tuple(depths["encoder"]),
        decoder_depths=tuple(depths["decoder"]),
        variant="in" if shuffles else "sana",
        scaling_factor=1.0,
        decoder_variant=None if has_attention else "lite",
    )
