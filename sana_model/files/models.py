"""Load and save one model: the transformer, the autoencoder, the text encoder.

The first two come in our own layout, diffusers' or NVlabs', told apart by their content; the text encoder comes in that of
transformers.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from sana_model.files import key_maps
from sana_model.files.checkpoint import (
    BESIDE_DIFFUSERS,
    Checkpoint,
    OtherModelError,
    check_layout,
    class_of,
    config_from_json,
    export,
    fill,
    note_precision,
    open_checkpoint,
    saved_precision,
    write_folder,
    write_weights_file,
)
from sana_model.files.json_files import read_json
from sana_model.files.key_maps import KeyMap
from sana_model.files.places import local_target, resolve
from sana_model.files.published_autoencoders import (
    autoencoder_config_from_diffusers,
    autoencoder_config_from_nvlabs,
    autoencoder_config_from_tensors,
    diffusers_autoencoder_config,
)
from sana_model.files.published_configs import (
    config_from_tensors,
    diffusers_transformer_config,
    positions_for_nvlabs,
    transformer_config_from_diffusers,
    transformer_config_from_nvlabs,
)
from sana_model.files.tensors import read_safetensors, read_safetensors_folder, write_safetensors
from sana_model.files.transformers_folder import TOKENIZER, naming_the_folder
from sana_model.memory import Precision
from sana_model.nn.autoencoder import DCAutoencoder
from sana_model.nn.config import DEFAULT_TEXT_ENCODER, NVLABS_PROMPTS, AutoencoderConfig, SanaConfig, TextEncoderConfig
from sana_model.nn.quantized import quantize_blocks, quantize_layers
from sana_model.nn.text_encoder import TextEncoder
from sana_model.nn.transformer import SanaTransformer


def load_transformer(
    path: str | Path,
    *,
    use_ema: bool = False,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    **overrides: Any,
) -> SanaTransformer:
    """Load a linear DiT, in eval mode. The layout is recognised by the content.

    Args:
        path: a folder (ours or diffusers'; of a pipeline, its transformer; one that holds a single `.pth`), or a weights file
            (NVlabs' `.pth`; or safetensors with NVlabs' or diffusers' names, as ComfyUI's users keep them); local, or an
            hf://, zoo:// or fsspec URI.
        use_ema: take the averaged weights of a `.pth` (`state_dict_ema`).
        dtype: None keeps that of the file.
        variant: the one in the names of the weights' files ("bf16"); None: the plain one, or the one that fits `dtype`.
        overrides: fields of `SanaConfig` that replace what the file says. A weights file without a configuration does not
            hold `num_cross_heads`, which is known for the published widths and must be given for others; the error asks for
            what else it does not show.

    Raises FileNotFoundError if nothing is there. Raises ValueError if the weights are another model's or an unsupported
    variant, if a file is damaged, if the file does not tell a setting, or if tensors are missing, extra or misshapen; the
    message names them.
    """
    found = open_checkpoint(path, ("transformer",), use_ema=use_ema, variant=variant, dtype=dtype)
    source, state = found.source, found.state
    config, key_map = _recognise_transformer(found, overrides)
    if key_map is key_maps.TRANSFORMER_NVLABS:  # what else is in the file is read by `load_controlnet`
        state = {name: tensor for name, tensor in state.items() if not name.startswith(key_maps.CONTROLNET_PREFIX)}
    kept = {name: state.pop(theirs) for name, theirs in _kept_names(key_map).items() if theirs in state}
    state.pop(key_maps.NVLABS_POSITIONS, None)
    if found.settings.get("_class_name") and (source / BESIDE_DIFFUSERS).exists():
        kept |= read_safetensors(source / BESIDE_DIFFUSERS)
    with torch.device("meta"):
        model = SanaTransformer(replace(config, **overrides))
        quantize_blocks(model, saved_precision(found.settings, source))
    fill(model, state, key_map, source, dtype)
    for name, tensor in kept.items():
        setattr(model, name, tensor if dtype is None else tensor.to(dtype))
    return model


def _recognise_transformer(found: Checkpoint, overrides: dict[str, Any]) -> tuple[SanaConfig, KeyMap]:
    """The configuration of a transformer, and the names of its tensors. Raises as `load_transformer`."""
    source, settings, state = found.source, found.settings, found.state
    if settings.get("model_type") == "sana_transformer":
        return config_from_json(SanaConfig, settings, source), KeyMap()
    if settings.get("_class_name") == "SanaTransformer2DModel":
        config = transformer_config_from_diffusers(settings, state, source)
        return config, key_maps.diffusers_names(config)
    if settings or found.told.get("model_type", "sana_transformer") != "sana_transformer":
        raise OtherModelError(f"{source} is not a linear DiT that is known here: {class_of(settings, found.told)}")
    if any(name.startswith("controlnet_blocks.") for name in state):
        raise OtherModelError(f"{source} holds a ControlNet, not a linear DiT: give it as controlnet=")
    if any(name.startswith("transformer_blocks.") for name in state):
        key_map = key_maps.diffusers_names_in(state)
        return config_from_tensors(state, key_map, source, overrides, null_caption="own_mask"), key_map
    told = {name: value for name, value in found.told.items() if name != "controlnet"}
    return transformer_config_from_nvlabs(state, told, source, overrides), key_maps.TRANSFORMER_NVLABS


def _kept_names(key_map: KeyMap) -> dict[str, str]:
    """Our names of the tensors that a model keeps for its files, without using them -> their names in a layout."""
    return key_maps.KEPT_NVLABS if key_map is key_maps.TRANSFORMER_NVLABS else {name: name for name in key_maps.KEPT_NVLABS}


def save_transformer(
    model: SanaTransformer, path: str | Path, *, layout: str = "sana", null_caption_embeds: Tensor | None = None
) -> None:
    """Write a folder ("sana", "diffusers") or a weights file ("nvlabs": a `.pth`, or safetensors if its name ends so).

    `null_caption_embeds` (tokens, caption_dim) are written too, unless the model has its own. Each file appears whole or not at
    all.

    Raises ValueError for another layout, a URI, or the folder of a whole pipeline.
    """
    path, state = local_target(path), model.state_dict()
    kept, precision = _kept_tensors(model, null_caption_embeds), note_precision(model, check_layout(layout))
    if layout == "nvlabs":
        write_weights_file(path, *nvlabs_transformer(model, null_caption_embeds))
    elif layout == "sana":
        write_folder(path, "model", state | kept, {"model_type": "sana_transformer", **precision, **asdict(model.config)})
    else:
        settings = diffusers_transformer_config(model.config)
        write_folder(path, "diffusion_pytorch_model", export(state, key_maps.diffusers_names(model.config)), settings)
        if kept:
            write_safetensors(path / BESIDE_DIFFUSERS, kept)


def nvlabs_transformer(
    model: SanaTransformer, null_caption_embeds: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of NVlabs' weights file, by their names, and the configuration that we put into it.

    Raises ValueError if the model is quantized.
    """
    note_precision(model, "nvlabs")
    weights = export(model.state_dict(), key_maps.TRANSFORMER_NVLABS)
    weights[key_maps.NVLABS_POSITIONS] = positions_for_nvlabs(model.config, model.head.weight.dtype)
    kept = _kept_tensors(model, null_caption_embeds)
    weights |= {key_maps.KEPT_NVLABS[name]: tensor for name, tensor in kept.items()}
    return weights, {"model_type": "sana_transformer", **asdict(model.config)}


def _kept_tensors(model: SanaTransformer, null_caption_embeds: Tensor | None) -> dict[str, Tensor]:
    """What a model keeps for its files, by our names, and the null caption if it has none of its own."""
    kept = {name: tensor for name in key_maps.KEPT_NVLABS if (tensor := getattr(model, name)) is not None}
    return kept if null_caption_embeds is None else {"null_caption_embeds": null_caption_embeds} | kept


def load_autoencoder(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    scaling_factor: float | None = None,
    variant: str | None = None,
) -> DCAutoencoder:
    """Load a DC-AE, in eval mode, from a folder (ours, diffusers' or efficientvit's), a weights file, or a URI of one.

    `scaling_factor` replaces the scale of the latents that the files give. Bare efficientvit weights give none, and published
    autoencoders of one shape differ in it ("in" and "mix"): for those it must be given. `dtype` and `variant` are as in
    `load_transformer`.

    Raises FileNotFoundError and ValueError as `load_transformer` does, and ValueError if the scale is not known.
    """
    found = open_checkpoint(path, ("autoencoder", "vae"), variant=variant, dtype=dtype)
    source, settings, state = found.source, found.settings, found.state
    key_map = KeyMap()
    if settings.get("model_type") == "dc_autoencoder":
        config = config_from_json(AutoencoderConfig, settings, source)
    elif settings.get("_class_name") == "AutoencoderDC":
        key_map = key_maps.AUTOENCODER_DIFFUSERS
        config = autoencoder_config_from_diffusers(settings, source)
    elif not (settings or found.told) and any(name.startswith("encoder.down_blocks.") for name in state):
        key_map = key_maps.AUTOENCODER_DIFFUSERS
        config = autoencoder_config_from_tensors(state, source, scaling_factor)
    elif any(".op_list." in name for name in state) or not (settings or found.told):
        config = autoencoder_config_from_nvlabs(settings, found.told, state, source, scaling_factor)
        key_map = key_maps.efficientvit_names(config)
        if any(name.startswith("encoder.stages.") and ".main.conv.conv." in name for name in state):
            key_map = key_maps.AUTOENCODER_NVLABS  # an earlier version of ours wrapped the strided convolution too
    else:
        raise ValueError(f"{source} is not a DC-AE that is known here: {class_of(settings, found.told)}")
    with torch.device("meta"):
        model = DCAutoencoder(config if scaling_factor is None else replace(config, scaling_factor=scaling_factor))
    fill(model, state, key_map, source, dtype)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_autoencoder(model: DCAutoencoder, path: str | Path, *, layout: str = "sana") -> None:
    """Write a folder ("sana", "diffusers") or a weights file with efficientvit's names ("nvlabs").

    A weights file is a `.pth`, or safetensors if its name ends so. Each file appears whole or not at all.

    Raises ValueError for another layout, a URI, or the folder of a whole pipeline.
    """
    path, state = local_target(path), model.state_dict()
    told = {"model_type": "dc_autoencoder", **asdict(model.config)}
    if check_layout(layout) != "sana" and not model.config.residual:
        raise ValueError(f"layout={layout} has no autoencoder without residual shortcuts (residual=false): take sana")
    if layout == "nvlabs":
        write_weights_file(path, export(state, key_maps.efficientvit_names(model.config)), told)
    elif layout == "sana":
        write_folder(path, "model", state, told)
    else:
        weights = export(state, key_maps.AUTOENCODER_DIFFUSERS)
        write_folder(path, "diffusion_pytorch_model", weights, diffusers_autoencoder_config(model.config))


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

    Raises FileNotFoundError if a folder or URI is not there, ValueError if transformers cannot read what is in it, OSError (of
    transformers) if a model id is not known, or the hub does not answer.
    """
    options = {"dtype": dtype or "auto", "attn_implementation": attn_implementation, "variant": variant}
    local, tokenizer_local = (resolve(p) if "://" in str(p) else p for p in (path, tokenizer_path or path))
    pinned = {"revision": revision} if revision else {}
    settings = read_json(Path(local) / "config.json") if (Path(local) / "config.json").is_file() else {}
    if (precision := saved_precision(settings, Path(local))) != "full":
        model = _load_quantized(Path(local), precision, dtype, attn_implementation)
        return TextEncoder(model, AutoTokenizer.from_pretrained(tokenizer_local, trust_remote_code=False), config)
    with naming_the_folder(local, "language model"):
        model = AutoModel.from_pretrained(local, trust_remote_code=False, **options, **pinned)
    with naming_the_folder(tokenizer_local, TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_local, trust_remote_code=False, **pinned)
    return TextEncoder(model, tokenizer, config)


def save_text_encoder(text_encoder: TextEncoder, path: str | Path) -> None:
    """Write the language model and its tokenizer into one folder; the caller keeps `config`.

    transformers loads it too, unless the weights are quantized. Raises ValueError for a URI.
    """
    folder, model = local_target(path), text_encoder.model
    if precision := note_precision(model):
        write_folder(folder, "model", model.state_dict(), model.config.to_dict() | precision)
    else:
        model.save_pretrained(folder)
    text_encoder.tokenizer.save_pretrained(folder)


def _load_quantized(
    folder: Path, precision: Precision, dtype: torch.dtype | None, attn_implementation: str | None
) -> PreTrainedModel:
    """Load a language model that `save_text_encoder` wrote quantized. Raises ValueError if it is damaged."""
    with naming_the_folder(folder, "language model"), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_config(config, attn_implementation=attn_implementation, trust_remote_code=False)
        quantize_layers(model, precision)
    fill(model, read_safetensors_folder(folder), KeyMap(), folder, dtype)
    for weight in model.parameters():
        weight._is_hf_initialized = True  # `_init_weights` leaves it as it is
    for module in model.modules():  # what no file holds: frequencies of rotary embeddings, scales
        missing = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in missing.items():
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if missing:
            model._init_weights(module)
    return model
