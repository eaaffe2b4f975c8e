"""Read and write the files of a checkpoint: tensors (safetensors, torch.save) and JSON.

Reading never runs code that a file holds. A file that is written appears whole or not at all.
"""

import json
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_model.files.atomic import write_atomically
from sana_model.files.inside import check_inside
from sana_model.files.json_files import find_stand_in, parse_json, read_json

# What a weights file's name begins with: ours, transformers' and efficientvit's; diffusers'.
WEIGHT_STEMS = ("model", "diffusion_pytorch_model")

CONFIG_ENTRY = "sana_config"
"""A weights file that we write holds the model's configuration under this name: beside `state_dict`, or in the header."""
MOST_TENSORS = 100_000
"""In one file; the largest language models have as many in all their files together."""


def read_safetensors_folder(folder: Path, *, variant: str | None = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read all tensors of a folder: from one file, or from shards with their index; of which variant, `find_variant` says.

    Raises as `find_variant`, and ValueError if a file is damaged or a shard is missing.
    """
    chosen = _find_variants(folder)[find_variant(folder, variant=variant, dtype=dtype) or ""]
    if chosen.suffix == ".safetensors":
        return read_safetensors(chosen)
    shards = _shards_of(chosen)
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{chosen} names shards that are not there: {', '.join(missing)}")
    return {name: tensor for shard in shards for name, tensor in read_safetensors(folder / shard).items()}


def _shards_of(index: Path) -> list[str]:
    """Names of the files that an index names. Raises ValueError if it is none, or names files outside its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} is no index of shards: its weight_map must give a file's name for each tensor")
    try:
        return sorted({check_inside(name) for name in weight_map.values()})
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from error


VARIANT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
"""The variants that people publish, and the dtypes of their weights."""


