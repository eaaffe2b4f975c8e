"""Lists of URLs or keys: CSV, TSV, JSON lines or Parquet files with one image in a row.

When a list is planned, it is copied into the dataset in pieces of PIECE_ROWS rows. So any slice of it can be read without
reading what comes before, and a later change of the file at the source does not change what a shard holds.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.download import fetch_named
from pipelines.ingest.names import DATA
from pipelines.ingest.sidecars import take_caption, to_json
from pipelines.ingest.sources import URL_COLUMNS, Part, Source, find_column, holds_captions, holds_text, is_binary
from pipelines.storage.errors import StorageError
from pipelines.storage.files import list_folder, open_file, read_file, write_file
from pipelines.storage.lease import Ticket
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.sealed import SealedFile, write_sealed
from pipelines.tables.text import clean

COPIES = "_lists"  # folder of the copies, in that of the images
PIECE_ROWS = 100_000
ROW_GROUP = 1000  # about the rows of a shard
MAX_FIELD = 2**24  # characters of a CSV's field; Python's own limit is 128 KiB
LIST_ERROR = "list_error"  # key in the metadata of a line that could not be parsed
LIST_ROWS = pa.schema([("url", pa.string()), ("caption", pa.string()), ("caption_key", pa.string()), ("metadata", pa.string())])


def copy_list(source: Source, part: Part, ticket: Ticket | None = None) -> int:
    """Copy a list into the dataset; returns its number of rows.

    Raises:
        ValueError: it cannot be read, or has no column of URLs.
    """
    uri = source.uri_of(part.path)
    rows = _read_list(source, part.path)
    count = 0
    try:
        for piece in iter(lambda: list(islice(rows, PIECE_ROWS)), []):
            name = _piece_name(part.path, count // PIECE_ROWS)
            copied = write_sealed(pa.Table.from_pylist(piece, LIST_ROWS), ROW_GROUP, folder=COPIES, name=name)
            if ticket is not None:
                ticket.check()
            write_file(f"{source.copies_uri}/{name}.parquet", copied)
            count += len(piece)
    except (pa.ArrowException, csv.Error, UnicodeError) as error:
        raise ValueError(
            f"{uri} cannot be read as a list after row {count} ({error}): put it right, or take it away"
        ) from error
    return count


def copy_again(source: Source, parts: Sequence[Part], ticket: Ticket) -> None:
    """Copy those lists again whose copies are gone, of which `parts` are still to be read.

    Raises ValueError if a list is gone too, or has another size than when it was planned.
    """
    there = set(list_folder(source.copies_uri)) if parts else set()
    lost = [part for part in parts if f"{_piece_name(part.path, part.start // PIECE_ROWS)}.parquet" not in there]
    for part in {part.path: part for part in lost}.values():
        uri = source.uri_of(part.path)
        with open_file(uri) as file:
            size = file.seek(0, io.SEEK_END)
        if size != part.size:
            raise ValueError(
                f"the copy of {uri} is gone, and the list was changed since: it had {part.size} bytes, and has {size}"
            )
        copy_list(source, part, ticket)


def read_listed(source: Source, parts: Iterable[Part]) -> Iterator[Row]:
    """Fetch the images that slices of lists name, all together, as rows of `readers.SOURCE_ROWS`.

    Raises as `slice_lists` and `download.fetch_named`.
    """
    rows = [(part.path, index, row) for part, index, row in slice_lists(source, parts)]
    named = [(path, source.resolve(path, row["url"])) for path, _, row in rows if row["url"]]
    contents = iter(zip(named, fetch_named(source, named), strict=True))
    for path, index, row in rows:
        found = {name: row.get(name) for name in ("caption", "caption_key", "metadata")}  # old copies have no caption_key
        uri = f"{source.uri_of(path)}#{index}"
        if not row["url"]:
            yield found | {"source_uri": uri, "error": "no_url", "detail": f"row {index} of the list names no image"}
            continue
        (_, listed), content = next(contents)
        found["source_uri"] = uri if listed.startswith(DATA) else listed  # a data: URL is the image itself
        if isinstance(content, RowRefused):
            yield found | {"error": content.reason, "detail": content.detail}
        else:
            yield found | {"image_bytes": content}


def slice_lists(source: Source, parts: Iterable[Part]) -> Iterator[tuple[Part, int, Row]]:
    """Read the rows of parts from the copies: (part, row number in its list, row of LIST_ROWS).

    Raises StorageError, also if a copy is gone.
    """

    @lru_cache(maxsize=1)  # parts are in order, so neighbours lie in the same piece and the same row group
    def open_piece(path: str, piece: int) -> SealedFile:
        name = _piece_name(path, piece)
        content = read_file(f"{source.copies_uri}/{name}.parquet")
        with _naming_damage(source, path, piece):
            return SealedFile(io.BytesIO(content), folder=COPIES, name=name)

    @lru_cache(maxsize=1)
    def read_group(path: str, piece: int, group: int) -> pa.Table:
        with _naming_damage(source, path, piece):
            return open_piece(path, piece).read(groups=[group])

    for part in parts:
        index = part.start
        while part.stop is None or index < part.stop:
            piece, place = divmod(index, PIECE_ROWS)
            try:
                file = open_piece(part.path, piece)
            except FileNotFoundError as error:
                if part.stop is None and place == 0 and index > part.start:  # the list ends with a full piece
                    break
                raise StorageError(f"row {index} of the copy of {source.uri_of(part.path)} is gone: {error}") from error
            if place >= file.metadata.num_rows:
                break
            group, first = divmod(place, ROW_GROUP)
            length = ROW_GROUP if part.stop is None else part.stop - index
            rows = read_group(part.path, piece, group).slice(first, length).to_pylist()
            yield from ((part, number, row) for number, row in enumerate(rows, index))
            index += len(rows)


@contextmanager
def _naming_damage(source: Source, path: str, piece: int) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        uri = f"{source.copies_uri}/{_piece_name(path, piece)}.parquet"
        raise DamagedShardError(f"{uri}, the copy of {source.uri_of(path)}, is damaged ({error})") from error


def _piece_name(path: str, piece: int) -> str:
    return f"{hashlib.sha256(path.encode()).hexdigest()[:16]}-{piece:05}"


def _read_list(source: Source, path: str) -> Iterator[Row]:
    """Read a list as rows of LIST_ROWS. A line that cannot be parsed has no URL, and its metadata says why."""
    with open_file(source.uri_of(path)) as file:
        if path.lower().endswith(".parquet"):
            parquet = pq.ParquetFile(file)
            columns = [field.name for field in parquet.schema_arrow if not is_binary(field.type)]
            batches = parquet.iter_batches(ROW_GROUP, columns=columns)
            records: Iterator[Row] = (row for batch in batches for row in batch.to_pylist())
            schema = parquet.schema_arrow
        else:
            text = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="")
            records = read_csv(text, path) if path.lower().endswith((".csv", ".tsv")) else read_json_lines(text)
            first = list(islice(records, ROW_GROUP))
            if not first:
                return
            schema = _schema_of(first)
            records = chain(first, records)
        url_column, caption_column = _find_columns(schema, source, path)
        for record in records:
            url = record.pop(url_column, None)
            caption = take_caption(record, caption_column)
            yield {"url": _text(url), **caption, "metadata": to_json(record)}


def _schema_of(records: list[Row]) -> pa.Schema:
    """The schema of some records: all keys whose value is text, null or a list, in any of them. Records may have different
    keys."""
    keys: dict[str, pa.DataType] = {}
    for record in records:
        for name, value in record.items():
            if value is None or isinstance(value, str):
                keys[name] = pa.string()
            elif isinstance(value, list):
                keys.setdefault(name, pa.list_(pa.string()))
    keys.pop(LIST_ERROR, None)
    return pa.schema(list(keys.items()))


def _find_columns(schema: pa.Schema, source: Source, path: str) -> tuple[str, str | None]:
    """Find the column of URLs, and the column of captions if there is one. Raises ValueError if a column is missing."""
    url_column = find_column(schema, source.url_column, URL_COLUMNS, holds_text)
    caption_column = find_column(schema, source.caption_column, source.caption_keys, holds_captions)
    uri, there = source.uri_of(path), ", ".join(schema.names)
    if url_column is None:
        wanted = source.url_column or " or ".join(URL_COLUMNS)
        raise ValueError(f"{uri} has no column of URLs named {wanted}: set url_column. There are: {there}")
    if source.caption_column and caption_column is None:
        raise ValueError(f"{uri} has no column of text named caption_column={source.caption_column!r}. There are: {there}")
    return url_column, caption_column


def _text(value: object) -> str | None:
    return clean(value) if isinstance(value, str) else None


def read_csv(text: Iterable[str], path: str) -> Iterator[Row]:
    """The rows of a table of text, by the names in its first line. Fields are split at tabs if the path ends with ".tsv"."""
    csv.field_size_limit(MAX_FIELD)
    for row in csv.DictReader(text, delimiter="\t" if path.lower().endswith(".tsv") else ","):
        row.pop(None, None)  # more fields than the header has
        yield row


def read_json_lines(text: Iterable[str]) -> Iterator[Row]:
    """The objects of JSON lines; for a line that holds none, an object whose LIST_ERROR says why."""
    for line in text:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record = {LIST_ERROR: str(error)}
        yield record if isinstance(record, dict) else {LIST_ERROR: f"a {type(record).__name__}, not an object"}
