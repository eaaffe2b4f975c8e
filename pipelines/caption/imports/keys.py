"""The names by which a caption finds its image: pure functions of an image's row, and of the key that a caption came with.

A caption has one form or several of its key, the most telling first; an image answers to many. The first form to which an image
answers decides.
"""

import json
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from pipelines.caption.imports.config import Match
from pipelines.tables.schema import Row
from pipelines.workers.images import EXTENSIONS

TARS = (".tar", ".tar.gz", ".tgz")
URL_NAMES = ("url", "image_url", "uri")
PATH_NAMES = ("file_name", "filename", "image_path", "path", "key", "__key__", "image", "file")
PARTIAL_RANK = 200
MAX_PARTS = 4
"""Parts of a path, the file's name among them, that are compared where keys are matched by file name."""
ID = re.compile(r"[0-9a-f]{64}")
PARQUET_ROW = re.compile(r"\.parquet#\d+$", re.IGNORECASE)


class Form(NamedTuple):
    """One form of a key.

    Args:
        kind: id, url, path (the whole place of the file), or file_name (the end of its path).
        num_parts: of the path where the kind is file_name, else 0.
        is_whole: whether it is all of the key.
    """

    kind: str
    num_parts: int
    text: str
    is_whole: bool = True

    @property
    def rank(self) -> int:
        """Forms with a lower rank go first; from PARTIAL_RANK on they are only a part of the key."""
        rank = {"id": 0, "url": 1, "path": 2}.get(self.kind, 100 - self.num_parts)
        return rank if self.is_whole else PARTIAL_RANK + rank


def kind_of(rank: int) -> str:
    """The kind of the form that has a rank."""
    return ("id", "url", "path")[rank] if rank <= 2 else "file_name"


def key_forms(key: str, match: Match) -> list[Form]:
    """The forms of a key. With `match` auto, its kind is what it looks like."""
    key = key.strip()
    if match == "id":
        return [Form("id", 0, key.lower())]
    if match == "auto" and ID.fullmatch(key.lower()):
        return [Form("id", 0, key.lower()), Form("file_name", 1, key)]
    if match == "url" or (match == "auto" and key.startswith(("http://", "https://"))):
        return [Form("url", 0, key)]
    paths = [key, key.replace("\\", "/")] if "\\" in key else [key]  # as Windows writes them
    if match == "file_name":
        return [*([_place(key)] if _is_whole(key) else []), *(form for path in paths for form in name_forms(path))]
    if _is_whole(key):
        return [_place(key)]
    return [Form("file_name", len(parts), "/".join(parts)) for parts in map(path_parts, paths) if parts]


def place_forms(uri: str, path: str, match: Match, *, min_parts: int) -> list[Form]:
    """The forms of the key of a caption that lies beside its image.

    Args:
        uri: where the image should be, without its ending.
        path: the same, relative to the source of the captions.
        min_parts: the least number of the path's parts that must agree where match is file_name.
    """
    return [_place(uri), *(name_forms(path, min_parts) if match == "file_name" else [])]


def name_forms(path: str, min_parts: int = 1) -> list[Form]:
    """The ends of a path, the longest first."""
    parts = path_parts(path)
    return [
        Form("file_name", num_parts, "/".join(parts[-num_parts:]), is_whole=num_parts == len(parts))
        for num_parts in range(min(len(parts), MAX_PARTS), min_parts - 1, -1)
    ]


def image_forms(row: Row, wanted: Collection[tuple[str, int]]) -> Iterator[Form]:
    """What an image answers to, of the kinds and numbers of parts that captions ask for.

    Args:
        row: of `images`, with id, source_uri and metadata.
    """
    kinds = {kind for kind, _ in wanted}
    if "id" in kinds:
        yield Form("id", 0, row["id"])
    if kinds <= {"id"}:
        return
    source_uri = row["source_uri"]
    metadata = {name.lower(): value for name, value in json.loads(row["metadata"] or "{}").items() if isinstance(value, str)}
    if "url" in kinds:
        urls = [source_uri, *(metadata[name] for name in URL_NAMES if name in metadata)]
        yield from (Form("url", 0, url.strip()) for url in urls if "://" in url)
    paths = [metadata[name] for name in PATH_NAMES if name in metadata]
    if not PARQUET_ROW.search(source_uri):
        paths.append(source_uri)
        if "path" in kinds:
            yield _place(source_uri)
    for path in paths:
        parts = path_parts(path)
        for kind, num_parts in wanted:
            if kind == "file_name" and num_parts <= len(parts):
                yield Form(kind, num_parts, "/".join(parts[-num_parts:]))


def path_parts(uri: str) -> list[str]:
    """The folders and the name of an image's file, without its ending. A tar counts as a folder, whatever its ending."""
    if uri.startswith(("http://", "https://")):
        split = urlsplit(uri)
        path = f"{split.netloc}/{split.path}"
    else:
        path = uri.rpartition("://")[2]
        archive, mark, member = path.partition("#")
        ending = next((ending for ending in TARS if archive.lower().endswith(ending)), None)
        if mark and ending:
            path = f"{archive[: -len(ending)]}.tar/{member}"
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if parts:
        stem, dot, ending = parts[-1].rpartition(".")
        if dot and f".{ending.lower()}" in EXTENSIONS:
            parts[-1] = stem
    return parts


def _is_whole(key: str) -> bool:
    return key.startswith("/") or "://" in key


def _place(uri: str) -> Form:
    scheme = uri.partition("://")[0] if "://" in uri and not uri.startswith("file://") else ""
    return Form("path", 0, f"{scheme}:{'/'.join(path_parts(uri))}")
