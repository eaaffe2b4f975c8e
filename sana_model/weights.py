"""Load and save the transformer and the autoencoder: our own layout, diffusers' and NVlabs', told apart by their content."""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from sana_model import key_maps
from sana_model.autoencoder import AUTOENCODER_PRESETS, AutoencoderConfig, DCAutoencoder
from sana_model.checkpoint_files import (
    read_json,
    read_pth,
    read_safetensors,
    read_safetensors_folder,
    resolve,
    write_atomically,
    write_json,
    write_safetensors,
)
from sana_model.key_maps import KeyMap, from_ours, to_ours, translate
from sana_model.published_configs import (
    autoencoder_config_from_diffusers,
    autoencoder_config_from_weights,
    diffusers_autoencoder_config,
    diffusers_transformer_config,
    positions_for_nvlabs,
    positions_from_nvlabs,
    transformer_shape_from_weights,
)
from sana_model.transformer import LINEAR_HEAD_DIM, SanaConfig, SanaTransformer

Layout = Literal["sana", "diffusers", "nvlabs"]
Model = TypeVar("Model", bound=nn.Module)

PUBLISHED_CROSS_HEADS = {1152: 16, 2240: 20}  # by width: the one number of a linear DiT that its tensors do not show
NULL_CAPTION_FILE = "null_caption_embeds.safetensors"


def load_transformer(
    path: str | Path, *, use_ema: bool = False, dtype: torch.dtype | None = None, **overrides: Any
) -> SanaTransformer:
    """A linear DiT from a folder (ours or diffusers'), an NVlabs `.pth`, or an hf:// or fsspec URI of one.

    Width, depth and QK norm are read from the weights. `overrides` are `SanaConfig` fields for what a file does not tell
    (`num_cross_heads` of an unpublished width in a `.pth`). `use_ema` takes `state_dict_ema` of a `.pth`.

    Raises FileNotFoundError, or ValueError that names a tensor that is missing, extra or misshapen, or a damaged file.
    """
    local = resolve(path)
    if local.is_file():
        state = read_pth(local, use_ema=use_ema) if local.suffix in (".pth", ".pt") else read_safetensors(local)
        return _load_nvlabs_transformer(local, state, dtype, overrides)
    if use_ema:
        raise ValueError(f"use_ema takes the EMA out of an NVlabs .pth; {path} is a folder and holds one set of weights")
    folder = local / "transformer" if (local / "transformer" / "config.json").exists() else local
    settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    state = read_safetensors_folder(folder)
    if settings.get("model_type") == "sana_transformer":
        config = _config_from_json(SanaConfig, settings, folder)
        return _fill(
            _empty_transformer(replace(config, **overrides), state.get("null_caption_embeds")), state, {}, folder, dtype
        )
    if settings.get("_class_name") == "SanaTransformer2DModel":
        return _load_diffusers_transformer(folder, settings, state, dtype, overrides)
    raise ValueError(f"{folder} is not a linear DiT that is known here: its config.json says {_class_of(settings)}")


def save_transformer(model: SanaTransformer, path: str | Path, *, layout: str = "sana") -> None:
    """Write a folder ("sana", "diffusers") or a `.pth` file ("nvlabs"), each file whole or not at all."""
    path, state, config = Path(path), model.state_dict(), model.config
    if _check_layout(layout) == "sana":
        write_safetensors(path / "model.safetensors", state)
        write_json(path / "config.json", {"model_type": "sana_transformer", **asdict(config)})
    elif layout == "diffusers":
        null_caption = state.pop("null_caption_embeds", None)
        weights = _export(state, key_maps.TRANSFORMER_DIFFUSERS)
        write_safetensors(path / "diffusion_pytorch_model.safetensors", weights)
        if null_caption is not None:  # diffusers has no place for it and ignores a further file
            write_safetensors(path / NULL_CAPTION_FILE, {"null_caption_embeds": null_caption})
        write_json(path / "config.json", diffusers_transformer_config(config))
    else:
        weights = _export(state, key_maps.TRANSFORMER_NVLABS)
        weights["pos_embed"] = positions_for_nvlabs(config, model.head.weight.dtype)
        _write_pth(path, weights)


