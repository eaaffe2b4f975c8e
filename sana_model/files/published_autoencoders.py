"""Read the configuration of a published autoencoder (its tensors and config.json), and make the config.json for diffusers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_model.files.checkpoint import config_from_json
from sana_model.files.key_maps import AUTOENCODER_DIFFUSERS, AUTOENCODER_NVLABS, KeyMap, translate
from sana_model.files.published_configs import DIFFUSERS_VERSION
from sana_model.nn.config import ATTENTION_HEAD_DIM, AUTOENCODER_PRESETS, AutoencoderConfig, Variant


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
    return _with_scale(_shape_from_weights(state, AUTOENCODER_NVLABS, source), settings, source, scaling_factor)


def autoencoder_config_from_tensors(state: dict[str, Tensor], source: Path, scaling_factor: float | None) -> AutoencoderConfig:
    """Configuration of weights with diffusers' names and no config.json; scale as in `autoencoder_config_from_nvlabs`."""
    return _with_scale(_shape_from_weights(state, AUTOENCODER_DIFFUSERS, source), {}, source, scaling_factor)


def _with_scale(
    config: AutoencoderConfig, settings: dict[str, Any], source: Path, scaling_factor: float | None
) -> AutoencoderConfig:
    """The configuration with the scale of the latents, see `autoencoder_config_from_nvlabs`."""
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


def _shape_from_weights(state: dict[str, Tensor], key_map: KeyMap, source: Path) -> AutoencoderConfig:
    """The shape that tensors of another layout show. They do not show the scale: it is set to 1."""

    def theirs(key: str) -> str:
        return translate(key, key_map).names[0]

    try:
        shuffles = theirs("encoder.conv_in.conv.weight") in state
        stages = f"{theirs('encoder.stages')}."
        num_stages = 1 + max(int(name[len(stages) :].split(".")[0]) for name in state if name.startswith(stages))
        depths: dict[str, list[int]] = {}
        widths: list[int] = []
        for half in ("encoder", "decoder"):
            prefixes = [theirs(f"{half}.stages.{stage}.") for stage in range(num_stages)]
            blocks = [len({name[len(one) :].split(".")[0] for name in state if name.startswith(one)}) for one in prefixes]
            resamples = [depth > 0 and stage + 1 < num_stages for stage, depth in enumerate(blocks)]
            depths[half] = [depth - resample for depth, resample in zip(blocks, resamples, strict=True)]
        for stage in range(num_stages):
            norm = theirs(f"encoder.stages.{stage}.0.{'norm' if stage < 3 else 'attention.norm'}.weight")
            widths.append(len(state[norm]) if depths["encoder"][stage] else 0)
        has_attention = any(name.startswith("decoder.") and (".context_module." in name or ".attn." in name) for name in state)
        latent_channels = len(state[theirs("encoder.conv_out.bias")])
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
