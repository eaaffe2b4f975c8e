"""One model's files, whatever the model: open a checkpoint, put its tensors into a model, write them back."""

import json
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sana_model.files.atomic import write_atomically
from sana_model.files.json_files import read_json
from sana_model.files.key_maps import KeyMap, from_ours, their_shape, to_ours, translate
from sana_model.files.layout import Layout
from sana_model.files.places import resolve
from sana_model.files.tensors import (
    CONFIG_ENTRY,
    WEIGHT_STEMS,
    read_model_file,
    read_safetensors_folder,
    write_json,
    write_safetensors,
)
from sana_model.memory import Precision
from sana_model.nn.quantized import precision_of

BESIDE_CONFIG = ("model_type", "precision")
"""What a config.json of ours says besides the fields of a model's configuration."""
PIPELINE_INDEXES = ("pipeline.json", "model_index.json")  # of a whole pipeline's folder: ours, diffusers'
BESIDE_DIFFUSERS = "null_caption_embeds.safetensors"  # what a transformer keeps and diffusers' layout has no place for


class OtherModelError(ValueError):
    """A checkpoint holds another model than the one that is asked for."""


@dataclass(frozen=True)
class Checkpoint:
    """One model's weights as they were found."""

    source: Path
    """Its folder, or its weights file."""
    settings: dict[str, Any]
    """The content of its config.json; {} if it has none."""
    told: dict[str, Any]
    """The configuration that an earlier save of ours put into a weights file; {} if there is none."""
    state: dict[str, Tensor]


def open_checkpoint(
    path: str | Path,
    subfolders: tuple[str, ...],
    *,
    use_ema: bool = False,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
) -> Checkpoint:
    """Find and read a model. Raises FileNotFoundError, or ValueError if a file is damaged or refused.

    Args:
        subfolders: names of the folders in which a pipeline keeps such a model.
        use_ema: take the averaged weights of a `.pth`.
        variant, dtype: which of several variants to read, as for `find_variant`; nothing is cast.
    """
    local = resolve(path)
    if local.is_dir():
        folder = next((local / name for name in subfolders if (local / name / "config.json").exists()), local)
        settings = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
        file = None if settings else find_pth(folder)
        if file is None:
            if use_ema:
                raise ValueError(
                    f"use_ema takes the EMA out of an NVlabs .pth; {path} is a folder and holds one set of weights"
                )
            return Checkpoint(
                folder, settings, {}, bare_names(read_safetensors_folder(folder, variant=variant, dtype=dtype), subfolders)
            )
        local = file
    state, told = read_model_file(local, use_ema=use_ema)
    beside = local.parent / "config.json"
    has_config = local.suffix == ".safetensors" and beside.exists()
    source, settings = (local.parent, read_json(beside)) if has_config else (local, {})
    return Checkpoint(source, settings, told, bare_names(state, subfolders))


def find_pth(folder: Path) -> Path | None:
    """Find the `.pth` of a folder without safetensors files, or of its folder `checkpoints`, as NVlabs publishes and trains.

    Returns None if there is none. Raises ValueError if there are several and none of them is called latest.pth.
    """
    for place in (folder, folder / "checkpoints"):
        if any(place.glob("*.safetensors")):
            return None
        found = sorted(place.glob("*.pth"))
        latest = [file for file in found if file.name == "latest.pth"]
        if len(found) > 1 and not latest:
            raise ValueError(f"{place} holds {', '.join(file.name for file in found)}: name the one to load")
        if found:
            return (latest or found)[0]
    return None


QUANTIZED = (torch.int8, torch.uint8)
"""Dtypes of quantized weights as they are stored."""

COMPILED = "_orig_mod."
"""What torch.compile puts into a tensor's name, in front of it or of a compiled part."""
PARTS = {
    "transformer": ("model.diffusion_model.",),
    "controlnet": ("model.diffusion_model.",),
    "autoencoder": ("first_stage_model.", "vae."),
}
"""What is in front of the names of a part's tensors in a file that holds several models, as ComfyUI's checkpoints do."""


