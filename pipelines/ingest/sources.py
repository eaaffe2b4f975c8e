"""Finds the files of a source at any fsspec URI: a folder of images, WebDataset tars, Parquet files, or lists of URLs."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from posixpath import dirname, splitext
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.config import CAPTION_KEYS, MAX_SHARD_BYTES, DownloadConfig, Kind
from pipelines.ingest.names import resolve
from pipelines.storage.files import find_files, open_file
from pipelines.storage.retry import call
from pipelines.tables.table import absolute_uri
from pipelines.workers.images import EXTENSIONS, ImageLimits
from sana_model.files.filesystems import open_filesystem

TEXT_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson")
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "folder": EXTENSIONS,
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
    "list": (*TEXT_LISTS, ".parquet"),
}
SIDECARS = (".txt", ".json")
"""Files that may lie beside an image, with the same stem: its caption, and other metadata."""
IMAGE_COLUMNS = ("image", "image_bytes", "jpg", "jpeg", "png", "webp", "img", "bytes")
URL_COLUMNS = ("url", "image_url", "uri", "key", "file_name", "path")
ACCEPTED = (
    "a folder of images (jpg, png, webp, ...), of WebDataset tars, of Parquet files with an image column, or of lists "
    "(csv, tsv, jsonl, parquet) with a column of URLs or keys, or one such file"
)


@dataclass(frozen=True)
class Part:
    """The samples from `start` to `stop` (None: to the end) of a file. Paths are relative to the source's root."""

    path: str
    size: int
    """Bytes of the whole file."""
    sidecars: tuple[str, ...] = ()
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Source:
    """Where the images are, and in which kind of files.

    Args:
        root: URI of the folder.
        name: name of the only file, if the source is a file in `root`.
        image_column, caption_column, url_column: columns of Parquet files and lists; None: found by usual names.
        caption_keys: the usual names of captions, in columns and in JSON files.
        base_uri: the folder to which the keys of a list, and the paths that Parquet rows hold instead of bytes, are relative;
            None: the folder of the file that holds them.
        copies_uri: where lists are copied to.
        max_bytes: size of the largest image that is read.
        max_shard_bytes: of images that are read for one shard, all together.
    """

    root: str
    name: str | None
    kind: Kind
    image_column: str | None = None
    caption_column: str | None = None
    caption_keys: tuple[str, ...] = CAPTION_KEYS
    url_column: str | None = None
    base_uri: str | None = None
    copies_uri: str = ""
    max_bytes: int = ImageLimits().max_bytes
    max_shard_bytes: int = MAX_SHARD_BYTES
    download: DownloadConfig = field(default_factory=DownloadConfig)

    @property
    def uri(self) -> str:
        return self.uri_of(self.name) if self.name else self.root

    def uri_of(self, path: str) -> str:
        return f"{self.root}/{path}"

    def resolve(self, path: str, key: str) -> str:
        """The URI of a key that the file `path` holds."""
        return resolve(key, self.base_uri.rstrip("/") if self.base_uri else dirname(self.uri_of(path)))

    def open_folders(self, path: str) -> list[str]:
        """URIs of the folders in which the file `path` may name any file."""
        return [dirname(self.uri_of(path)), *([self.base_uri.rstrip("/")] if self.base_uri else [])]


def find_source(
    uri: str,
    kind: Kind | Literal["auto"],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    caption_keys: tuple[str, ...] = CAPTION_KEYS,
    url_column: str | None = None,
    base_uri: str | None = None,
    copies_uri: str = "",
    max_bytes: int = ImageLimits().max_bytes,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    download: DownloadConfig | None = None,
    exclude: str | None = None,
) -> Source:
    """Find the source at a path or URI. Kind "auto" is decided by the files there. Files below the URI `exclude` are ignored.

    Raises:
        ValueError: the kind is "auto", and there are files of no kind or of several.
        StorageError: the storage does not answer.
    """
    root, name = absolute_uri(os.path.expanduser(uri)), None
    filesystem, path = open_filesystem(root)
    is_named_as_file = path.lower().endswith(sum(ENDINGS.values(), ()))
    if is_named_as_file and not call(lambda: filesystem.isdir(path), "read", uri):
        root, _, name = root.rpartition("/")
    if kind == "auto":
        kind = _tell_kind(root, _list_files(root, name, exclude), uri, url_column)
    base_uri = absolute_uri(os.path.expanduser(base_uri)) if base_uri else None
    return Source(
        root,
        name,
        kind,
        image_column=image_column,
        caption_column=caption_column,
        caption_keys=caption_keys,
        url_column=url_column,
        base_uri=base_uri,
        copies_uri=copies_uri,
        max_bytes=max_bytes,
        max_shard_bytes=max_shard_bytes,
        download=download or DownloadConfig(),
    )


