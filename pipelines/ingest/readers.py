"""Reads the files of a source, whatever its kind, as rows of one schema.

A file that cannot be read, or not to its end, gives a row with an error; the rows before it are kept.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa

from pipelines.ingest.download import read_key
from pipelines.ingest.lists import copy_list, read_listed
from pipelines.ingest.memory import shard_full
from pipelines.ingest.pairing import TarImage
from pipelines.ingest.parquet_images import open_images, read_parquet
from pipelines.ingest.sidecars import read_sidecars, split_sidecar
from pipelines.ingest.sources import Part, Source
from pipelines.ingest.tars import TarReader
from pipelines.storage.errors import StorageError
from pipelines.storage.files import open_file
from pipelines.storage.lease import Ticket
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.workers.images import too_many_bytes
from sana_model.files.redact import redact_uri
from sana_model.files.retry import is_transient

SOURCE_ROWS = pa.schema(
    [
        pa.field("image_bytes", pa.large_binary()),  # null where they could not be read
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("caption_key", pa.string()),  # under which it was found; ".txt" for a file beside the image
        pa.field("metadata", pa.string()),  # a JSON object
        pa.field("error", pa.string()),  # a short code; null for a good row
        pa.field("detail", pa.string()),
        pa.field("not_taken", pa.map_(pa.string(), pa.int64())),  # what came with the row and was left out, by kind
    ]
)
NUM_THREADS = 16  # they wait for the disk or the network
LARGE_BYTES = 2**20  # of an image: the same one again is refused before all of them fill the memory

# Errors of reading that mean a bad file, and not a fault of this program.
READ_ERRORS = (OSError, EOFError, tarfile.TarError, pa.ArrowException)


def count_samples(source: Source, part: Part, ticket: Ticket | None = None) -> int | None:
    """Count the samples of a whole file by its headers; None if they cannot be read. A list is copied into the dataset.

    Raises:
        ValueError: a Parquet file has no image column, or a list cannot be read as one.
        StorageError: the storage does not answer.
    """
    if source.kind == "folder":
        return 1
    if source.kind == "list":
        return copy_list(source, part, ticket)
    uri = source.uri_of(part.path)
    try:
        with open_file(uri) as file:
            if source.kind == "parquet":
                return open_images(file, source, part)[0].num_rows
            found = TarReader(file).list()
            return len(found.images) or (None if found.damage else 0)
    except READ_ERRORS as error:
        _failed(uri, error)
        return None


def read_parts(source: Source, parts: list[Part]) -> pa.Table:
    """Read the samples of some parts in order, as SOURCE_ROWS.

    Errors: missing_source (the file is gone), truncated (a tar that ends too early), too_many_bytes, dead_link (in a tar),
    several_images (in one row), duplicate, unreadable, those of `download.fetch_named`, no_url (a row of a list without one).

    Raises StorageError if the storage does not answer; no row is refused for that.
    """
    bounds = _Bounds(source.max_shard_bytes)
    rows = []
    for row in _read_rows(source, parts):
        for name in {"source_uri", "detail"} & row.keys():  # names may be no UTF-8, and errors name them
            row[name] = redact_uri(row[name]).encode(errors="backslashreplace").decode()
        refused = bounds.refuse(row)
        rows.append(row | ({"image_bytes": None, "error": refused.reason, "detail": refused.detail} if refused else {}))
    return pa.Table.from_pylist(rows, SOURCE_ROWS)


class _Bounds:
    """Bounds the memory of a shard's images, and holds of large ones that are the same only the first."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.total = max_bytes, 0
        self.large: dict[bytes, str] = {}

    def refuse(self, row: Row) -> RowRefused | None:
        """Why the image of the next row is not kept; None if it is."""
        content = row.get("image_bytes") or b""
        if len(content) >= LARGE_BYTES:
            if first := self.large.get(content):
                return RowRefused("duplicate", f"the same bytes as {first}")
            self.large[content] = row["source_uri"]
        if self.total + len(content) > self.max_bytes:
            return shard_full(self.max_bytes)
        self.total += len(content)
        return None


