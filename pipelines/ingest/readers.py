"""Reads the files of a source, whatever its kind, as rows of one schema.

A file that cannot be read, or not to its end, gives a row with an error; the rows before it are kept.
"""

import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from posixpath import splitext

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.download import fetch_named, read_key
from pipelines.ingest.lists import copy_list, read_listed
from pipelines.ingest.sidecars import read_sidecars, take_caption, to_json
from pipelines.ingest.sources import (
    IMAGE_COLUMNS,
    SIDECARS,
    Part,
    Source,
    find_column,
    holds_captions,
    holds_images,
    is_binary,
)
from pipelines.storage.errors import StorageError
from pipelines.storage.files import open_file
from pipelines.storage.lease import Ticket
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.workers.images import EXTENSIONS, too_many_bytes
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
    ]
)
NUM_THREADS = 16  # they wait for the disk or the network
PARQUET_BATCH = 64  # rows decoded at once
TAR_BLOCK = 512

# Errors of reading that mean a bad file, and not a fault of this program.
READ_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException)


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
            if source.kind == "webdataset":
                with tarfile.open(fileobj=file) as archive:
                    images, _, cut_off = _scan_tar(archive)
                    return len(images) or (None if cut_off else 0)
            parquet = pq.ParquetFile(file)
            count = parquet.metadata.num_rows
    except READ_ERRORS as error:
        _failed(uri, error)
        return None
    _find_columns(parquet.schema_arrow, source, uri)
    return count


def read_parts(source: Source, parts: list[Part]) -> pa.Table:
    """Read the samples of some parts in order, as SOURCE_ROWS.

    Errors: missing_source (the file is gone), truncated (a tar that ends too early), too_many_bytes, unreadable, those of
    `download.fetch_named`, and no_url (a row of a list without one).

    Raises StorageError if the storage does not answer; no row is refused for that.
    """
    rows = list(_read_rows(source, parts))
    for row in rows:  # names in an archive or a folder may be no UTF-8, and errors name them
        for name in {"source_uri", "detail"} & row.keys():
            row[name] = row[name].encode(errors="backslashreplace").decode()
    return pa.Table.from_pylist(rows, SOURCE_ROWS)


def _read_rows(source: Source, parts: list[Part]) -> Iterator[Row]:
    if source.kind == "folder":
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            yield from pool.map(partial(_read_image_file, source), parts)
        return
    if source.kind == "list":
        yield from read_listed(source, parts)
        return
    read = {"webdataset": _read_tar, "parquet": _read_parquet}[source.kind]
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
    beside = {splitext(path)[1]: read_key(source.uri_of(path), source.max_bytes, is_literal=True) for path in part.sidecars}
    return {"image_bytes": content, "source_uri": uri, **read_sidecars(beside, source.caption_keys)}


def _read_tar(source: Source, part: Part) -> Iterator[Row]:
    with open_file(source.uri_of(part.path)) as file, tarfile.open(fileobj=file) as archive:
        images, texts, cut_off = _scan_tar(archive)
        for member in images[part.start : part.stop]:
            uri = f"{source.uri_of(part.path)}#{member.name}"
            if member.size > source.max_bytes:
                yield _refused(uri, too_many_bytes(member.size, source.max_bytes))
                continue
            beside = {ending: texts.get(splitext(member.name)[0] + ending) for ending in SIDECARS}
            contents = _extract(archive, {"": member} | {ending: text for ending, text in beside.items() if text})
            image_bytes = contents.pop("")
            if isinstance(image_bytes, Exception):
                if cut_off is None:
                    raise image_bytes
                break  # the last member is cut off
            yield {"image_bytes": image_bytes, "source_uri": uri, **read_sidecars(contents, source.caption_keys)}
        if part.stop is None and cut_off is not None:
            raise cut_off


