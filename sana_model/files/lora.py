"""Adapters in files: LoRA of diffusers, peft, kohya and OneTrainer; LoHa and LoKr of LyCORIS (SimpleTuner) and peft.

They differ in how they name a matrix (`transformer.transformer_blocks.0.attn1.to_q`, with dots or underscores, after one prefix
or another), its parts (`lora_A`, `lora_down`, ...) and the scale (a tensor `alpha`, a text in the header, or a file beside).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sana_model.files.json_files import parse_json, read_json
from sana_model.files.key_maps import (
    TRANSFORMER_DIFFUSERS,
    TRANSFORMER_NVLABS,
    KeyMap,
    diffusers_names,
    their_shape,
    translate,
)
from sana_model.files.places import resolve
from sana_model.files.tensors import read_weights_file, write_safetensors
from sana_model.nn.lora import WeightChange
from sana_model.nn.quantized import quantized_layers
from sana_model.nn.transformer import SanaTransformer

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers' load_lora_weights looks for in a folder."""
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""Entry of the header in which diffusers keeps peft's configuration."""

PREFIXES = ("transformer_", "lycoris_", "lora_transformer_", "lora_unet_", "base_model_model_", "model_", "diffusion_model_")
"""What trainers write before the name of a matrix, with underscores for dots."""
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
NOT_READ = {
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector"), "DoRA, which scales the changed weights"),
    **dict.fromkeys(("lora_mid", "hada_t1", "hada_t2", "lokr_t2"), "a Tucker decomposition"),
}
ROLES = {
    **dict.fromkeys(("lora_A", "lora_down", "lora.down"), "down"),
    **dict.fromkeys(("lora_B", "lora_up", "lora.up"), "up"),
    **{name: name for name in ("alpha", *LOKR, *LOHA, *NOT_READ)},
}
"""The end of a tensor's name -> what the tensor is."""
KEY = re.compile(rf"(.+)\.({'|'.join(re.escape(name) for name in ROLES)})(?:\.default)?(?:\.weight)?")


@dataclass(frozen=True)
class Adapter:
    """The changes of a transformer's weights, by our names, and the keys of the file that fit nothing in it."""

    changes: dict[str, WeightChange]
    unread: list[str]

    def describe_unread(self) -> str | None:
        """Say which keys fit nothing; None if all do."""
        if not self.unread:
            return None
        few = ", ".join(self.unread[:3]) + (", ..." if len(self.unread) > 3 else "")
        return f"{len(self.unread)} tensors of the adapter fit no matrix of this transformer and have no effect: {few}"


@dataclass(frozen=True)
class _Place:
    """Where a matrix of another layout is in ours: the `index`-th of so many equal parts, one below the other."""

    name: str
    index: int
    parts: int
    shape: tuple[int, ...]
    """Of that part."""


def read_lora(path: str | Path, transformer: SanaTransformer) -> Adapter:
    """Read an adapter for a transformer. What is low-rank stays low-rank.

    Args:
        path: a .safetensors (or a .pth), or the folder in which diffusers or peft saved one; local, or an hf:// or fsspec URI.

    Raises:
        FileNotFoundError: nothing is there, or the folder holds no adapter.
        ValueError: the file is damaged; no key fits the transformer; a matrix has another shape (an adapter of another size of
            Sana); or the adapter is of a kind that is not read here (DoRA, Tucker decompositions).
    """
    file = _find_file(resolve(path))
    settings = _read_settings(file)
    groups: dict[str, dict[str, tuple[str, Tensor]]] = {}
    unread: list[str] = []
    for key, tensor in read_weights_file(file).items():
        match = KEY.fullmatch(key)
        if match is None:
            unread.append(key)
        else:
            groups.setdefault(match[1], {})[ROLES[match[2]]] = (key, tensor)
    places = _find_places(transformer)
    found: dict[str, dict[_Place, WeightChange]] = {}
    for base, group in groups.items():
        place = _look_up(base, places)
        tensors = {role: tensor for role, (_, tensor) in group.items()}
        if refused := [NOT_READ[role] for role in tensors if role in NOT_READ]:
            raise ValueError(f"{path} holds {refused[0]} ({base}): not read here; merge it with the tool that made it")
        if place is None or (whole := _to_change(tensors, settings, base)) is None:
            unread += [key for key, _ in group.values()]
            continue
        found.setdefault(place.name, {})[place] = _fit(whole, place, f"{path}, {base}")
    if not found:
        few = ", ".join(unread[:3])
        raise ValueError(f"{path} is no adapter of this transformer: none of its {len(unread)} tensors fits: {few}, ...")
    return Adapter({name: _stack(parts) for name, parts in found.items()}, unread)


