"""What lies at a source of images, on any fsspec URI: a folder of them, WebDataset tars, Parquet files, or lists of URLs."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from posixpath import dirname, splitext
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.config import DownloadConfig, Kind
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
"""What may lie beside an image under the same stem: its caption, and what else is known."""
IMAGE_COLUMNS = ("image", "image_bytes", "jpg", "jpeg", "png", "webp", "img", "bytes")
CAPTION_COLUMNS = ("caption", "text", "txt")
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
    """Of the file, bytes."""
    sidecars: tuple[str, ...] = ()
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Source:
    """Where the images are and how they are kept.

    Args:
        root: URI of the folder.
        name: of the one file in it, where the source is a file.
        image_column, caption_column, url_column: of Parquet files and lists; None: found by their names.
        base_uri: what the keys of a list, and the paths that Parquet rows hold instead of bytes, are relative to; None: the
            folder of the file that holds them.
        copies_uri: where lists are copied to.
        max_bytes: of an image.
    """

    root: str
    name: str | None
    kind: Kind
    image_column: str | None = None
    caption_column: str | None = None
    url_column: str | None = None
    base_uri: str | None = None
    copies_uri: str = ""
    max_bytes: int = ImageLimits().max_bytes
    download: DownloadConfig = field(default_factory=DownloadConfig)

    @property
    def uri(self) -> str:
        return self.uri_of(self.name) if self.name else self.root

    def uri_of(self, path: str) -> str:
        return f"{self.root}/{path}"

    def resolve(self, path: str, key: str) -> str:
        """The URI of a key that the file `path` holds."""
        if "://" in key or key.startswith("/"):
            return key
        return f"{self.base_uri.rstrip('/') if self.base_uri else dirname(self.uri_of(path))}/{key}"


def find_source(
    uri: str,
    kind: Kind | Literal["auto"],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    url_column: str | None = None,
    base_uri: str | None = None,
    copies_uri: str = "",
    max_bytes: int = ImageLimits().max_bytes,
    download: DownloadConfig | None = None,
    exclude: str | None = None,
) -> Source:
    """The source at a path or URI; "auto" tells its kind by the files there. What lies under the URI `exclude` is not seen.

    Raises:
        ValueError: "auto", and there are files of no kind or of several.
    """
    root, name = absolute_uri(os.path.expanduser(uri)), None
    filesystem, path = open_filesystem(root)
    is_named_as_file = path.lower().endswith(sum(ENDINGS.values(), ()))
    if is_named_as_file and not call(lambda: filesystem.isdir(path), "read", uri):
        root, _, name = root.rpartition("/")
    if kind == "auto":
        kind = _tell_kind(root, _list_files(root, name, exclude), uri, url_column)
    base_uri = absolute_uri(os.path.expanduser(base_uri)) if base_uri else None
    columns = {"image_column": image_column, "caption_column": caption_column, "url_column": url_column}
    download = download or DownloadConfig()
    return Source(root, name, kind, **columns, base_uri=base_uri, copies_uri=copies_uri, max_bytes=max_bytes, download=download)


def list_parts(source: Source, exclude: str | None = None) -> list[Part]:
    """All files of the source's kind, whole and sorted by path; not hidden ones, nor what lies under the URI `exclude`."""
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
    """The column that was given, or the first of these names in any case, if it is there and of such a type."""
    there = {given: given} if given in schema.names else {name.lower(): name for name in schema.names}
    wanted = [there[name] for name in ((given,) if given else names) if name in there]
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
    """Without the Parquet files that img2dataset writes beside the tar, or the folder of images, of the same name."""
    folders = {dirname(path) for path in files}

    def is_log(path: str) -> bool:
        stem, ending = splitext(path)
        return ending == ".parquet" and (f"{stem}.tar" in files or stem in folders)

    return {path: size for path, size in files.items() if not is_log(path)}


def _holds_urls(uri: str) -> bool:
    """A Parquet file with a column of URLs and none of images. False for one that cannot be read: its reader will say why."""
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
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _list_files(root: str, name: str | None, exclude: str | None) -> dict[str, int]:
    """Relative path and size of every file that is not hidden."""
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
    """Name and size of one file; empty if it is not there."""
    filesystem, path = open_filesystem(f"{root}/{name}")
    try:
        return {name: call(lambda: filesystem.size(path), "read", f"{root}/{name}") or 0}
    except FileNotFoundError:
        return {}
