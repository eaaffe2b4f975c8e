"""What lies at a source of images: a folder of them, WebDataset tars or Parquet files, on any fsspec URI."""

import os
from dataclasses import dataclass
from posixpath import splitext
from typing import Literal

import fsspec
from fsspec import AbstractFileSystem

from pipelines.images import EXTENSIONS
from pipelines.tables import absolute_uri

Kind = Literal["folder", "webdataset", "parquet"]
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "folder": EXTENSIONS,
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
}
SIDECARS = (".txt", ".json")
"""What may lie beside an image under the same stem: its caption, and what else is known."""

ACCEPTED = "a folder of images (jpg, png, webp, ...), WebDataset tars or Parquet files with an image column, or one such file"


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
        image_column, caption_column: of Parquet files; None: found by their names.
    """

    root: str
    name: str | None
    kind: Kind
    image_column: str | None = None
    caption_column: str | None = None

    @property
    def uri(self) -> str:
        return self.uri_of(self.name) if self.name else self.root

    def uri_of(self, path: str) -> str:
        return f"{self.root}/{path}"

    def open(self) -> tuple[AbstractFileSystem, str]:
        """The file system, and the root's path on it."""
        filesystem, root = fsspec.url_to_fs(self.root)
        return filesystem, root.rstrip("/")


def find_source(
    uri: str,
    kind: Kind | Literal["auto"],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    exclude: str | None = None,
) -> Source:
    """The source at a path or URI; "auto" tells its kind by the files there. What lies under the URI `exclude` is not seen.

    Raises:
        ValueError: "auto", and there are files of no kind or of several.
    """
    root, name = absolute_uri(os.path.expanduser(uri)), None
    filesystem, path = fsspec.url_to_fs(root)
    if path.lower().endswith(sum(ENDINGS.values(), ())) and not filesystem.isdir(path):
        root, _, name = root.rpartition("/")
    if kind == "auto":
        kind = _tell_kind(_list_files(Source(root, name, "folder"), exclude), uri)
    return Source(root, name, kind, image_column, caption_column)


def list_parts(source: Source, exclude: str | None = None) -> list[Part]:
    """All files of the source's kind, whole and sorted by path; not hidden ones, nor what lies under the URI `exclude`."""
    files = _list_files(source, exclude)
    parts = []
    for path in sorted(files):
        if path.lower().endswith(ENDINGS[source.kind]):
            beside = [splitext(path)[0] + ending for ending in SIDECARS] if source.kind == "folder" else []
            parts.append(Part(path, files[path], tuple(sidecar for sidecar in beside if sidecar in files)))
    return parts


def _tell_kind(files: dict[str, int], uri: str) -> Kind:
    found = {kind: sum(path.lower().endswith(endings) for path in files) for kind, endings in ENDINGS.items()}
    kinds = [kind for kind, count in found.items() if count]
    if not kinds:
        raise ValueError(f"source={uri!r} holds nothing to ingest ({len(files)} files of other kinds): give {ACCEPTED}")
    if len(kinds) > 1:
        counts = ", ".join(f"{found[kind]} for {kind!r}" for kind in kinds)
        raise ValueError(f"source={uri!r} holds files of several kinds ({counts}): say which to take with source_kind")
    return kinds[0]


def _list_files(source: Source, exclude: str | None) -> dict[str, int]:
    """Relative path and size of every file that is not hidden."""
    filesystem, root = source.open()
    filesystem.invalidate_cache()
    if source.name is None:
        found = filesystem.find(root, detail=True)
    else:
        path = f"{root}/{source.name}"
        found = {path: filesystem.info(path)} if filesystem.exists(path) else {}
    excluded = fsspec.url_to_fs(exclude)[1].rstrip("/") + "/" if exclude else None
    if excluded and f"{root}/".startswith(excluded):  # a folder inside the dataset, given by name, is meant
        excluded = None
    files = {}
    for path, info in found.items():
        relative = path.removeprefix(f"{root}/")
        hidden = any(name.startswith(".") for name in relative.split("/"))
        if not hidden and not (excluded and path.startswith(excluded)):
            files[relative] = info["size"] or 0
    return files