def load_autoencoder(
    path: str | Path, *, dtype: torch.dtype | None = None, scaling_factor: float | None = None
) -> DCAutoencoder:
    """A DC-AE from a folder (ours, diffusers' or efficientvit's), a weights file, or an hf:// or fsspec URI of one.

    Bare efficientvit weights do not hold the scale of the latents, and two published families ("in" and "mix") share each
    shape: `scaling_factor` decides. Raises as `load_transformer` does, and ValueError if the scale is not known.
    """
    local = resolve(path)
    if local.is_file():
        state = read_pth(local) if local.suffix in (".pth", ".pt") else read_safetensors(local)
        return _load_nvlabs_autoencoder(local, {}, state, dtype, scaling_factor)
    folder = next((local / name for name in ("autoencoder", "vae") if (local / name / "config.json").exists()), local)
    settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    state = read_safetensors_folder(folder)
    known_scale: dict[str, Any] = {} if scaling_factor is None else {"scaling_factor": scaling_factor}
    if settings.get("model_type") == "dc_autoencoder":
        config = _config_from_json(AutoencoderConfig, settings, folder)
        return _fill(_empty_autoencoder(replace(config, **known_scale)), state, {}, folder, dtype)
    if settings.get("_class_name") == "AutoencoderDC":
        config = replace(autoencoder_config_from_diffusers(settings, folder), **known_scale)
        return _fill(_empty_autoencoder(config), state, key_maps.AUTOENCODER_DIFFUSERS, folder, dtype)
    if any(".op_list." in name for name in state):
        return _load_nvlabs_autoencoder(folder, settings, state, dtype, scaling_factor)
    raise ValueError(f"{folder} is not a DC-AE that is known here: its config.json says {_class_of(settings)}")


def save_autoencoder(model: DCAutoencoder, path: str | Path, *, layout: str = "sana") -> None:
    """Write a folder ("sana", "diffusers") or a `.pth` file ("nvlabs", efficientvit's names), each file whole or not at all."""
    path, state = Path(path), model.state_dict()
    if _check_layout(layout) == "sana":
        write_safetensors(path / "model.safetensors", state)
        write_json(path / "config.json", {"model_type": "dc_autoencoder", **asdict(model.config)})
    elif layout == "diffusers":
        weights = _export(state, key_maps.AUTOENCODER_DIFFUSERS)
        write_safetensors(path / "diffusion_pytorch_model.safetensors", weights)
        write_json(path / "config.json", diffusers_autoencoder_config(model.config))
    else:
        _write_pth(path, _export(state, key_maps.AUTOENCODER_NVLABS))


def _fill(model: Model, state: dict[str, Tensor], key_map: KeyMap, source: Path, dtype: torch.dtype | None) -> Model:
    """`model`, made on the meta device, with exactly the tensors of `state`; every tensor that does not fit is named."""
    ours: dict[str, Tensor] = {}
    problems, used = [], set(key_maps.NVLABS_IGNORED)
    for key, expected in model.state_dict().items():
        foreign = translate(key, key_map)
        used.update(foreign.names)
        missing = [name for name in foreign.names if name not in state]
        if missing:
            problems.append(f"missing {', '.join(missing)}")
            continue
        tensor = to_ours(foreign, state)
        if tensor.shape != expected.shape:
            names = ", ".join(foreign.names)
            problems.append(f"misshapen {names}: {tuple(tensor.shape)}, expected {tuple(expected.shape)}")
        ours[key] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    problems += [f"extra {name}" for name in state if name not in used]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source} does not fit a {type(model).__name__}:\n  {shown}")
    model.load_state_dict(ours, assign=True)
    return model.requires_grad_(True)


def _empty_transformer(config: SanaConfig, null_caption_embeds: Tensor | None) -> SanaTransformer:
    with torch.device("meta"):
        model = SanaTransformer(config)
        if null_caption_embeds is not None:
            model.null_caption_embeds = torch.empty_like(null_caption_embeds, device="meta")
    return model


def _empty_autoencoder(config: AutoencoderConfig) -> DCAutoencoder:
    with torch.device("meta"):
        return DCAutoencoder(config)