def find_variant(folder: Path, *, variant: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Find which variant ("bf16") of a folder's weights to read; None: the plain one (`model.safetensors`).

    Args:
        variant: the one that is asked for; the plain one is taken where a folder holds nothing else.
        dtype: that the weights will have; if nothing is asked for and there is no plain one, it chooses among several variants.

    Raises FileNotFoundError if there is no safetensors file, ValueError if the variant that is asked for is not there, or if
    nothing says which of several variants to take.
    """
    variants = _find_variants(folder)
    if not variants:
        raise FileNotFoundError(f"{folder} holds no .safetensors file")
    if variant in variants:
        return variant
    if variant is not None and set(variants) != {""}:
        raise ValueError(f"{folder} holds no variant {variant!r}; it holds {_name_variants(variants)}")
    if "" in variants:
        return None
    fitting = [name for name in variants if VARIANT_DTYPES.get(name, 0) is dtype]
    if len(variants) > 1 and len(fitting) != 1:
        raise ValueError(
            f"{folder} holds {_name_variants(variants)} and no plain file: say which to take, by variant= or dtype="
        )
    return (fitting if len(variants) > 1 else list(variants))[0]


def _name_variants(variants: Iterable[str]) -> str:
    return "the variants " + ", ".join(sorted(name or "(plain)" for name in variants))


def _find_variants(folder: Path) -> dict[str, Path]:
    """Index or single weights file by variant; "" is the plain one. diffusers' names count only if there are no others."""
    for stem in WEIGHT_STEMS:
        files = [path for path in folder.glob(f"{stem}.*") if "-of-" not in path.name]
        singles = {_variant(path.name): path for path in files if path.suffix == ".safetensors"}
        indexes = {_variant(path.name): path for path in files if ".safetensors.index" in path.name}
        if singles or indexes:
            return indexes | singles
    return {}


def _variant(name: str) -> str:
    """Variant in a name: "bf16" in `model.bf16.safetensors` and `model.safetensors.index.bf16.json`, "" in a plain name."""
    words = name.removesuffix(".json").removesuffix(".safetensors").split(".")[1:]
    return next((word for word in words if word not in ("safetensors", "index")), "")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of one file. Raises ValueError that names the file if it is damaged or incomplete."""
    check_count(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        if stand_in := find_stand_in(path):
            raise ValueError(f"{path} is {stand_in}") from error
        raise ValueError(f"{path} cannot be read ({error}): the file is damaged or incomplete, fetch it again") from error


def check_count(path: Path) -> None:
    """Raise ValueError if a safetensors file holds more tensors than any model, which would take minutes to read one by one.

    A file that is damaged passes: who reads it says so.
    """
    try:
        with safe_open(path, "pt") as file:
            count = len(file.keys())
    except (SafetensorError, OSError):
        return
    if count > MOST_TENSORS:
        raise ValueError(f"{path} holds {count} tensors, more than any model has ({MOST_TENSORS})")


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """Read a state dict, see `read_model_file`."""
    return read_model_file(path)[0]


def read_model_file(path: Path, *, use_ema: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict from a safetensors file or a file of torch.save; the first bytes tell which it is.

    Returns it with the configuration that we wrote into the file; {} if there is none.

    Args:
        use_ema: take `state_dict_ema` of a file of torch.save.

    Raises ValueError that names the file if it is damaged, holds anything but tensors, or has no EMA that was asked for.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or start[:1] == b"\x80":
        return _read_pth(path, is_zip=start == b"PK", use_ema=use_ema)
    if use_ema:
        raise ValueError(f"{path} holds no state_dict_ema: a safetensors file has one set of weights")
    state = read_safetensors(path)
    with safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get(CONFIG_ENTRY)
    return state, parse_json(told, path) if told else {}


def _read_pth(path: Path, *, is_zip: bool, use_ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the state dict of an NVlabs `.pth`: its entry `state_dict` (or `state_dict_ema`), or the whole file without one.

    Reads with `weights_only=True`, which refuses a pickle that would run code; besides tensors and plain values it may hold
    numpy arrays, as the `rng_state` of NVlabs' training does. Raises ValueError as `read_model_file` does.
    """
    try:
        with torch.serialization.safe_globals(PLAIN_ARRAYS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)  # only a zip can be mapped
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: {_found_in_pickle(path, error)}") from None
    except (RuntimeError, EOFError, OSError, UnicodeDecodeError, struct.error, LookupError) as error:
        raise ValueError(f"{path} cannot be read ({error}): the file is damaged or incomplete") from error
    key = "state_dict_ema" if use_ema else "state_dict"
    if use_ema and (not isinstance(content, dict) or key not in content):
        raise ValueError(f"{path} holds no {key}")
    state = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    not_tensors = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise ValueError(f"{path}: these entries are not tensors: {', '.join(not_tensors[:5])}")
    for name, value in state.items():
        if not isinstance(name, str) or value.is_meta or value.layout is not torch.strided:
            kind = "on the device meta, without values" if value.is_meta else f"{value.layout}"
            raise ValueError(f"{path}: {name!r} must be the name of a plain tensor, and its tensor is {kind}")
    told = content.get(CONFIG_ENTRY) if isinstance(content, dict) else None
    return state, told if isinstance(told, dict) else {}


PLAIN_ARRAYS: list[Any] = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
"""What a pickle of a numeric numpy array names, in numpy 1 and 2. None of it runs anything that the file chooses."""


def _found_in_pickle(path: Path, error: pickle.UnpicklingError) -> str:
    """What torch did not accept in a file, in one line; torch's own message advises to accept it."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    name = named.group(1) if named else _first_global(path)
    if name is None:
        return "it is damaged, or it is no file of tensors"
    shown = name.encode("unicode_escape").decode()[:80]
    return f"it asks for {shown}, which could run code; only tensors, numbers, texts and arrays of numbers are read from it"


def _first_global(path: Path) -> str | None:
    """The first function or class that a file asks for and torch does not know, without running it; None if there is none."""
    if zipfile.is_zipfile(path):
        try:
            with torch.serialization.safe_globals(PLAIN_ARRAYS):
                return next(iter(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))), None)
        except (pickle.UnpicklingError, RuntimeError, LookupError, ValueError):  # damaged
            return None
    texts: list[str] = []
    with path.open("rb") as file:
        try:
            for operation, argument, _ in pickletools.genops(file):
                if operation.name == "GLOBAL":
                    return str(argument).replace(" ", ".")
                if operation.name == "STACK_GLOBAL":
                    return ".".join(texts[-2:])
                if isinstance(argument, str):
                    texts.append(argument)
        except ValueError:  # no pickle from here on
            pass
    return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object. The file appears whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def write_safetensors(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, from any device, and texts for the file's header. The file appears whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})}))