def write_lora(folder: Path, changes: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Write low-rank changes to `folder`, for diffusers' `SanaPipeline.load_lora_weights`. The scale is in them.

    `changes`: by our name of a weight, (down (rank, in), up (out, rank)).
    """
    adapter: dict[str, Tensor] = {}
    for name, (down, up) in changes.items():
        foreign = translate(name, TRANSFORMER_DIFFUSERS)
        parts = up.chunk(len(foreign.names))  # q, k and v share one `down`
        for their_name, part in zip(foreign.names, parts, strict=True):
            for kind, matrix in (("lora_A", down.clone()), ("lora_B", part)):
                key = f"transformer.{their_name.removesuffix('weight')}{kind}.weight"
                adapter[key] = matrix[:, :, None, None] if foreign.is_1x1 else matrix
    write_safetensors(folder / LORA_FILE, adapter)


def _find_file(place: Path) -> Path:
    if place.is_file():
        return place
    named = [place / name for name in (LORA_FILE, PEFT_FILE) if (place / name).exists()]
    files = named or sorted(place.glob("*.safetensors"))
    if len(files) != 1 and not named:
        count = f"{len(files)} .safetensors files, of which none is" if files else "no"
        raise FileNotFoundError(f"{place} holds {count} {LORA_FILE} or {PEFT_FILE}: give the adapter's file")
    return files[0]


def _read_settings(file: Path) -> dict[str, Any]:
    """peft's configuration of an adapter, from the header or from the file beside; {} if there is none."""
    if file.name == PEFT_FILE and (file.parent / PEFT_CONFIG).exists():
        return read_json(file.parent / PEFT_CONFIG)
    with file.open("rb") as opened:
        if opened.read(9)[8:] != b"{":  # no safetensors
            return {}
    with safe_open(file, "pt") as header:
        told = (header.metadata() or {}).get(METADATA)
    settings = parse_json(told, file) if told else {}
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


def _find_places(transformer: SanaTransformer) -> dict[str, _Place]:
    """Every name of a matrix or convolution, in each layout, with underscores for dots."""
    places: dict[str, _Place] = {}
    shapes = {name: weight.shape for name, weight in transformer.named_parameters()}
    shapes |= {
        f"{name}.weight": torch.Size((layer.out_features, layer.in_features)) for name, layer in quantized_layers(transformer)
    }
    for name, shape in shapes.items():
        if not name.endswith(".weight") or len(shape) not in (2, 4):
            continue
        for key_map in (diffusers_names(transformer.config), TRANSFORMER_NVLABS, KeyMap()):
            foreign = translate(name, key_map)
            for index, theirs in enumerate(foreign.names):
                own = their_shape(foreign, shape)[: len(shape)]
                flat = theirs.removesuffix(".weight").replace(".", "_")
                places.setdefault(flat, _Place(name, index, len(foreign.names), own))
    return places


def _look_up(base: str, places: Mapping[str, _Place]) -> _Place | None:
    name = base.replace(".", "_")
    while name not in places:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
    return places[name]


def _to_change(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], base: str) -> WeightChange | None:
    """The change that a matrix's tensors make, its scale included; None if they are not all there."""
    alpha = float(tensors["alpha"]) if "alpha" in tensors else None
    if {"down", "up"} <= tensors.keys():
        down, up = tensors["down"].flatten(1), tensors["up"].flatten(1)
        return WeightChange(_scale(settings, base, alpha, len(down)) * up.float(), down.float())
    if set(LOHA) <= tensors.keys():
        w1a, w1b, w2a, w2b = (tensors[name].float() for name in LOHA)
        return WeightChange(_scale(settings, base, alpha, len(w1b)) * (w1a @ w1b) * (w2a @ w2b))
    w1, w2, rank = tensors.get("lokr_w1"), tensors.get("lokr_w2"), None
    if w1 is None and {"lokr_w1_a", "lokr_w1_b"} <= tensors.keys():
        w1, rank = tensors["lokr_w1_a"].float() @ tensors["lokr_w1_b"].float(), len(tensors["lokr_w1_b"])
    if w2 is None and {"lokr_w2_a", "lokr_w2_b"} <= tensors.keys():
        w2, rank = tensors["lokr_w2_a"].float() @ tensors["lokr_w2_b"].float().flatten(1), len(tensors["lokr_w2_b"])
    if w1 is None or w2 is None:
        return None
    w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim))
    return WeightChange(_scale(settings, base, alpha, rank) * torch.kron(w1.float(), w2.float()))