def _scan_tar(archive: tarfile.TarFile) -> tuple[list[tarfile.TarInfo], dict[str, tarfile.TarInfo], EOFError | None]:
    """List the images in order, captions by name, and the error if the archive is cut off, which `tarfile` may not notice."""
    images, texts = [], {}
    try:
        for member in archive:
            if not member.isfile() or any(name.startswith(".") for name in member.name.removeprefix("./").split("/")):
                continue
            ending = splitext(member.name)[1].lower()
            if ending in EXTENSIONS:
                images.append(member)
            elif ending in SIDECARS:
                texts[member.name] = member
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(TAR_BLOCK) != bytes(TAR_BLOCK):
            raise EOFError("no end-of-archive mark")
    except (tarfile.TarError, zlib.error, EOFError) as error:
        return images, texts, EOFError(f"the tar ends too early, {len(images)} images were found ({error})")
    return images, texts, None


def _extract(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, bytes | Exception]:
    """Read members, in the order in which the archive holds them: for each step back, a compressed archive is read again from
    its start."""
    contents: dict[str, bytes | Exception] = {}
    for name, member in sorted(members.items(), key=lambda named: named[1].offset_data):
        content = archive.extractfile(member)
        assert content is not None  # it is a file
        try:
            contents[name] = content.read()
        except (tarfile.TarError, zlib.error, EOFError) as error:
            contents[name] = error
    return contents


def _read_parquet(source: Source, part: Part) -> Iterator[Row]:
    uri = source.uri_of(part.path)
    with open_file(uri) as file:
        parquet = pq.ParquetFile(file)
        image_column, caption_column = _find_columns(parquet.schema_arrow, source, uri)
        stop = parquet.metadata.num_rows if part.stop is None else part.stop
        for batch, first in _parquet_batches(parquet, image_column, part.start, stop):
            contents = _image_contents(source, part.path, [row.pop(image_column) for row in batch])
            for index, (row, content) in enumerate(zip(batch, contents, strict=True), first):
                found = take_caption(row, caption_column) | {"metadata": to_json(row)}
                if isinstance(content, RowRefused):
                    yield found | _refused(f"{uri}#{index}", content)
                else:
                    yield found | {"image_bytes": content, "source_uri": f"{uri}#{index}"}


def _image_contents(source: Source, path: str, values: list[bytes | Row | None]) -> list[bytes | RowRefused]:
    """Image bytes from cells that hold bytes, or the struct of bytes and path of `datasets`, which may have only the path."""
    wrapped: list[Row] = [value if isinstance(value, dict) else {"bytes": value} for value in values]
    keys = {value["path"]: None for value in wrapped if value["bytes"] is None and value.get("path")}
    fetched = fetch_named(source, [(path, source.resolve(path, key)) for key in keys]) if keys else []
    by_key = dict(zip(keys, fetched, strict=True))
    nothing = RowRefused("unreadable", "the row holds neither bytes nor a path")
    return [by_key.get(value.get("path"), nothing) if value["bytes"] is None else value["bytes"] for value in wrapped]


def _parquet_batches(parquet: pq.ParquetFile, image_column: str, start: int, stop: int) -> Iterator[tuple[list[Row], int]]:
    """Read rows `start` to `stop` in batches, each with its first row's index, without other binary columns."""
    columns = [field.name for field in parquet.schema_arrow if field.name == image_column or not is_binary(field.type)]
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        if first < stop and start < first + count:
            index = first
            for batch in parquet.iter_batches(PARQUET_BATCH, row_groups=[group], columns=columns):
                low, high = max(start - index, 0), min(stop - index, len(batch))
                if low < high:
                    yield batch.slice(low, high - low).to_pylist(), index + low
                index += len(batch)
        first += count


def _find_columns(schema: pa.Schema, source: Source, uri: str) -> tuple[str, str | None]:
    """Find the image column, and the caption column if there is one. Raises ValueError if a column is missing."""
    image = find_column(schema, source.image_column, IMAGE_COLUMNS, holds_images)
    caption = find_column(schema, source.caption_column, source.caption_keys, holds_captions)
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if image is None:
        names = source.image_column or " or ".join(IMAGE_COLUMNS)
        raise ValueError(f"{uri} has no column of image bytes named {names}: set image_column. There are: {there}")
    if source.caption_column and caption is None:
        raise ValueError(f"{uri} has no column of text named caption_column={source.caption_column!r}. There are: {there}")
    return image, caption