def _read_rows(source: Source, parts: list[Part]) -> Iterator[Row]:
    if source.kind == "folder":
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            yield from pool.map(partial(_read_image_file, source), parts)
        return
    if source.kind == "list":
        yield from read_listed(source, parts)
        return
    read = {"webdataset": _read_tar, "parquet": read_parquet}[source.kind]
    for part in parts:
        try:
            yield from read(source, part)
        except READ_ERRORS as error:
            yield _failed(source.uri_of(part.path), error)


def _failed(uri: str, error: Exception) -> Row:
    if isinstance(error, StorageError) and is_transient(error):
        raise error
    if isinstance(error, FileNotFoundError):
        code = "missing_source"
    else:
        code = "truncated" if isinstance(error, EOFError) else "unreadable"
    return {"source_uri": uri, "error": code, "detail": f"{type(error).__name__}: {error}"}


def _refused(uri: str, refused: RowRefused) -> Row:
    return {"source_uri": uri, "error": refused.reason, "detail": refused.detail}


def _read_image_file(source: Source, part: Part) -> Row:
    uri = source.uri_of(part.path)
    content = read_key(uri, source.max_bytes, part.size, is_literal=True)
    if isinstance(content, RowRefused):
        if content.reason in ("bad_url", "download_failed"):  # the folder was listed: it can be opened, if not now
            raise StorageError(f"cannot read {uri}: {content.detail}")
        return _refused(uri, content)
    beside: dict[str, bytes | RowRefused] = {}
    for path in part.sidecars:
        if split := split_sidecar(path):
            beside[split[1]] = read_key(source.uri_of(path), source.max_text_bytes, is_literal=True)
    return {
        "image_bytes": content,
        "source_uri": uri,
        **read_sidecars(beside, source.caption_keys, source.max_text_bytes, source.text_encoding),
    }


def _read_beside(source: Source, beside: dict[str, bytes | RowRefused]) -> Row:
    return read_sidecars(beside, source.caption_keys, source.max_text_bytes, source.text_encoding)


def _read_tar(source: Source, part: Part) -> Iterator[Row]:
    with open_file(source.uri_of(part.path)) as file:
        reader = TarReader(file)
        found = reader.list()
        untold = found.not_taken if part.start == 0 else Counter()
        for image in found.images[part.start : part.stop]:
            row = _read_tar_image(source, part, reader, image)
            is_bad = row.get("error") in ("truncated", "unreadable")
            if is_bad and isinstance(found.damage, EOFError) and image is found.images[-1]:
                break  # it is where the tar is cut off
            yield row | {"not_taken": untold + row.get("not_taken", Counter())}
            untold = Counter()
        if part.stop is None and found.damage is not None:
            yield _failed(source.uri_of(part.path), found.damage) | {"not_taken": untold}


def _read_tar_image(source: Source, part: Part, reader: TarReader, image: TarImage) -> Row:
    uri = f"{source.uri_of(part.path)}#{image.name}"
    if image.member is None:
        return _refused(uri, RowRefused("dead_link", "a link to a file that this tar does not hold"))
    if image.member.size > source.max_bytes:
        return _refused(uri, too_many_bytes(image.member.size, source.max_bytes))
    small = {ending: text for ending, text in image.beside.items() if text.size <= source.max_text_bytes}
    contents = reader.read({"": image.member} | small)
    image_bytes = contents.pop("")
    if isinstance(image_bytes, Exception):
        return _failed(uri, image_bytes)
    beside: dict[str, bytes | RowRefused] = {}
    for ending, text in image.beside.items():
        beside[ending] = too_many_bytes(text.size, source.max_text_bytes)
        if ending in small:
            content = contents[ending]
            beside[ending] = RowRefused("unreadable", str(content)) if isinstance(content, Exception) else content
    return {
        "image_bytes": image_bytes,
        "source_uri": uri,
        **read_sidecars(beside, source.caption_keys, source.max_text_bytes, source.text_encoding),
    }
