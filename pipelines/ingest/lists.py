"""Lists of URLs or keys: CSV, TSV, JSON lines or Parquet files with one image in a row.

When a list is planned, it is copied into the dataset in pieces of PIECE_ROWS rows. So any slice of it can be read without
reading what comes before, and a later change of the file at the source does not change what a shard holds.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice

import pyarrow as pa

from pipelines.ingest.columns import URL_COLUMNS, find_column, find_columns, holds_captions, is_binary
from pipelines.ingest.download import fetch_named
from pipelines.ingest.image_names import without_query
from pipelines.ingest.names import DATA
from pipelines.ingest.not_taken import BAD_VALUE, UNKNOWN_ENCODING
from pipelines.ingest.parquet_rows import TableFile, ValueErrors
from pipelines.ingest.sidecars import take_caption, to_json
from pipelines.ingest.sources import Part, Source
from pipelines.ingest.text_tables import LIST_ERROR, MAX_LINE, VALUE_ERRORS, read_table
from pipelines.storage.errors import StorageError
from pipelines.storage.files import list_folder, open_file, read_file, write_file
from pipelines.storage.lease import Ticket
from pipelines.tables.encodings import decode_text
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.tables.sealed import SealedFile, write_sealed
from pipelines.tables.text import clean

COPIES = "_lists"  # folder of the copies, in that of the images
PIECE_ROWS = 100_000
MAX_PIECE_BYTES = 2**31
ROW_GROUP = 1000  # about the rows of a shard
LIST_ROWS = pa.schema(
    [
        pa.field("url", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("caption_key", pa.string()),
        pa.field("metadata", pa.string()),
        pa.field("not_taken", pa.map_(pa.string(), pa.int64())),
    ]
)


def copy_list(source: Source, part: Part, ticket: Ticket | None = None) -> int:
    """Copy a list into the dataset; returns its number of rows.

    Raises:
        ValueError: it cannot be read, has no column of URLs, or holds whole images, and too many.
    """
    uri = source.uri_of(part.path)
    rows = _read_list(source, part.path)
    count = 0
    try:
        while group := list(islice(rows, ROW_GROUP)):
            name, groups = _piece_name(part.path, count // PIECE_ROWS), []
            while group:
                groups.append(pa.Table.from_pylist(group, LIST_ROWS))
                count += len(group)
                if sum(table.nbytes for table in groups) > MAX_PIECE_BYTES:
                    raise ValueError(
                        f"{uri}: {PIECE_ROWS} rows, or fewer, hold over {MAX_PIECE_BYTES} bytes: a list names images; put "
                        "those of data: URLs into files, tars or a Parquet column of bytes"
                    )
                group = list(islice(rows, min(ROW_GROUP, -count % PIECE_ROWS)))
            copied = write_sealed(pa.concat_tables(groups), ROW_GROUP, folder=COPIES, name=name)
            if ticket is not None:
                ticket.check()
            write_file(f"{source.copies_uri}/{name}.parquet", copied)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, StorageError | FileNotFoundError):
            raise
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
        found = {name: row.get(name) for name in ("caption", "caption_key", "metadata")}  # old copies do not have all
        found["not_taken"] = Counter(dict(row.get("not_taken") or ()))
        uri = f"{source.uri_of(path)}#{index}"
        if not row["url"]:
            yield found | {"source_uri": uri, "error": "no_url", "detail": _explain_no_url(index, row["metadata"])}
            continue
        (_, listed), content = next(contents)
        found["source_uri"] = uri if listed.startswith(DATA) else listed  # a data: URL is the image itself
        if isinstance(content, RowRefused):
            yield found | {"error": content.reason, "detail": content.detail}
        else:
            yield found | {"image_bytes": content}


def _explain_no_url(index: int, metadata: str | None) -> str:
    noted = json.loads(metadata or "{}")
    problem = noted.get(LIST_ERROR) or "; ".join(f"{name}: {error}" for name, error in noted.get(VALUE_ERRORS, {}).items())
    return f"row {index} of the list names no image{f' ({problem})' if problem else ''}"


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
        if without_query(path).lower().endswith(".parquet"):
            table = TableFile(file)
            schema = table.schema
            url_column, caption_columns = _find_columns(schema, source, path)
            names = [field.name for field in schema if not is_binary(field.type)]
            names += [name for name in (url_column, *caption_columns) if name not in names]
            records = ((row, errors) for _, row, errors in table.iter_rows(names, 0, None, batch=ROW_GROUP))
        else:
            with open_file(source.uri_of(path)) as first:  # read twice: the rows themselves may be large
                schema, problem = _schema_of(read_table(first, without_query(path), source.text_encoding))
            if not schema.names and problem is None:
                return
            url_column, caption_columns = _find_columns(schema, source, path, problem)
            rows = read_table(file, without_query(path), source.text_encoding)
            records = ((row, row.pop(VALUE_ERRORS, {})) for row in rows)
        for record, errors in records:
            yield _read_record(source, record, errors, url_column, caption_columns)


def _read_record(source: Source, record: Row, errors: ValueErrors, url_column: str, caption_columns: Sequence[str]) -> Row:
    """A row of LIST_ROWS from a row of a list, and the errors of its values."""
    max_bytes = source.max_text_bytes
    urls = record.pop(url_column, None)
    urls = urls if isinstance(urls, list) else [urls]
    if len(urls) > 1:
        errors = errors | {url_column: f"{len(urls)} URLs, and a row is about one image"}
    url = _text(urls[0]) if len(urls) == 1 else None
    if url and len(url) > (limit := MAX_LINE if url[: len(DATA)].lower() == DATA else max_bytes):
        errors = errors | {url_column: f"{len(url)} characters, over {limit}"}
        url = None
    found = take_caption(record, caption_columns, max_bytes, source.text_encoding)
    not_taken = found["not_taken"]
    for column in errors.keys() - {url_column, LIST_ERROR}:
        not_taken[UNKNOWN_ENCODING if column in caption_columns else BAD_VALUE] += 1
    metadata = to_json(record | ({VALUE_ERRORS: errors} if errors else {}), max_bytes)
    return {"url": url, **found, "metadata": metadata}


def _schema_of(records: Iterable[Row]) -> tuple[pa.Schema, str | None]:
    """The schema of the first records: all keys whose value is text, null or a list, in any of them, for records may have
    different keys. And why one of the lines before them is no record, if so."""
    keys: dict[str, pa.DataType] = {}
    problem: str | None = None
    count = 0
    for record in records:
        problem = problem or record.get(LIST_ERROR)
        count += LIST_ERROR not in record
        if count > ROW_GROUP:
            break
        for name, value in record.items():
            if value is None or isinstance(value, str):
                keys[name] = pa.string()
            elif isinstance(value, list):
                keys.setdefault(name, pa.list_(pa.string()))
    keys.pop(LIST_ERROR, None)
    keys.pop(VALUE_ERRORS, None)
    names = [(name, kind) for name, kind in keys.items() if name.encode(errors="replace").decode() == name]
    return pa.schema(names), problem


def _find_columns(schema: pa.Schema, source: Source, path: str, problem: str | None = None) -> tuple[str, list[str]]:
    """Find the column of URLs, and those that may hold captions. Raises ValueError if a column is missing; `problem`: of the
    first line that could not be read, if there is one."""
    url_column = find_column(schema, source.url_column, URL_COLUMNS, holds_captions)
    caption_columns = find_columns(schema, source.caption_column, source.caption_keys, holds_captions)
    uri, there = source.uri_of(path), ", ".join(schema.names)
    if url_column is None:
        wanted = source.url_column or " or ".join(URL_COLUMNS)
        also = f". A line could not be read: {problem}" if problem else ""
        raise ValueError(f"{uri} has no column of URLs named {wanted}: set url_column. There are: {there or 'none'}{also}")
    if source.caption_column and not caption_columns:
        raise ValueError(f"{uri} has no column of text named caption_column={source.caption_column!r}. There are: {there}")
    return url_column, [name for name in caption_columns if name != url_column]


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        try:
            value = decode_text(value)
        except RowRefused:
            return None
    return clean(value) if isinstance(value, str) else None