def _scale(settings: Mapping[str, Any], base: str, alpha: float | None, rank: int | None) -> float:
    """alpha / rank: alpha of the file's tensor, or of peft's configuration, or the rank (diffusers' default).

    A LoKr whose two factors are whole has no rank, and LyCORIS gives it no scale; peft divides by its configured rank.
    """
    if rank is None:
        rank = settings.get("r")
        if rank is None:
            return 1.0
    if alpha is None:
        patterns = settings.get("alpha_pattern") or {}
        own = next((value for name, value in patterns.items() if re.match(rf"(.*\.)?({name})$", base)), None)
        alpha = settings.get("lora_alpha", settings.get("alpha", rank)) if own is None else own
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _fit(change: WeightChange, place: _Place, what: str) -> WeightChange:
    """The same, of the shape of its place. Raises ValueError if it has another."""
    out, inputs = place.shape[0], math.prod(place.shape[1:])
    if change.down is None:
        fits, shown = change.up.numel() == out * inputs and len(change.up) == out, tuple(change.up.shape)
    else:
        fits, shown = (change.up.shape[0], change.down.shape[1]) == (out, inputs), (len(change.up), change.down.shape[1])
        fits = fits and change.up.shape[1] == len(change.down)
    if not fits:
        raise ValueError(
            f"{what} changes a matrix of {' x '.join(map(str, shown))}, and this transformer's is {out} x {inputs}: the "
            "adapter was trained for another model"
        )
    if len(place.shape) == 2:
        return change if change.down is not None else WeightChange(change.up.reshape(out, inputs))
    return WeightChange(change.whole().reshape(place.shape))


def _stack(parts: Mapping[_Place, WeightChange]) -> WeightChange:
    """The change of our weight from those of its parts; parts that are not there stay as they are."""
    first = next(iter(parts))
    if first.parts == len(parts) == 1:
        return parts[first]
    num_rows = first.shape[0] * first.parts
    rows = {place: slice(place.index * place.shape[0], (place.index + 1) * place.shape[0]) for place in parts}
    if any(change.down is None for change in parts.values()):
        whole = torch.zeros(num_rows, *first.shape[1:])
        for place, change in parts.items():
            whole[rows[place]] += change.whole()
        return WeightChange(whole)
    downs = [change.down for change in parts.values() if change.down is not None]
    up, column = torch.zeros(num_rows, sum(map(len, downs))), 0
    for place, change in parts.items():
        up[rows[place], column : column + change.up.shape[1]] = change.up
        column += change.up.shape[1]
    return WeightChange(up, torch.cat(downs))
