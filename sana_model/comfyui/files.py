"""Where ComfyUI keeps models: what its users can choose, and where a choice lies.

ComfyUI's own modules exist only in its process, so the functions here import them when they are called.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from sana_model.zoo.published import BY_SHORT

OWN = "own"
"""Choice for a part that is to be the one that the checkpoint names."""
TINY = "zoo://pipeline"
"""The pipeline that comes with the package, which draws shapes in seconds on any machine."""
WEIGHTS = (".pth", ".safetensors")
INDEXES = ("pipeline.json", "model_index.json")
CHECKPOINTS, DIFFUSERS, SANA = "checkpoints", "diffusers", "sana"
"""Names of ComfyUI's folders of models. `SANA` is the one that other Sana nodes add too: models/sana."""
DIFFUSION_MODELS, VAE, TEXT_ENCODERS, LORAS, CONTROLNETS = "diffusion_models", "vae", "text_encoders", "loras", "controlnet"


def list_checkpoints() -> list[str]:
    """The pipelines and transformers that can be loaded: the shipped one, folders, weights files, and published names."""
    folders = list_folders((SANA, DIFFUSERS, CHECKPOINTS), INDEXES)
    return _each_once([TINY, *folders, *list_files((SANA, CHECKPOINTS, DIFFUSION_MODELS)), *BY_SHORT])


def find_checkpoint(name: str) -> str:
    """The path of a choice of `list_checkpoints`; the shipped one and published names stand for themselves."""
    found = find_model(name, (SANA, DIFFUSERS, CHECKPOINTS, DIFFUSION_MODELS))
    return str(found) if found is not None else name


def list_controlnets() -> list[str]:
    return _each_once([*list_folders((CONTROLNETS,), ["config.json"]), *list_files((CONTROLNETS, CHECKPOINTS))])


def list_loras() -> list[str]:
    return list_files((LORAS,))


def list_autoencoders() -> list[str]:
    return _each_once([OWN, *list_folders((VAE,), ["config.json"]), *list_files((VAE,))])


def list_text_encoders() -> list[str]:
    return [OWN, *list_folders((TEXT_ENCODERS,), ["config.json"])]


def find_part(name: str, kinds: Sequence[str]) -> str | None:
    """The path of a choice from ComfyUI's folders; None for `OWN`. Raises FileNotFoundError if it is gone."""
    if name == OWN:
        return None
    found = find_model(name, kinds)
    if found is None:
        raise FileNotFoundError(f"{name!r} is in none of ComfyUI's folders {', '.join(kinds)}: press R to reload the lists")
    return str(found)


def list_files(kinds: Sequence[str]) -> list[str]:
    """The weights files in ComfyUI's folders of these names, as their paths below them."""
    import folder_paths

    return _each_once(
        name for kind in _known(kinds) for name in folder_paths.get_filename_list(kind) if name.lower().endswith(WEIGHTS)
    )


def list_folders(kinds: Sequence[str], indexes: Sequence[str]) -> list[str]:
    """The folders that hold one of the files `indexes`, as their paths below ComfyUI's folders. Parts of a pipeline are not
    listed."""
    found = []
    for root in _roots(kinds):
        queue = [folder for folder in sorted(root.iterdir()) if folder.is_dir()] if root.is_dir() else []
        while queue:
            folder = queue.pop(0)
            if any((folder / index).is_file() for index in indexes):
                found.append(folder.relative_to(root).as_posix())
            else:
                queue += [inner for inner in sorted(folder.iterdir()) if inner.is_dir() and inner.name != ".git"]
    return _each_once(found)


def find_model(name: str, kinds: Sequence[str]) -> Path | None:
    """The file or folder of this name below the first of ComfyUI's folders that has it."""
    return next((root / name for root in _roots(kinds) if (root / name).exists()), None)


def stamp(path: str | None) -> str:
    """What differs when a file, or a file in a folder, is another: for IS_CHANGED."""
    if path is None or not Path(path).exists():
        return ""
    place = Path(path)
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return str([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _roots(kinds: Sequence[str]) -> list[Path]:
    import folder_paths

    return [Path(root) for kind in _known(kinds) for root in folder_paths.get_folder_paths(kind)]


def _known(kinds: Sequence[str]) -> list[str]:
    """Of these names those that ComfyUI has; `SANA` is added to them here."""
    import folder_paths

    if SANA in kinds:
        folder_paths.add_model_folder_path(SANA, str(Path(folder_paths.models_dir) / SANA))
    return [kind for kind in kinds if kind in folder_paths.folder_names_and_paths]


def _each_once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
