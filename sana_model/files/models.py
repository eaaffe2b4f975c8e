"""Load and save one model: the transformer, the autoencoder, the text encoder.

The first two come in our own layout, diffusers' or NVlabs', told apart by their content; the text encoder comes in that of
transformers.
"""

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from sana_model.files import key_maps
from sana_model.files.atomic import write_atomically
from sana_model.files.key_maps import KeyMap, from_ours, their_shape, to_ours, translate
from sana_model.files.layout import Layout
from sana_model.files.places import local_target, resolve
from sana_model.files.published_configs import (
    autoencoder_config_from_diffusers,
    autoencoder_config_from_nvlabs,
    diffusers_autoencoder_config,
    diffusers_transformer_config,
    positions_for_nvlabs,
    transformer_config_from_diffusers,
    transformer_config_from_nvlabs,
)
from sana_model.files.tensors import (
    WEIGHT_STEMS,
    read_json,
    read_safetensors,
    read_safetensors_folder,
    read_weights_file,
    write_json,
    write_safetensors,
)
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import DEFAULT_TEXT_ENCODER, NVLABS_PROMPTS, AutoencoderConfig, SanaConfig, TextEncoderConfig
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer

PIPELINE_INDEXES = ("pipeline.json", "model_index.json")  # of a whole pipeline's folder: ours, diffusers'

NULL_CAPTION = "null_caption_embeds"
NULL_CAPTION_FILE = f"{NULL_CAPTION}.safetensors"  # beside diffusers' files, whose layout has no place for it


def load_transformer(
    path: str | Path, *, use_ema: bool = False, dtype: torch.dtype | None = None, **overrides: Any
) -> SanaTransformer:
    """Load a linear DiT, in eval mode. The layout is recognised by the content.

    Args:
        path: a folder (ours or diffusers'; of a pipeline, its transformer), or a weights file (NVlabs' `.pth`, or a safetensors
            file with its config.json beside it); local, or an hf://, zoo:// or fsspec URI.
        use_ema: take the averaged weights of a `.pth` (`state_dict_ema`).
        dtype: None keeps that of the file.
        overrides: fields of `SanaConfig` that replace what the file says. A `.pth` does not hold `num_cross_heads`: it is known
            for the published widths, and must be given for others.

    Raises FileNotFoundError if nothing is there. Raises ValueError if the weights are another model's or an unsupported
    variant, if a file is damaged, or if tensors are missing, extra or misshapen; the message names them.
    """
    source, settings, state = _open(path, ("transformer",), use_ema)
    key_map: KeyMap = {}
    if settings.get("model_type") == "sana_transformer":
        config = _config_from_json(SanaConfig, settings, source)
        null_caption = state.pop(NULL_CAPTION, None)
    elif settings.get("_class_name") == "SanaTransformer2DModel":
        key_map = key_maps.TRANSFORMER_DIFFUSERS
        config = transformer_config_from_diffusers(settings, state, source)
        null_file = source / NULL_CAPTION_FILE
        null_caption = read_safetensors(null_file)[NULL_CAPTION] if null_file.exists() else None
    elif not settings:
        key_map = key_maps.TRANSFORMER_NVLABS
        config = transformer_config_from_nvlabs(state, source, overrides.get("num_cross_heads"))
        null_caption = state.pop(key_maps.NVLABS_NULL_CAPTION, None)
        for name in (key_maps.NVLABS_POSITIONS, *key_maps.NVLABS_TRAINING_ONLY):
            state.pop(name, None)
    else:
        raise ValueError(f"{source} is not a linear DiT that is known here: its config.json says {_class_of(settings)}")
    with torch.device("meta"):
        model = SanaTransformer(replace(config, **overrides))
    _fill(model, state, key_map, source, dtype)
    model.null_caption_embeds = null_caption if null_caption is None or dtype is None else null_caption.to(dtype)
    return model


