"""What kind of model lies at a place, by its configuration or the names of its tensors. Only reading a `.pth` imports torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from sana_model.files.json_files import read_json

GUIDANCE_EMBEDDERS = ("cfg_embedder.", "guidance_embedder.", "time_embed.guidance_1.")
"""Parts of tensors' names, in NVlabs' layout, diffusers' and ours, that only Sana-Sprint has."""


def is_sprint(place: Path) -> bool:
    """Whether the transformer of a local folder or weights file takes the guidance scale as an input, as Sana-Sprint does.

    What cannot be read is taken as none: loading it says what is wrong.
    """
    folder = next((place / name for name in ("transformer", "") if (place / name / "config.json").is_file()), None)
    try:
        if folder is not None:
            return bool(read_json(folder / "config.json").get("guidance_embeds"))
        return any(part in name for name in _names_of_tensors(place) for part in GUIDANCE_EMBEDDERS)
    except (OSError, ValueError):
        return False


def _names_of_tensors(place: Path) -> list[str]:
    """The names of the tensors in a weights file, or in a folder's. Raises ValueError or OSError if it cannot be read."""
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if files and files[0].suffix == ".safetensors":
        try:
            with safe_open(files[0], "np") as file:
                return list(file.keys())
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    from sana_model.files.checkpoint import find_pth  # they load torch
    from sana_model.files.tensors import read_weights_file

    file = place if place.is_file() else find_pth(place)
    return [] if file is None else list(read_weights_file(file))
