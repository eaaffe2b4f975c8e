"""Find the models of a stage: where they are, and their versions.

A stage finds each of its models once, in the driver, by `find_model`. The version that it finds goes into the table's identity,
and the configuration that its workers get names that very version: a hub that moves on meanwhile changes nothing.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import repo_folder_name

from sana_model.files.places import published_address, resolve
from sana_model.zoo.published import name_near

if TYPE_CHECKING:
    import torch

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")
"""Ends of a file's name; what has one is no hub id."""
COMMIT = re.compile(r"[0-9a-f]{40}")
NOT_HASHED = (".lock", ".md", ".gitattributes", ".gitignore")


def is_hub_id(path: str) -> bool:
    """Whether a model's path is a hub id (owner/name).

    Raises FileNotFoundError if it is neither that, nor an existing place, nor the short name of a published model.
    """
    if "://" in path or Path(path).exists() or published_address(path) is not None:
        return False
    if not HUB_ID.fullmatch(path) or path.endswith(WEIGHTS):
        raise FileNotFoundError(
            f"no file or folder {path!r}, and no id of the Hugging Face hub either: that is owner/name (short names "
            f"of published models: python -m jobs.zoo published){name_near(path)}"
        )
    return True


@dataclass(frozen=True)
class FoundModel:
    """A model as the driver found it.

    path: as it was configured; an hf:// address has the commit in it. revision: the commit of a hub id. version: differs
    whenever weights, code, tokenizer or settings do; for an `Identity`.
    """

    path: str
    revision: str | None
    version: str

    @property
    def address(self) -> str:
        """Path and revision in one, as `pretrained` takes them."""
        return f"{self.path}@{self.revision}" if self.revision else self.path


def find_model(path: str, revision: str | None = None) -> FoundModel:
    """Find a model: a local file or folder, a hub id (owner/name) with a revision, or a zoo://, hf:// or fsspec URI, or
    the short name of a published model.

    Raises FileNotFoundError if there is no such model, ValueError if the hub does not tell the commit.
    """
    if is_hub_id(path):
        commit = hub_commit(path, revision)
        return FoundModel(path, commit, f"{path}@{commit}")
    return find_place(path)


def find_place(path: str, *, with_version: bool = True) -> FoundModel:
    """Find what is read by `resolve`: as `find_model`, but no hub id without hf://.

    Without `with_version` no file is read; where the place does not tell the version, it is "". Raises as `resolve`.
    """
    pinned, place = locate(path)
    if place.parent.name == "snapshots":  # of the hub's cache
        return FoundModel(pinned, None, place.name)
    return FoundModel(pinned, None, _hash_files(place) if with_version else "")


def locate(path: str) -> tuple[str, Path]:
    """A model's path, with the commit in an hf:// address, and the local place of its files. Raises as `resolve`.

    In place of the short name of a published model stands its hf:// address.
    """
    path = published_address(path) or path
    place = resolve(path)
    return _with_commit(path, place) if path.startswith("hf://") else path, place


def _with_commit(address: str, place: Path) -> str:
    """An hf:// address with the commit that it was found at: its place is .../snapshots/<commit>[/folder]."""
    parts = place.parts
    if "snapshots" not in parts:
        return address
    owner, name, *folder = address.removeprefix("hf://").strip("/").split("/")
    commit = parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1]
    return "/".join([f"hf://{owner}", f"{name.partition('@')[0]}@{commit}", *folder])


def pretrained(address: str, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """The arguments of transformers' `from_pretrained` on this host: a hub id and its revision, or a local folder.

    Anything but a hub id is fetched to a local folder. `address` may also be that of a `FoundModel`.
    """
    name, _, commit = address.partition("@")
    if COMMIT.fullmatch(commit) and HUB_ID.fullmatch(name):
        return name, {"revision": commit}
    if is_hub_id(address):
        return address, {"revision": revision} if revision else {}
    place = resolve(address)
    if place.is_dir():
        from sana_model.files.transformers_folder import check_folder  # it loads torch

        check_folder(place)
    return str(place), {}


def pick_device(device: str | None) -> "torch.device":
    """The configured device; if None, the first GPU that Ray gave this actor or task, or else the CPU.

    Ray does not hide a node's GPUs from an actor or task that reserved none; they belong to others.
    """
    import torch

    if device is not None:
        return torch.device(device)
    ray = sys.modules.get("ray")  # a process that has not imported it is no worker of it
    of_ray = ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    given = ray is None or not of_ray or bool(ray.get_gpu_ids())
    return torch.device("cuda" if given and torch.cuda.is_available() else "cpu")


def model_version(path: str, revision: str | None = None) -> str:
    """The version of a model: `FoundModel.version`. Raises as `find_model`."""
    return find_model(path, revision).version


@contextmanager
def naming(setting: str) -> Iterator[None]:
    """Within, a FileNotFoundError, ConnectionError or ValueError about a model begins with the setting that names it."""
    try:
        yield
    except (FileNotFoundError, ConnectionError, ValueError) as error:
        kind = next(one for one in (FileNotFoundError, ConnectionError, ValueError) if isinstance(error, one))
        raise kind(f"{setting}: {error}") from error


def _hash_files(place: Path) -> str:
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else _files_of(place):
        digest.update(f"{file.relative_to(place)}\\0".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:32]}"


def _files_of(folder: Path) -> list[Path]:
    """The files of a folder, sorted, without notes for people and the files of caches and version control."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix not in NOT_HASHED)
    hidden = ("__pycache__", ".git", ".cache")
    return sorted(file for file in files if not set(file.relative_to(folder).parts) & set(hidden))


def hub_commit(model: str, revision: str | None) -> str:
    """The commit of a revision (None: "main") of a hub id; if the hub cannot be reached, the one in the local cache.

    Raises ValueError if neither knows it.
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
                f"there is no file or folder {model!r} here, and the Hugging Face hub cannot be asked which commit of "
                f"{model!r} is {revision!r} ({error}), nor does the local cache hold it: set the revision to a commit, or the "
                "model to a local folder"
            ) from error
        commit = ref.read_text().strip()
    return str(commit)
