"""Which models a stage used: where they lie, and what tells one version from another."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import ray
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name

from sana_model.files.places import resolve

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
NOT_HASHED = (".lock", ".md", ".gitattributes", ".gitignore")

Config = TypeVar("Config")


def is_hub_id(path: str) -> bool:
    """Whether a model's path is an id of the Hugging Face hub (owner/name) rather than a place. Raises FileNotFoundError."""
    if "://" in path or Path(path).exists():
        return False
    if not HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"no file or folder {path!r}, and no id of the Hugging Face hub either: that is owner/name")
    return True


def local_model(path: str) -> str:
    """What transformers' `from_pretrained` takes: a hub id as it is, anything else fetched to a local folder.

    `path` is a local folder, a hub id (owner/name), or a zoo://, hf:// or fsspec URI.
    """
    return path if is_hub_id(path) else str(resolve(path))


def pick_device(device: str | None) -> torch.device:
    """The configured device; unless there is one, the first GPU that Ray gave this actor, or else the CPU.

    Ray does not hide the GPUs of a node from who reserved none: they belong to others.
    """
    if device is not None:
        return torch.device(device)
    in_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
    given = not in_actor or bool(ray.get_gpu_ids())
    return torch.device("cuda" if given and torch.cuda.is_available() else "cpu")


def model_version(path: str, revision: str | None = None) -> str:
    """A hub id's commit, or a hash of a file or a folder's files: differs whenever weights, code, tokenizer or settings do.

    Raises FileNotFoundError if there is no such model, ValueError if the hub does not tell the commit.
    """
    if is_hub_id(path):
        return f"{path}@{hub_commit(path, revision)}"
    place = resolve(path)
    if place.parent.name == "snapshots":  # of the hub's cache
        return place.name
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else _files_of(place):
        digest.update(f"{file.relative_to(place)}\\0".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:32]}"


def _files_of(folder: Path) -> list[Path]:
    """Sorted; without notes for people, and what caches and version control keep there."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix not in NOT_HASHED)
    hidden = ("__pycache__", ".git", ".cache")
    return sorted(file for file in files if not set(file.relative_to(folder).parts) & set(hidden))


def pinned(config: Config) -> Config:
    """A stage's configuration with the commit that its model's revision means now, which all actors then load.

    `config` has fields `model` and `revision`. Raises as `model_version`.
    """
    settings: Any = config
    if not is_hub_id(settings.model):
        return config
    pinned_config: Config = replace(settings, revision=hub_commit(settings.model, settings.revision))
    return pinned_config


def hub_commit(model: str, revision: str | None) -> str:
    """The commit that a revision (None: "main") of a hub id means; where the hub cannot be asked, that of the local cache.

    Raises ValueError if neither tells it.
    """
    revision = revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = HfApi().model_info(model, revision=revision, timeout=30).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(f"the Hugging Face hub has no {model!r} with revision {revision!r}, or it needs HF_TOKEN") from error
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        ref = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=model, repo_type="model"), "refs", revision)
        if not ref.exists():
            raise ValueError(
                f"the Hugging Face hub cannot be asked which commit of {model!r} is {revision!r} ({error}), and the local "
                "cache does not hold it: set the revision to a commit, or the model to a local folder"
            ) from error
        commit = ref.read_text().strip()
    return str(commit)
