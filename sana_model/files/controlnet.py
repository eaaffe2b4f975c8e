"""Load and save a ControlNet: in our own layout, diffusers' or NVlabs', whose `.pth` holds it together with the transformer."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_model.files import key_maps
from sana_model.files.checkpoint import (
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
from sana_model.files.key_maps import CONTROLNET_PREFIX, KeyMap
from sana_model.files.models import nvlabs_transformer
from sana_model.files.places import local_target
from sana_model.files.published_configs import (
    config_from_tensors,
    cross_heads,
    diffusers_transformer_config,
    positions_from_nvlabs,
    shape_from_weights,
    transformer_config_from_diffusers,
)
from sana_model.nn.config import ControlForm, ControlNetConfig
from sana_model.nn.controlnet import SanaControlNet
from sana_model.nn.quantized import quantize_blocks
from sana_model.nn.transformer import SanaTransformer

OWN_EMBEDDINGS = ("patch_embed.", "time_embed.", "caption_projection.", "caption_norm.")
"""Tensors that diffusers' layout has and the form "nvlabs" does not use: there they are copies of the transformer's."""


def load_controlnet(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    form: ControlForm | None = None,
    num_cross_heads: int | None = None,
    variant: str | None = None,
    use_ema: bool = False,
) -> SanaControlNet:
    """Load a ControlNet, in eval mode. The layout is recognised by the content.

    Args:
        path: a folder (ours or diffusers'; of a pipeline, its ControlNet), a weights file with diffusers' names, or NVlabs'
            `.pth` of a transformer with its ControlNet; local, or an hf://, zoo:// or fsspec URI.
        dtype: None keeps that of the file.
        form: the function that the weights were trained with. None: that of the layout. "nvlabs" for weights of NVlabs that
            were converted to diffusers' layout.
        num_cross_heads: of a `.pth` whose width is no published one.
        variant, use_ema: as in `load_transformer`.

    Raises FileNotFoundError if nothing is there. Raises ValueError if the weights are another model's, if a file is damaged, or
    if tensors are missing, extra or misshapen; the message names them.
    """
    found = open_checkpoint(path, ("controlnet",), use_ema=use_ema, variant=variant, dtype=dtype)
    config, key_map = _recognise(found, form, num_cross_heads)
    state = found.state
    if key_map is key_maps.CONTROLNET_NVLABS:
        state = {name: tensor for name, tensor in state.items() if name.startswith(CONTROLNET_PREFIX)}
    elif key_map is key_maps.CONTROLNET_DIFFUSERS and config.form == "nvlabs":
        state = {name: tensor for name, tensor in state.items() if not name.startswith(OWN_EMBEDDINGS)}
    with torch.device("meta"):
        model = SanaControlNet(config)
        quantize_blocks(model, saved_precision(found.settings, found.source))
    fill(model, state, key_map, found.source, dtype)
    return model


def _recognise(found: Checkpoint, form: ControlForm | None, num_cross_heads: int | None) -> tuple[ControlNetConfig, KeyMap]:
    """The configuration of a ControlNet, and the names of its tensors. Raises as `load_controlnet`."""
    source, settings, state = found.source, found.settings, found.state
    if settings.get("model_type") == "sana_controlnet":
        config = config_from_json(ControlNetConfig, settings, source)
        if form not in (None, config.form):
            raise ValueError(f"{source} is a ControlNet of form {config.form!r}: form={form!r} would be another function")
        return config, KeyMap()
    key_map = key_maps.CONTROLNET_DIFFUSERS
    if settings.get("_class_name") == "SanaControlNetModel":
        shape = transformer_config_from_diffusers(settings, state, source)
        return ControlNetConfig(**asdict(shape), form=form or "diffusers"), key_map
    if not settings and any(name.startswith("controlnet_blocks.") for name in state):
        given = {"position_scale": None, "num_cross_heads": num_cross_heads}  # no published ControlNet has positions
        shape = config_from_tensors(state, key_map, source, given, null_caption="own_mask")
        return ControlNetConfig(**asdict(shape), form=form or "diffusers"), key_map
    if not settings and any(name.startswith(CONTROLNET_PREFIX) for name in state):
        if form == "diffusers":
            raise ValueError(f"{source} is NVlabs': its weights were trained with the form 'nvlabs', not {form!r}")
        config = _config_from_nvlabs(state, found.told.get("controlnet", {}), source, num_cross_heads)
        return config, key_maps.CONTROLNET_NVLABS
    raise OtherModelError(f"{source} is not a ControlNet that is known here: {class_of(settings, found.told)}")


def save_controlnet(
    model: SanaControlNet,
    path: str | Path,
    *,
    layout: str = "sana",
    transformer: SanaTransformer | None = None,
    null_caption_embeds: Tensor | None = None,
) -> None:
    """Write a folder ("sana", "diffusers"), or a weights file with the transformer too ("nvlabs"); files whole or not at all.

    `null_caption_embeds`: as in `save_transformer`.

    Raises ValueError for another layout, a URI, the folder of a whole pipeline, a layout whose code computes another function
    than the model's form, or "nvlabs" without a transformer.
    """
    path, config = local_target(path), model.config
    precision = note_precision(model, check_layout(layout))
    if layout == "sana":
        write_folder(path, "model", model.state_dict(), {"model_type": "sana_controlnet", **precision, **asdict(config)})
        return
    if layout != config.form:
        raise ValueError(
            f"layout={layout!r}: its code would compute another function with the weights of this ControlNet, whose form is "
            f"{config.form!r}: save it as 'sana' or {config.form!r}"
        )
    if layout == "diffusers":
        weights = export(model.state_dict(), key_maps.CONTROLNET_DIFFUSERS)
        write_folder(path, "diffusion_pytorch_model", weights, _diffusers_config(config))
        return
    if transformer is None:
        raise ValueError("layout='nvlabs' holds a ControlNet together with its transformer: give it too")
    weights, told = nvlabs_transformer(transformer, null_caption_embeds)
    weights |= export(model.state_dict(), key_maps.CONTROLNET_NVLABS)
    write_weights_file(path, weights, told | {"controlnet": asdict(config)})


def holds_controlnet(path: Path) -> bool:
    """Whether NVlabs' weights file `path` has a ControlNet besides its transformer. Raises ValueError if it is damaged."""
    return any(name.startswith(CONTROLNET_PREFIX) for name in open_checkpoint(path, ("controlnet",)).state)


def _config_from_nvlabs(
    state: dict[str, Tensor], told: dict[str, Any], source: Path, num_cross_heads: int | None
) -> ControlNetConfig:
    """Configuration of the ControlNet in a file with NVlabs' names. Arguments are those of `transformer_config_from_nvlabs`."""
    if told:
        return config_from_json(ControlNetConfig, told, source)
    shape = shape_from_weights(state, key_maps.CONTROLNET_NVLABS, source)
    # Of the form "nvlabs" only the transformer has positions.
    found = state.get(key_maps.NVLABS_POSITIONS)
    positions = {} if found is None else positions_from_nvlabs(found, source)
    heads = cross_heads(shape["dim"], num_cross_heads, source)
    return ControlNetConfig(
        **shape, **positions, num_cross_heads=heads, time_input="whole", null_caption="caption_mask", form="nvlabs"
    )


def _diffusers_config(config: ControlNetConfig) -> dict[str, Any]:
    """Make the config.json of a `SanaControlNetModel`."""
    settings = diffusers_transformer_config(config) | {"_class_name": "SanaControlNetModel"}
    return {name: value for name, value in settings.items() if name not in ("qk_norm", "timestep_scale")}
