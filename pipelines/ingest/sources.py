"""Finds the files of a source at any fsspec URI: a folder of images, WebDataset tars, Parquet files, or lists of URLs."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from posixpath import dirname, splitext
from typing import Literal

import pyarrow as pa

from pipelines.ingest.columns import IMAGE_COLUMNS, URL_COLUMNS, find_column, holds_captions, holds_images
from pipelines.ingest.config import CAPTION_KEYS, MAX_SHARD_BYTES, MAX_TEXT_BYTES, DownloadConfig, Kind
from pipelines.ingest.image_names import HEAD_BYTES, has_no_ending, looks_like_image, split_image, without_query
from pipelines.ingest.listing import Listing, list_files
from pipelines.ingest.names import resolve
from pipelines.ingest.not_taken import LONE_SIDE_FILE, SECOND_SIDE_FILE, kind_of_ending
from pipelines.ingest.parquet_rows import TableFile
from pipelines.ingest.sidecars import SIDECARS, split_sidecar
from pipelines.storage.files import NUM_THREADS, is_local, list_folder, open_file
from pipelines.storage.retry import call
from pipelines.tables.table import absolute_uri
from pipelines.workers.images import EXTENSIONS, ImageLimits
from sana_model.files.filesystems import open_filesystem

TEXT_LISTS = (".csv", ".tsv", ".jsonl", ".ndjson")
ENDINGS: dict[Kind, tuple[str, ...]] = {
    "folder": EXTENSIONS,
    "webdataset": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz"),
    "parquet": (".parquet",),
    "list": (*TEXT_LISTS, ".parquet"),
}
MAX_UNNAMED = 100  # files without an ending that are looked into, to find out what a source is
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
        max_text_bytes: of a side file, and of the caption, the URL and the metadata in a row.
        text_encoding: of captions that are no UTF-8; None: only those count whose encoding is certain.
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
    max_text_bytes: int = MAX_TEXT_BYTES
    text_encoding: str | None = None
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
    max_text_bytes: int = MAX_TEXT_BYTES,
    text_encoding: str | None = None,
    download: DownloadConfig | None = None,
    exclude: str | None = None,
) -> Source:
    """Find the source at a path or URI. Kind "auto" is decided by the files there. Files below the URI `exclude` are ignored.

    Raises:
        ValueError: the kind is "auto", and there are files of no kind or of several.
        StorageError: the storage does not answer.
    """
    root, name = _split_source(uri)
    if kind == "auto":
        kind = _tell_kind(root, name, exclude, uri, url_column)
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
        max_text_bytes=max_text_bytes,
        text_encoding=text_encoding,
        download=download or DownloadConfig(),
    )


def list_parts(source: Source, exclude: str | None = None) -> list[Part]:
    """The files of the source's kind, sorted by path. As `find_parts`."""
    return find_parts(source, exclude)[0]


def find_parts(
    source: Source, exclude: str | None = None, known: AbstractSet[str] = frozenset()
) -> tuple[list[Part], Counter[str]]:
    """The files of the source's kind, sorted by path, and how many other files are there, by kind.

    A file whose name has no ending counts as an image if it begins like one.

    Args:
        exclude: URI of a folder in which nothing is looked for.
        known: paths of images of earlier plans: they need not be looked into.
    """
    listing = list_files(source.root, source.name, exclude)
    chosen = {path for path in listing.files if path == source.name or _is_of_kind(path, ENDINGS[source.kind])}
    beside: dict[str, tuple[str, ...]] = {}
    if source.kind == "folder":
        unnamed = [path for path in listing.files if path not in chosen and has_no_ending(path)]
        chosen |= known & set(unnamed)
        chosen |= _find_unnamed_images(source.root, [path for path in unnamed if path not in chosen])
        beside = _find_sidecars(chosen, listing)
    taken = chosen.union(*beside.values())
    listing.not_taken.update(kind_of_ending(path) for path in listing.files if path not in taken)
    return [Part(path, listing.files[path], beside.get(path, ())) for path in sorted(chosen)], +listing.not_taken