def save_transformer(
    model: SanaTransformer, path: str | Path, *, layout: str = "sana", null_caption_embeds: Tensor | None = None
) -> None:
    """Write a folder ("sana", "diffusers") or a `.pth` file ("nvlabs"); each file whole or not at all.

    `null_caption_embeds` (tokens, caption_dim) are written too, unless the model has its own.

    Raises ValueError for another layout, a URI, or the folder of a whole pipeline.
    """
    path, state, config = local_target(path), model.state_dict(), model.config
    null_caption = null_caption_embeds if model.null_caption_embeds is None else model.null_caption_embeds
    if check_layout(layout) == "nvlabs":
        weights = _export(state, key_maps.TRANSFORMER_NVLABS)
        weights[key_maps.NVLABS_POSITIONS] = positions_for_nvlabs(config, model.head.weight.dtype)
        _write_pth(path, weights if null_caption is None else weights | {key_maps.NVLABS_NULL_CAPTION: null_caption})
    elif layout == "sana":
        kept = {} if null_caption is None else {NULL_CAPTION: null_caption}
        _write_folder(path, "model", state | kept, {"model_type": "sana_transformer", **asdict(config)})
    else:
        weights = _export(state, key_maps.TRANSFORMER_DIFFUSERS)
        _write_folder(path, "diffusion_pytorch_model", weights, diffusers_transformer_config(config))
        if null_caption is not None:
            write_safetensors(path / NULL_CAPTION_FILE, {NULL_CAPTION: null_caption})


def load_autoencoder(
    path: str | Path, *, dtype: torch.dtype | None = None, scaling_factor: float | None = None
) -> DCAutoencoder:
    """Load a DC-AE, in eval mode, from a folder (ours, diffusers' or efficientvit's), a weights file, or a URI of one.

    `scaling_factor` replaces the scale of the latents that the files give. Bare efficientvit weights give none, and published
    autoencoders of one shape differ in it ("in" and "mix"): for those it must be given.

    Raises FileNotFoundError and ValueError as `load_transformer` does, and ValueError if the scale is not known.
    """
    source, settings, state = _open(path, ("autoencoder", "vae"))
    key_map: KeyMap = {}
    if settings.get("model_type") == "dc_autoencoder":
        config = _config_from_json(AutoencoderConfig, settings, source)
    elif settings.get("_class_name") == "AutoencoderDC":
        key_map = key_maps.AUTOENCODER_DIFFUSERS
        config = autoencoder_config_from_diffusers(settings, source)
    elif not settings or any(".op_list." in name for name in state):
        key_map = key_maps.AUTOENCODER_NVLABS
        config = autoencoder_config_from_nvlabs(settings, state, source, scaling_factor)
    else:
        raise ValueError(f"{source} is not a DC-AE that is known here: its config.json says {_class_of(settings)}")
    with torch.device("meta"):
        model = DCAutoencoder(config if scaling_factor is None else replace(config, scaling_factor=scaling_factor))
    _fill(model, state, key_map, source, dtype)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_autoencoder(model: DCAutoencoder, path: str | Path, *, layout: str = "sana") -> None:
    """Write a folder ("sana", "diffusers") or a `.pth` file with efficientvit's names ("nvlabs"); files whole or not at all.

    Raises ValueError for another layout, a URI, or the folder of a whole pipeline.
    """
    path, state = local_target(path), model.state_dict()
    if check_layout(layout) == "nvlabs":
        _write_pth(path, _export(state, key_maps.AUTOENCODER_NVLABS))
    elif layout == "sana":
        _write_folder(path, "model", state, {"model_type": "dc_autoencoder", **asdict(model.config)})
    else:
        weights = _export(state, key_maps.AUTOENCODER_DIFFUSERS)
        _write_folder(path, "diffusion_pytorch_model", weights, diffusers_autoencoder_config(model.config))


def load_text_encoder(
    path: str | Path = DEFAULT_TEXT_ENCODER,
    *,
    config: TextEncoderConfig = NVLABS_PROMPTS,
    dtype: torch.dtype | None = None,
    tokenizer_path: str | Path | None = None,
    attn_implementation: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
) -> TextEncoder:
    """Load any decoder-only transformers model with its tokenizer; a causal LM without its head.

    Args:
        path: a local folder, a model id on the hub, or an hf://, zoo:// or fsspec URI.
        config: how a caption becomes tokens; no checkpoint of a language model holds it.
        dtype: None keeps the checkpoint's.
        tokenizer_path: the tokenizer's folder if it is not the model's, as in a diffusers pipeline.
        attn_implementation: None is transformers' default, as in diffusers: sdpa, which ignores Gemma-2's soft-capping of
            attention logits; "eager" applies it.
        variant: the one in the names of the weights' files ("bf16"); None: no variant.
        revision: of a model id on the hub; None: "main".

    Raises FileNotFoundError if nothing is at a URI, OSError (of transformers) if a folder or model id is not there.
    """
    options = {"dtype": dtype or "auto", "attn_implementation": attn_implementation, "variant": variant}
    local, tokenizer_local = (resolve(p) if "://" in str(p) else p for p in (path, tokenizer_path or path))
    pinned = {"revision": revision} if revision else {}
    model = AutoModel.from_pretrained(local, **options, **pinned)
    return TextEncoder(model, AutoTokenizer.from_pretrained(tokenizer_local, **pinned), config)