def list_parts(source: Source, exclude: str | None = None) -> list[Part]:
    """List the files of the source's kind, sorted by path, without hidden files and files below the URI `exclude`."""
    files = _list_files(source.root, source.name, exclude)
    parts = []
    for path in sorted(files):
        if path.lower().endswith(ENDINGS[source.kind]):
            beside = [splitext(path)[0] + ending for ending in SIDECARS] if source.kind == "folder" else []
            parts.append(Part(path, files[path], tuple(sidecar for sidecar in beside if sidecar in files)))
    return parts


def find_column(
    schema: pa.Schema, given: str | None, names: tuple[str, ...], fits: Callable[[pa.DataType], bool]
) -> str | None:
    """Find the given column, or the first of `names` (in any case), whose type `fits`; None if there is none."""
    there = {given: given} if given in schema.names else {name.lower(): name for name in schema.names}
    wanted = [there[name] for name in ((given,) if given else [name.lower() for name in names]) if name in there]
    return next((name for name in wanted if fits(schema.field(name).type)), None)


def _tell_kind(root: str, files: dict[str, int], uri: str, url_column: str | None) -> Kind:
    files = _without_logs(files)
    endings = ENDINGS | {"list": TEXT_LISTS}
    found = {kind: [path for path in files if path.lower().endswith(endings[kind])] for kind in ENDINGS}
    kinds = [kind for kind in ENDINGS if found[kind]]
    if not kinds:
        raise ValueError(f"source={uri!r} holds nothing to ingest ({len(files)} files of other kinds): give {ACCEPTED}")
    if set(kinds) == {"parquet", "list"}:
        return "list"
    if len(kinds) > 1:
        counts = ", ".join(f"{len(found[kind])} for {kind!r}" for kind in kinds)
        raise ValueError(f"source={uri!r} holds files of several kinds ({counts}): say which to take with source_kind")
    if kinds == ["parquet"] and (url_column or _holds_urls(f"{root}/{found['parquet'][0]}")):
        return "list"
    return kinds[0]


def _without_logs(files: dict[str, int]) -> dict[str, int]:
    """Drop the logs of img2dataset: Parquet files beside a tar, or a folder of images, of the same name."""
    folders = {dirname(path) for path in files}

    def is_log(path: str) -> bool:
        stem, ending = splitext(path)
        return ending == ".parquet" and (f"{stem}.tar" in files or stem in folders)

    return {path: size for path, size in files.items() if not is_log(path)}


def _holds_urls(uri: str) -> bool:
    """Whether a Parquet file has a column of URLs and none of images. False if it cannot be read: its reader will say why."""
    try:
        with open_file(uri) as file:
            schema = pq.read_schema(file)
    except (OSError, pa.ArrowException):
        return False
    has_images = find_column(schema, None, IMAGE_COLUMNS, holds_images) is not None
    return not has_images and find_column(schema, None, URL_COLUMNS, holds_text) is not None


def holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as Hugging Face's `datasets` writes images
        kind = kind.field("bytes").type
    return is_binary(kind)


def holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a column of categories, as pandas writes it
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def holds_captions(kind: pa.DataType) -> bool:
    """Whether a column holds a text, or a list of texts, in each row."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return holds_text(kind.value_type) if is_list else holds_text(kind)


def is_binary(kind: pa.DataType) -> bool:
    any_length = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return any_length or pa.types.is_fixed_size_binary(kind)


def _list_files(root: str, name: str | None, exclude: str | None) -> dict[str, int]:
    """Find every file that is not hidden: relative path -> size in bytes."""
    _, path = open_filesystem(root)
    found = find_files(root) if name is None else _find_file(root, name)
    excluded = f"{open_filesystem(exclude)[1]}/" if exclude else None
    if excluded and f"{path}/".startswith(excluded):  # a folder inside the dataset, given by name, is meant
        excluded = None
    return {
        relative: size
        for relative, size in found.items()
        if not any(part.startswith(".") for part in relative.split("/"))
        and not (excluded and f"{path}/{relative}".startswith(excluded))
    }


def _find_file(root: str, name: str) -> dict[str, int]:
    """Find one file: name -> size in bytes; empty if it does not exist."""
    filesystem, path = open_filesystem(f"{root}/{name}")
    try:
        return {name: call(lambda: filesystem.size(path), "read", f"{root}/{name}") or 0}
    except FileNotFoundError:
        return {}