def _export(state: dict[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    exported: dict[str, Tensor] = {}
    for key, tensor in state.items():
        exported |= from_ours(translate(key, key_map), tensor)
    return exported


def _write_pth(path: Path, weights: dict[str, Tensor]) -> None:
    state = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: torch.save({"state_dict": state}, temporary))


def _check_layout(layout: str) -> str:
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(get_args(Layout))}")
    return layout


def _config_from_json(kind: type[Any], settings: dict[str, Any], folder: Path) -> Any:
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(settings) - known - {"model_type"})
    if unknown:
        raise ValueError(f"{folder / 'config.json'} has unknown fields {', '.join(unknown)}: written by a newer version?")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    values.pop("model_type")
    return kind(**values)


def _class_of(settings: dict[str, Any]) -> str:
    return repr(settings.get("_class_name") or settings.get("model_type") or "nothing of its kind")


def _load_nvlabs_transformer(
    source: Path, state: dict[str, Tensor], dtype: torch.dtype | None, overrides: dict[str, Any]
) -> SanaTransformer:
    shape = transformer_shape_from_weights(state, key_maps.TRANSFORMER_NVLABS, source)
    shape |= positions_from_nvlabs(state.get("pos_embed")) | overrides
    if "num_cross_heads" not in shape:
        if shape["dim"] not in PUBLISHED_CROSS_HEADS:
            raise ValueError(
                f"{source} has width {shape['dim']}, which is not a published one ({PUBLISHED_CROSS_HEADS}): "
                "weights do not show the number of cross-attention heads, pass num_cross_heads="
            )
        shape["num_cross_heads"] = PUBLISHED_CROSS_HEADS[shape["dim"]]
    config = SanaConfig(**shape)
    return _fill(
        _empty_transformer(config, state.get("y_embedder.y_embedding")),
        state,
        key_maps.TRANSFORMER_NVLABS,
        source,
        dtype,
    )


def _load_diffusers_transformer(
    folder: Path,
    settings: dict[str, Any],
    state: dict[str, Tensor],
    dtype: torch.dtype | None,
    overrides: dict[str, Any],
) -> SanaTransformer:
    if settings.get("guidance_embeds"):
        raise ValueError(f"{folder}: guidance_embeds (Sana-Sprint) is not supported")
    if settings["attention_head_dim"] != LINEAR_HEAD_DIM:
        raise ValueError(f"{folder}: attention_head_dim={settings['attention_head_dim']}, Sana's is {LINEAR_HEAD_DIM}")
    state |= read_safetensors(folder / NULL_CAPTION_FILE) if (folder / NULL_CAPTION_FILE).exists() else {}
    config = SanaConfig(
        **transformer_shape_from_weights(state, key_maps.TRANSFORMER_DIFFUSERS, folder)
        | {
            "num_cross_heads": settings["num_cross_attention_heads"],
            "position_scale": settings.get("interpolation_scale"),
            "base_size": settings["sample_size"] // settings["patch_size"],
        }
        | overrides
    )
    return _fill(
        _empty_transformer(config, state.get("null_caption_embeds")),
        state,
        key_maps.TRANSFORMER_DIFFUSERS,
        folder,
        dtype,
    )


def _load_nvlabs_autoencoder(
    source: Path,
    settings: dict[str, Any],
    state: dict[str, Tensor],
    dtype: torch.dtype | None,
    scaling_factor: float | None,
) -> DCAutoencoder:
    config = autoencoder_config_from_weights(state, source)
    preset = AUTOENCODER_PRESETS.get(str(settings.get("model_name")))
    if scaling_factor is None:
        scales = {
            name: preset.scaling_factor
            for name, preset in AUTOENCODER_PRESETS.items()
            if replace(preset, scaling_factor=1.0) == config
        }
        if preset is None and len(set(scales.values())) != 1:
            raise ValueError(
                f"{source} does not hold the scale of its latents: pass scaling_factor=, published ones are {scales}"
            )
        scaling_factor = preset.scaling_factor if preset else next(iter(scales.values()))
    config = replace(config, scaling_factor=scaling_factor)
    return _fill(_empty_autoencoder(config), state, key_maps.AUTOENCODER_NVLABS, source, dtype)