def explain_nothing(uri: str, not_taken: Mapping[str, int]) -> str:
    """Why nothing can be ingested from a source, for people."""
    root = absolute_uri(os.path.expanduser(uri))
    filesystem, path = open_filesystem(root)
    there = os.path.lexists(path) if is_local(root) else call(lambda: filesystem.exists(path), "read", uri)
    if not there:
        parent, _, name = root.rpartition("/")
        close = get_close_matches(name, list_folder(parent), n=3) if is_local(root) and os.path.isdir(parent or "/") else []
        hint = f" (did you mean {' or '.join(f'{parent}/{one}' for one in close)}?)" if close else ""
        return f"source={uri!r} is not there{hint}: give {ACCEPTED}"
    others = ", ".join(f"{count} {kind}" for kind, count in Counter(not_taken).most_common(5)) or "no files"
    return f"source={uri!r} holds nothing to ingest ({others}): give {ACCEPTED}"


def _split_source(uri: str) -> tuple[str, str | None]:
    """The URI of the source's folder, and the name of the file if it is one. Raises ValueError if it is neither."""
    root = absolute_uri(os.path.expanduser(uri))
    filesystem, path = open_filesystem(root)
    if is_local(root):
        is_file = os.path.isfile(path)
        if os.path.exists(path) and not is_file and not os.path.isdir(path):
            raise ValueError(f"source={uri!r} is a pipe, a socket or a device: give {ACCEPTED}")
    else:
        is_file = _is_of_kind(path, sum(ENDINGS.values(), ())) and not call(lambda: filesystem.isdir(path), "read", uri)
    if not is_file:
        return root, None
    folder, _, name = root.rpartition("/")
    return folder, name


def _is_of_kind(path: str, endings: tuple[str, ...]) -> bool:
    return path.lower().endswith(endings) or without_query(path).lower().endswith(endings)


def _find_unnamed_images(root: str, paths: Sequence[str]) -> set[str]:
    """Those of some files that begin like an image."""
    filesystem, folder = open_filesystem(root)

    def is_image(path: str) -> bool:
        try:
            return looks_like_image(filesystem.cat_file(f"{folder}/{path}", start=0, end=HEAD_BYTES))
        except (OSError, ValueError):  # an empty file, one that is gone or may not be read
            return False

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return {path for path, found in zip(paths, pool.map(is_image, paths), strict=True) if found}


def _find_sidecars(images: AbstractSet[str], listing: Listing) -> dict[str, tuple[str, ...]]:
    """The side files of each image, one of each ending, in the order of SIDECARS. Others are counted."""
    by_stem: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in listing.files:
        if split := split_sidecar(path):
            by_stem[split[0]].append((split[1], path))
    found: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for image in images:
        split = split_image(image)
        fitting: dict[str, str] = {}
        for ending, path in [*by_stem.get(image, ()), *(by_stem.get(split[0], ()) if split else ())]:
            if fitting.setdefault(ending, path) != path:
                listing.not_taken[SECOND_SIDE_FILE] += 1
            used.add(path)
        if fitting:
            found[image] = tuple(fitting[ending] for ending in SIDECARS if ending in fitting)
    alone = [path for several in by_stem.values() for _, path in several if path not in used]
    listing.not_taken[LONE_SIDE_FILE] += len(alone)
    for path in used.union(alone).difference(*found.values()):  # counted already
        del listing.files[path]
    return found


def _tell_kind(root: str, name: str | None, exclude: str | None, uri: str, url_column: str | None) -> Kind:
    listing = list_files(root, name, exclude)
    files = _without_logs(listing.files)
    endings = ENDINGS | {"list": TEXT_LISTS}
    found = {kind: [path for path in files if _is_of_kind(path, endings[kind])] for kind in ENDINGS}
    kinds = [kind for kind in ENDINGS if found[kind]]
    if not kinds:
        if _find_unnamed_images(root, [path for path in files if has_no_ending(path)][:MAX_UNNAMED]):
            return "folder"
        listing.not_taken.update(map(kind_of_ending, listing.files))
        raise ValueError(explain_nothing(uri, listing.not_taken))
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
            schema = TableFile(file).schema
    except (OSError, pa.ArrowException):
        return False
    has_images = find_column(schema, None, IMAGE_COLUMNS, holds_images) is not None
    return not has_images and find_column(schema, None, URL_COLUMNS, holds_captions) is not None
