"""Finds the files that hold captions, at any fsspec URI, and hashes their contents."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from posixpath import basename

from pipelines.caption.imports.config import ImportConfig
from pipelines.storage.files import NUM_THREADS, find_files, list_folder, open_file
from pipelines.storage.retry import call
from pipelines.tables.table import absolute_uri
from sana_model.files.filesystems import open_filesystem

TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ENDINGS = (".parquet", *TEXT_ENDINGS, *(f"{ending}.gz" for ending in TEXT_ENDINGS))
CLIP_SCORE = "_clip_score.json"
BLOCK = 2**20


@dataclass(frozen=True)
class CaptionFile:
    """A file of captions; paths are relative to `root`, the URI of the source's folder.

    Args:
        stem: in NVlabs' layout the path of the image or tar, without its ending; None in all other layouts.
        score_path: of the file with the CLIP scores of these captions, if there is one.
    """

    root: str
    path: str
    stem: str | None = None
    score_path: str | None = None

    @property
    def uri(self) -> str:
        return f"{self.root}/{self.path}"


@dataclass(frozen=True)
class Found:
    """The files of all sources, the VLM if they are in NVlabs' layout, and how many other files lie there, by ending."""

    files: list[CaptionFile]
    vlm: str | None
    others: Counter[str]

    def hash_captions(self) -> str:
        return hash_files([file.uri for file in self.files])

    def hash_scores(self) -> str:
        return hash_files([f"{file.root}/{file.score_path}" for file in self.files if file.score_path])


@dataclass(frozen=True)
class _Listing:
    root: str
    chosen: list[str]
    there: set[str]


def find_captions(config: ImportConfig) -> Found:
    """Find the files of captions of all sources, in the order of the sources, sorted by path.

    Raises:
        ValueError: a source holds none, or captions of several VLMs.
        StorageError: the storage does not answer.
    """
    listings = [_list_source(source) for source in config.sources]
    vlm = config.vlm
    if vlm is None and any(path.endswith(f"_{config.name}.json") for listing in listings for path in listing.chosen):
        vlm = config.name
    files: dict[str, CaptionFile] = {}
    others: Counter[str] = Counter()
    for source, listing in zip(config.sources, listings, strict=True):
        found = _of_vlm(listing, vlm) if vlm else _of_tables(listing)
        if not found:
            raise ValueError(_explain_none(source, listing, vlm))
        taken = {file.path for file in found} | {file.score_path for file in found}
        others.update(_ending(path) for path in listing.chosen if path not in taken)
        files |= {file.uri: file for file in found}
    return Found(list(files.values()), vlm, others)


def hash_files(uris: Iterable[str]) -> str:
    """The hash of the contents of files, whatever their order and their names. Raises FileNotFoundError, StorageError."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        hashes = sorted(pool.map(_hash_file, uris))
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _hash_file(uri: str) -> str:
    digest = hashlib.sha256()
    with open_file(uri) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _list_source(source: str) -> _Listing:
    """List the files of a source that are not hidden. Raises ValueError if there is nothing."""
    uri = absolute_uri(os.path.expanduser(source))
    filesystem, path = open_filesystem(uri)
    if call(lambda: filesystem.isfile(path), "read", uri):
        root, _, name = uri.rpartition("/")
        return _Listing(root, [name], set(list_folder(root)))
    wildcard = re.search(r"[*?]", uri)
    root = uri[: wildcard.start()].rpartition("/")[0] if wildcard else uri
    there = [path for path in find_files(root) if not any(part.startswith(".") for part in path.split("/"))]
    if wildcard:
        pattern = re.compile(_translate(uri[len(root) + 1 :]))
        return _Listing(root, [path for path in there if pattern.fullmatch(path)], set(there))
    return _Listing(root, there, set(there))


def _translate(pattern: str) -> str:
    """A pattern of paths as a regular expression: ** stands for any folders, * and ? stay inside one."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(pieces.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", pattern))


def _of_vlm(listing: _Listing, vlm: str) -> list[CaptionFile]:
    """The files of NVlabs' layout that hold the captions of a VLM."""
    found = []
    for path in sorted(listing.chosen):
        stem = path.removesuffix(f"_{vlm}.json")
        if stem != path:
            score_path = f"{stem}_{vlm}{CLIP_SCORE}"
            found.append(CaptionFile(listing.root, path, stem, score_path if score_path in listing.there else None))
    return found


def _of_tables(listing: _Listing) -> list[CaptionFile]:
    """The files of all other layouts. Raises ValueError if there are files of NVlabs' layout among them."""
    scores = sorted(path for path in listing.chosen if path.endswith(CLIP_SCORE))
    if scores:
        vlm = basename(scores[0]).removesuffix(CLIP_SCORE).rpartition("_")[2]
        raise ValueError(
            f"{listing.root} holds captions in NVlabs' layout, such as {scores[0]}: say of which VLM to read them, such as "
            f"--captions.vlm {vlm}"
        )
    return [CaptionFile(listing.root, path) for path in sorted(listing.chosen) if path.lower().endswith(ENDINGS)]


def _explain_none(source: str, listing: _Listing, vlm: str | None) -> str:
    wanted = f"file that ends with _{vlm}.json" if vlm else f"file of captions ({', '.join(ENDINGS)})"
    there = ", ".join(sorted(listing.chosen)[:3])
    return f"source={source!r} holds no {wanted}; of its {len(listing.chosen)} files the first are: {there or 'none'}"


def _ending(path: str) -> str:
    name = basename(path)
    return name[name.rindex(".") :].lower() if "." in name else name
