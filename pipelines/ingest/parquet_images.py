"""Reads the images of Parquet files, with the captions and metadata of their rows."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, islice
from typing import Any, BinaryIO

from pipelines.ingest.columns import IMAGE_COLUMNS, find_column, find_columns, holds_captions, holds_images, is_binary
from pipelines.ingest.download import fetch_named
from pipelines.ingest.not_taken import BAD_VALUE, BINARY_COLUMN, UNKNOWN_ENCODING
from pipelines.ingest.parquet_rows import TableFile
from pipelines.ingest.sidecars import take_caption, to_json
from pipelines.ingest.sources import Part, Source
from pipelines.ingest.text_tables import VALUE_ERRORS
from pipelines.storage.files import open_file
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row
from pipelines.workers.images import too_many_bytes

FETCHED_AT_ONCE = 64  # images whose rows hold a path
BATCH = 4  # rows decoded at once: an image may have many megabytes, and larger batches are hardly faster


def open_images(file: BinaryIO, source: Source, part: Part) -> tuple[TableFile, str, list[str]]:
    """A file with images, its image column, and the columns that may hold a row's caption.

    Raises as `TableFile`; ValueError if a column is missing.
    """
    table = TableFile(file)
    image = find_column(table.schema, source.image_column, IMAGE_COLUMNS, holds_images)
    captions = find_columns(table.schema, source.caption_column, source.caption_keys, holds_captions)
    uri, there = source.uri_of(part.path), ", ".join(f"{field.name} ({field.type})" for field in table.schema)
    if image is None:
        names = source.image_column or " or ".join(IMAGE_COLUMNS)
        raise ValueError(f"{uri} has no column of image bytes named {names}: set image_column. There are: {there}")
    if source.caption_column and not captions:
        raise ValueError(f"{uri} has no column of text named caption_column={source.caption_column!r}. There are: {there}")
    return table, image, [name for name in captions if name != image]


def read_parquet(source: Source, part: Part) -> Iterator[Row]:
    """The rows of a part. Raises as `open_images`; StorageError."""
    for has_path, group in groupby(_read_cells(source, part), key=lambda cell: isinstance(cell[0], str)):
        while several := list(islice(group, FETCHED_AT_ONCE if has_path else 1)):
            contents = [content for content, _ in several]
            if has_path:
                named = [(part.path, source.resolve(part.path, path)) for path in contents if isinstance(path, str)]
                contents = list(fetch_named(source, named))
            for content, (_, row) in zip(contents, several, strict=True):
                if isinstance(content, RowRefused):
                    yield row | {"error": content.reason, "detail": content.detail}
                else:
                    yield row | {"image_bytes": content}


def _read_cells(source: Source, part: Part) -> Iterator[tuple[bytes | str | RowRefused, Row]]:
    """For each row of a part its image: bytes, a path, or why there is none; and the rest of the row."""
    uri = source.uri_of(part.path)
    with open_file(uri) as file:
        table, image_column, caption_columns = open_images(file, source, part)
        columns = [field.name for field in table.schema if not is_binary(field.type)]
        columns += [name for name in (image_column, *caption_columns) if name not in columns]
        bytes_beside = len(table.schema) - len(columns)
        not_taken = Counter({BINARY_COLUMN: bytes_beside} if bytes_beside and part.start == 0 else {})
        for index, row, errors in table.iter_rows(columns, part.start, part.stop, batch=BATCH):
            content = _content_of(row.pop(image_column), errors.get(image_column), source.max_bytes)
            found = take_caption(row, caption_columns, source.max_text_bytes, source.text_encoding)
            not_taken.update(found["not_taken"])
            for column in errors.keys() - {image_column}:
                not_taken[UNKNOWN_ENCODING if column in caption_columns else BAD_VALUE] += 1
            metadata = to_json(row | ({VALUE_ERRORS: errors} if errors else {}), source.max_text_bytes)
            yield content, found | {"metadata": metadata, "not_taken": not_taken, "source_uri": f"{uri}#{index}"}
            not_taken = Counter()


def _content_of(value: Any, error: str | None, max_bytes: int) -> bytes | str | RowRefused:
    """The image in a cell that holds bytes, a struct of bytes and path as `datasets` writes it, or a list of one of these."""
    if isinstance(value, list):
        if len(value) > 1:
            return RowRefused("several_images", f"the row holds {len(value)} images, and a row is about one")
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("path") if value["bytes"] is None else value["bytes"]
    if not value:
        return RowRefused("unreadable", error or "the row holds neither bytes nor a path")
    return too_many_bytes(len(value), max_bytes) if isinstance(value, bytes) and len(value) > max_bytes else value
