"""Which models a stage used: where they lie, and what tells one version from another."""

import hashlib
from pathlib import Path

import torch

from sana_model.checkpoint_files import resolve

HASHED = (".safetensors", ".json", ".jinja", ".model", ".txt")


def local_model(path: str) -> str:
    """What transformers' `from_pretrained` takes: a hub id as it is, anything else fetched to a local folder.

    `path` is a local folder, a hub id (owner/name), or a zoo://, hf:// or fsspec URI.
    """
    if "://" in path or Path(path).exists():
        return str(resolve(path))
    return path


def pick_device(device: str | None) -> torch.device:
    """The configured device; unless there is one, the first GPU that Ray gave this actor, or else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def model_version(path: str, revision: str | None = None) -> str:
    """A hub revision, or a hash of the files of a folder: differs whenever the weights, tokenizer or settings do."""
    if "://" not in path and not Path(path).exists():
        return f"{path}@{revision or 'main'}"
    folder = resolve(path)
    if folder.parent.name == "snapshots":  # of the hub's cache
        return folder.name
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in HASHED):
        digest.update(f"{file.relative_to(folder)}\\0".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:32]}"
