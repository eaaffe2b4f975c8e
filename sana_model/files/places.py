"""Find checkpoints: at a local path, in the shipped zoo, on the Hugging Face hub, or at any fsspec URI."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock
from fsspec import AbstractFileSystem
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from tqdm import tqdm

from sana_model.files.filesystems import open_filesystem
from sana_model.files.inside import check_inside, path_inside
from sana_model.files.redact import HIDDEN, redact
from sana_model.files.retry import call_patiently
from sana_model.zoo.published import find_published, name_near

ZOO_DIR = Path(__file__).parents[1] / "zoo"
CACHE_DIR = Path(os.environ.get("SANA_CACHE", Path.home() / ".cache" / "sana_model"))  # of files copied from fsspec URIs
UNWANTED = ["*.bin", "*.onnx", "*.msgpack", "*.h5", "*.ckpt"]  # weights in formats that nothing here reads


def resolve(path: str | Path) -> Path:
    """Return a local path for `path`, after downloading if it is remote.

    Args:
        path: a local path; or the short name of a published model ("sana-1.6b-1024"); or `zoo://name`, a tiny checkpoint that
            comes with this package (`sana_model/zoo`); or `hf://owner/name[@revision][/folder]` on the Hugging Face hub
            (write %2F for a slash inside a revision); or any other fsspec URI, which is copied to a cache.

    Raises FileNotFoundError if nothing is there, ConnectionError if the hub cannot be reached, ValueError if an hf:// address
    names no repository, or if a name there leads out of its folder.
    """
    text = str(path)
    if "://" not in text:
        if (published := published_address(text)) is not None:
            return resolve(published)
        if not (local := Path(text).expanduser()).exists():
            raise FileNotFoundError(
                f"no file or folder {text!r}; a model on the Hugging Face hub is written hf://owner/name{name_near(text)}"
            )
        return local
    protocol, _, rest = text.partition("://")
    if protocol == "file":
        return resolve(rest)
    if protocol == "zoo":
        return _from_zoo(rest)
    return _from_hub(rest) if protocol == "hf" else _from_uri(text)


def published_address(path: str) -> str | None:
    """The hf:// address of a published model that is given by its short name ("sana-1.6b-1024"); None if it is none.

    A file or folder of that name comes first.
    """
    published = None if "://" in path or Path(path).exists() else find_published(path)
    return f"hf://{published.id}" if published is not None and path == published.short else None


def _from_zoo(name: str) -> Path:
    path = ZOO_DIR / check_inside(name)
    if not path.exists():
        known = ", ".join(sorted(folder.name for folder in ZOO_DIR.iterdir() if folder.is_dir() and folder.name[0] not in "._"))
        raise FileNotFoundError(f"the zoo holds no {name!r}; it holds {known}")
    return path


def _from_hub(address: str) -> Path:
    owner, _, rest = address.strip("/").partition("/")
    name, _, folder = rest.partition("/")
    if not name:
        raise ValueError(f"hf://{address} names no repository: write hf://owner/name[@revision][/folder]")
    name, _, revision = name.partition("@")
    known = find_published(f"{owner}/{name}")
    if known is not None and known.id == f"{owner}/{name}" and known.kind == "not read":
        raise ValueError(f"hf://{address} is not read here: {known.note}")
    if folder:
        check_inside(folder)
    try:
        snapshot = snapshot_download(
            f"{owner}/{name}",
            revision=unquote(revision) or None,
            allow_patterns=[folder, f"{folder}/*"] if folder else None,
            ignore_patterns=UNWANTED,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(f"the Hugging Face hub has no hf://{address}, or it needs HF_TOKEN") from error
    except LocalEntryNotFoundError as error:  # a FileNotFoundError, though nothing is known about the files
        raise ConnectionError(
            f"the Hugging Face hub cannot be reached, and the cache does not hold hf://{address}: fetch it "
            "where there is a network, and give its local path"
        ) from error
    if not Path(snapshot, folder).exists():
        raise FileNotFoundError(f"hf://{owner}/{name} holds no {folder!r}")
    return Path(snapshot, folder)


def _from_uri(uri: str) -> Path:
    """Copy the files below `uri` to the cache, in a folder named by their names, sizes and times, so that a change is seen.

    Of several processes of a host one copies, and the others wait for it.
    """
    if f"{HIDDEN}@" in uri:
        raise ValueError(f"the password of {uri} was hidden when it was written down: give the whole address again")
    filesystem, root = open_filesystem(uri)
    found = [
        name
        for name in call_patiently(lambda: filesystem.find(root), f"list {uri}")
        if not name.endswith("/")  # an object store's mark of a folder
    ]
    if not found:
        unsure = ", or it cannot be reached from here" if uri.startswith(("http://", "https://")) else ""
        raise FileNotFoundError(f"nothing at {redact(uri)!r}{unsure}")
    try:
        relative = {name: check_inside(_relative(name, root)) for name in found}
    except ValueError as error:
        raise ValueError(f"{redact(uri)} cannot be copied to this machine: {error}") from error
    stamps = sorted((name, *_stamp(call_patiently(partial(filesystem.info, name), f"read {name}"))) for name in found)
    key = hashlib.sha256(repr((uri, stamps)).encode()).hexdigest()[:24]
    is_file = call_patiently(lambda: filesystem.isfile(root), f"read {uri}")
    target = CACHE_DIR / key
    CACHE_DIR.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE_DIR / f"{key}.lock"):
        if not (target.exists() and all(changed for _, _, changed in stamps)):
            _fetch(filesystem, relative, target, uri)
    return target / Path(root).name if is_file else target


def _fetch(filesystem: AbstractFileSystem, files: Mapping[str, str], target: Path, uri: str) -> None:
    """Copy files (each with its path below `target`) to a folder, in place of what is there.

    Raises ValueError if a file has the name of a folder, or leads out of `target`.
    """
    partial_copy = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}."))
    try:
        for name, relative in tqdm(files.items(), desc=f"fetching {redact(uri)}", unit="file", leave=False, disable=None):
            path = path_inside(partial_copy, relative)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise ValueError(f"{redact(uri)} cannot be copied: it holds {name!r} beside a file of that name") from error
            call_patiently(partial(filesystem.get_file, name, str(path)), f"read {name}")
        shutil.rmtree(target, ignore_errors=True)
        partial_copy.rename(target)
    finally:
        shutil.rmtree(partial_copy, ignore_errors=True)


def _relative(name: str, root: str) -> str:
    """The name of a file below `root` (or of `root` itself, a file) as its file system has it, with any ".." that is in it."""
    if name == root:
        return name.rpartition("/")[2]
    if not root:
        return name
    return name.removeprefix(f"{root}/") if name.startswith(f"{root}/") else os.path.relpath(name, root)


def _stamp(info: dict[str, Any]) -> tuple[str, str]:
    """A file's size, and its checksum or time of change, whichever the filesystem gives; "" if it gives none."""
    lower = {name.lower().replace("-", "_"): value for name, value in info.items()}
    tells = ("etag", "content_md5", "mtime", "last_modified", "lastmodified", "updated", "created")
    return str(lower.get("size")), next((str(lower[name]) for name in tells if lower.get(name)), "")


def local_target(path: str | Path) -> Path:
    """Return the path to save to. Raises ValueError for a URI, which as a path would be a local folder named `s3:`."""
    if "://" in str(path):
        raise ValueError(f"save_pretrained writes local files, {str(path)!r} is a URI: save locally, then copy it there")
    return Path(path)