def save_text_encoder(text_encoder: TextEncoder, path: str | Path) -> None:
    """Write the language model and its tokenizer into one folder, which transformers loads; the caller keeps `config`.

    Raises ValueError for a URI.
    """
    folder = local_target(path)
    text_encoder.model.save_pretrained(folder)
    text_encoder.tokenizer.save_pretrained(folder)


def _open(
    path: str | Path, subfolders: tuple[str, ...], use_ema: bool = False
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Find and read a model: the place of its weights, the content of its config.json ({} if it has none), and its tensors.

    `subfolders`: names of the folders in which a pipeline keeps such a model.
    """
    local = resolve(path)
    if local.is_file():
        state = read_weights_file(local, use_ema=use_ema)
        beside = local.parent / "config.json"
        has_config = local.suffix == ".safetensors" and beside.exists()
        return (local.parent, read_json(beside), state) if has_config else (local, {}, state)
    if use_ema:
        raise ValueError(f"use_ema takes the EMA out of an NVlabs .pth; {path} is a folder and holds one set of weights")
    folder = next((local / name for name in subfolders if (local / name / "config.json").exists()), local)
    settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    return folder, settings, read_safetensors_folder(folder)


def _fill(model: nn.Module, state: dict[str, Tensor], key_map: KeyMap, source: Path, dtype: torch.dtype | None) -> None:
    """Give `model`, made on the meta device, exactly the tensors of `state`.

    Raises ValueError that names the tensors that are missing, extra or misshapen.
    """
    ours: dict[str, Tensor] = {}
    problems, used = [], set()
    for key, expected in model.state_dict().items():
        foreign = translate(key, key_map)
        used.update(foreign.names)
        shape = their_shape(foreign, expected.shape)
        missing = [f"missing {name}" for name in foreign.names if name not in state]
        misshapen = [
            f"misshapen {name}: {tuple(state[name].shape)}, expected {shape}"
            for name in foreign.names
            if name in state and tuple(state[name].shape) != shape
        ]
        problems += missing + misshapen
        if not missing and not misshapen:
            tensor = to_ours(foreign, state)
            ours[key] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    problems += [f"extra {name}" for name in state if name not in used]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source} does not fit a {type(model).__name__}:\n  {shown}")
    model.load_state_dict(ours, assign=True)
    model.requires_grad_(True).eval()


def _export(state: dict[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Our tensors under the names, and in the form, of another layout."""
    exported: dict[str, Tensor] = {}
    for key, tensor in state.items():
        exported |= from_ours(translate(key, key_map), tensor)
    return exported


def _write_folder(folder: Path, stem: str, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write the weights, then config.json, and remove what an earlier save in another layout or in shards left there.

    Raises ValueError for the folder of a whole pipeline: loading from there would take the old model in the subfolder.
    """
    if any((folder / index).exists() for index in PIPELINE_INDEXES):
        raise ValueError(f"{folder} holds a whole pipeline: save one model into its subfolder, or the pipeline over it")
    write_safetensors(folder / f"{stem}.safetensors", weights)
    write_json(folder / "config.json", config)
    stale = [folder / NULL_CAPTION_FILE, *(folder / f"{other}.safetensors" for other in WEIGHT_STEMS if other != stem)]
    for name in WEIGHT_STEMS:
        stale += [folder / f"{name}.safetensors.index.json", *folder.glob(f"{name}-*-of-*.safetensors")]
    for path in stale:
        path.unlink(missing_ok=True)


def _write_pth(path: Path, weights: dict[str, Tensor]) -> None:
    state = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: torch.save({"state_dict": state}, temporary))


def check_layout(layout: str) -> str:
    """Return `layout`. Raises ValueError if there is no layout of that name."""
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