def bare_names(state: dict[str, Tensor], subfolders: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of one model under their bare names: without what wrappers (DDP, torch.compile, Lightning) and programs add.

    Of a file with several models, those of the part that `subfolders` names. A word that all names begin with is no part of
    them: our models have several parts at their top.
    """
    state = {name.replace(COMPILED, ""): tensor for name, tensor in state.items()}
    for prefix in PARTS[subfolders[0]]:
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    while len(state) > 1 and len({name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def fill(model: nn.Module, state: dict[str, Tensor], key_map: KeyMap, source: Path, dtype: torch.dtype | None) -> None:
    """Give `model`, made on the meta device, exactly the tensors of `state`.

    Args:
        dtype: None keeps that of the file; of several, the one that holds the values of all, and bfloat16 for 8-bit floats.

    Raises ValueError that names the tensors that are missing, extra, misshapen or no floating-point numbers.
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
        not_floating = [
            f"no floating-point numbers in {name}: {state[name].dtype} (quantized weights are not read)"
            for name in foreign.names
            if expected.is_floating_point() and name in state and not state[name].is_floating_point()
        ]
        not_floating += [
            f"{name} holds {state[name].dtype}, expected {expected.dtype}"
            for name in foreign.names
            if expected.dtype in QUANTIZED and name in state and state[name].dtype is not expected.dtype
        ]
        problems += missing + misshapen + not_floating
        if not missing and not misshapen and not not_floating:
            ours[key] = to_ours(foreign, state)
    problems += [f"extra {name}" for name in state if name not in used]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source} does not fit a {type(model).__name__}:\n  {shown}")
    floats = {tensor.dtype for tensor in ours.values() if tensor.is_floating_point()}  # a batch norm also counts its batches
    one = dtype or reduce(torch.promote_types, {torch.bfloat16 if found.itemsize == 1 else found for found in floats})
    cast = {key: tensor.to(one) if tensor.is_floating_point() else tensor for key, tensor in ours.items()}
    model.load_state_dict(cast, assign=True)
    model.requires_grad_(True).eval()


def export(state: dict[str, Tensor], key_map: KeyMap) -> dict[str, Tensor]:
    """Our tensors under the names, and in the form, of another layout."""
    exported: dict[str, Tensor] = {}
    for key, tensor in state.items():
        exported |= from_ours(translate(key, key_map), tensor)
    return exported


def write_folder(folder: Path, stem: str, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write the weights, then config.json, and remove what an earlier save in another layout or in shards left there.

    Raises ValueError for the folder of a whole pipeline: loading from there would take the old model in the subfolder.
    """
    if any((folder / index).exists() for index in PIPELINE_INDEXES):
        raise ValueError(f"{folder} holds a whole pipeline: save one model into its subfolder, or the pipeline over it")
    write_safetensors(folder / f"{stem}.safetensors", weights)
    write_json(folder / "config.json", config)
    stale = [folder / BESIDE_DIFFUSERS, *(folder / f"{other}.safetensors" for other in WEIGHT_STEMS if other != stem)]
    for name in WEIGHT_STEMS:
        stale += [folder / f"{name}.safetensors.index.json", *folder.glob(f"{name}-*-of-*.safetensors")]
    for path in stale:
        path.unlink(missing_ok=True)


def write_weights_file(path: Path, weights: dict[str, Tensor], told: dict[str, Any]) -> None:
    """Write one file: safetensors if `path` ends so, else NVlabs' `.pth`. The configuration `told` goes into it.

    Other programs ignore it; loading takes from it what tensors cannot tell.
    """
    if path.suffix == ".safetensors":
        write_safetensors(path, weights, {CONFIG_ENTRY: json.dumps(told)})
        return
    state = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    write_atomically(path, lambda temporary: torch.save({"state_dict": state, CONFIG_ENTRY: told}, temporary))


def check_layout(layout: str) -> str:
    """Return `layout`. Raises ValueError if there is no layout of that name."""
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(get_args(Layout))}")
    return layout


def config_from_json(kind: type[Any], settings: dict[str, Any], source: Path) -> Any:
    """Make the configuration `kind` of its fields in JSON's types. Raises ValueError if there are unknown ones."""
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(settings) - known - set(BESIDE_CONFIG))
    if unknown:
        raise ValueError(f"{source}: its configuration has unknown fields {', '.join(unknown)}: written by a newer version?")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    return kind(**{name: value for name, value in values.items() if name not in BESIDE_CONFIG})


def saved_precision(settings: dict[str, Any], source: Path) -> Precision:
    """The precision that a config.json says its weights have. Raises ValueError for one that is not known here."""
    precision = settings.get("precision", "full")
    if precision not in get_args(Precision):
        raise ValueError(f"{source}: its weights are {precision!r}, which is no precision known here: of a newer version?")
    return precision


def note_precision(model: nn.Module, layout: str = "sana") -> dict[str, str]:
    """What config.json says of the precision of a model that is saved; nothing of full precision.

    Raises ValueError if the model is quantized, and `layout` is that of others, who could not read it.
    """
    precision = precision_of(model)
    if precision != "full" and layout != "sana":
        raise ValueError(f"layout={layout} has no place for {precision} weights: save them as sana, or those in full precision")
    return {} if precision == "full" else {"precision": precision}


def class_of(settings: dict[str, Any], told: dict[str, Any]) -> str:
    """What a checkpoint's config.json, or its weights file, says that the model is."""
    named = settings or told
    says = "its config.json says" if settings else "the file says"
    return f"{says} {named.get('_class_name') or named.get('model_type') or 'nothing of its kind'!r}"
