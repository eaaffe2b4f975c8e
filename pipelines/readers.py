"""Reads the files of a source of images, of every kind, as rows of one form.

A file that cannot be read, or not to its end, gives a row that says so; the rows before it are kept.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from posixpath import splitext
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images import EXTENSIONS
from pipelines.sources import SIDECARS, Part, Source
from pipelines.stage import Row

SOURCE_ROWS = pa.schema(
    [
        pa.field("image_bytes", pa.large_binary()),  # null where they could not be read
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("metadata", pa.string()),  # a JSON object
        pa.field("error", pa.string()),  # a short code; null for a good row
        pa.field("detail", pa.string()),
    ]
)
IMAGE_COLUMNS = ("image", "image_bytes", "jpg", "jpeg", "png", "webp", "img", "bytes")
CAPTION_COLUMNS = ("caption", "text", "txt")

NUM_THREADS = 16  # they wait for the disk or the network
PARQUET_BATCH = 64  # rows decoded at once
TAR_BLOCK = 512

# What reading raises that tells of the file and not of us.
READ_ERRORS = (OSError, EOFError, zlib.error, tarfile.TarError, pa.ArrowException)


def count_samples(source: Source, part: Part) -> int | None:
    """How many samples a whole file holds, by its headers; None if they cannot be read.

    Raises:
        ValueError: a Parquet file without an image column.
    """
    if source.kind == "folder":
        return 1
    filesystem, root = source.open()
    try:
        with filesystem.open(f"{root}/{part.path}", "rb") as file:
            if source.kind == "webdataset":
                with tarfile.open(fileobj=file) as archive:
                    images, _, cut_off = _scan_tar(archive)
                    return len(images) or (None if cut_off else 0)
            parquet = pq.ParquetFile(file)
            count = parquet.metadata.num_rows
    except READ_ERRORS:
        return None
    _find_columns(parquet.schema_arrow, source, source.uri_of(part.path))
    return count


def read_parts(source: Source, parts: list[Part]) -> pa.Table:
    """The samples of some parts in order, as SOURCE_ROWS.

    Errors: missing_source (the file is gone), truncated (a tar that ends too early), unreadable.
    """
    return pa.Table.from_pylist(list(_read_rows(source, parts)), SOURCE_ROWS)


def _read_rows(source: Source, parts: list[Part]) -> Iterator[Row]:
    if source.kind == "folder":
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            yield from pool.map(partial(_read_image_file, source), parts)
        return
    read = _read_tar if source.kind == "webdataset" else _read_parquet
    for part in parts:
        try:
            yield from read(source, part)
        except READ_ERRORS as error:
            yield _failed(source.uri_of(part.path), error)


def _failed(uri: str, error: Exception) -> Row:
    if isinstance(error, FileNotFoundError):
        code = "missing_source"
    else:
        code = "truncated" if isinstance(error, EOFError) else "unreadable"
    return {"source_uri": uri, "error": code, "detail": f"{type(error).__name__}: {error}"}


def _read_image_file(source: Source, part: Part) -> Row:
    filesystem, root = source.open()
    uri = source.uri_of(part.path)
    try:
        image_bytes = filesystem.cat_file(f"{root}/{part.path}")
    except OSError as error:
        return _failed(uri, error)
    sidecars: dict[str, bytes | Exception] = {}
    for path in part.sidecars:
        try:
            sidecars[splitext(path)[1]] = filesystem.cat_file(f"{root}/{path}")
        except OSError as error:
            sidecars[splitext(path)[1]] = error
    return {"image_bytes": image_bytes, "source_uri": uri, **_read_sidecars(sidecars)}


def _read_tar(source: Source, part: Part) -> Iterator[Row]:
    filesystem, root = source.open()
    with filesystem.open(f"{root}/{part.path}", "rb") as file, tarfile.open(fileobj=file) as archive:
        images, texts, cut_off = _scan_tar(archive)
        for member in images[part.start : part.stop]:
            image_bytes = _extract(archive, member)
            if isinstance(image_bytes, Exception):
                if cut_off is None:
                    raise image_bytes
                break  # the last member, of which only a part is there
            beside = {ending: texts.get(splitext(member.name)[0] + ending) for ending in SIDECARS}
            sidecars = {ending: _extract(archive, text) for ending, text in beside.items() if text}
            uri = f"{source.uri_of(part.path)}#{member.name}"
            yield {"image_bytes": image_bytes, "source_uri": uri, **_read_sidecars(sidecars)}
        if part.stop is None and cut_off is not None:
            raise cut_off


def _scan_tar(archive: tarfile.TarFile) -> tuple[list[tarfile.TarInfo], dict[str, tarfile.TarInfo], EOFError | None]:
    """The images in order, the captions by name, and the error if the archive is cut off; `tarfile` often ends silently."""
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


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Exception:
    content = archive.extractfile(member)
    assert content is not None  # it is a file
    try:
        return content.read()
    except (tarfile.TarError, zlib.error, EOFError) as error:
        return error


def _read_parquet(source: Source, part: Part) -> Iterator[Row]:
    filesystem, root = source.open()
    uri = source.uri_of(part.path)
    with filesystem.open(f"{root}/{part.path}", "rb") as file:
        parquet = pq.ParquetFile(file)
        image_column, caption_column = _find_columns(parquet.schema_arrow, source, uri)
        stop = parquet.metadata.num_rows if part.stop is None else part.stop
        for row, index in _parquet_rows(parquet, image_column, part.start, stop):
            value = row.pop(image_column)
            image_bytes = value["bytes"] if isinstance(value, dict) else value
            caption = _clean(row.pop(caption_column)) if caption_column else None
            found = {"source_uri": f"{uri}#{index}", "caption": caption, "metadata": _to_json(row)}
            if image_bytes is None:
                found |= {"error": "unreadable", "detail": f"column {image_column!r} holds no bytes ({value})"}
            yield {"image_bytes": image_bytes, **found}


def _parquet_rows(parquet: pq.ParquetFile, image_column: str, start: int, stop: int) -> Iterator[tuple[Row, int]]:
    """Rows `start` to `stop` with their index, read from the row groups that hold them, without other binary columns."""
    columns = [field.name for field in parquet.schema_arrow if field.name == image_column or not _is_binary(field.type)]
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        if first < stop and start < first + count:
            index = first
            for batch in parquet.iter_batches(PARQUET_BATCH, row_groups=[group], columns=columns):
                low, high = max(start - index, 0), min(stop - index, len(batch))
                if low < high:
                    yield from zip(batch.slice(low, high - low).to_pylist(), range(index + low, index + high), strict=True)
                index += len(batch)
        first += count


def _find_columns(schema: pa.Schema, source: Source, uri: str) -> tuple[str, str | None]:
    """Names of the image column and of the caption column, if there is one."""

    def holds_images(name: str) -> bool:
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # as Hugging Face's `datasets` writes images
            kind = kind.field("bytes").type
        return _is_binary(kind)

    def holds_text(name: str) -> bool:
        kind = schema.field(name).type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    image_names = [source.image_column] if source.image_column else IMAGE_COLUMNS
    caption_names = [source.caption_column] if source.caption_column else CAPTION_COLUMNS
    images = [name for name in image_names if name in schema.names and holds_images(name)]
    captions = [name for name in caption_names if name in schema.names and holds_text(name)]
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if not images:
        names = " or ".join(image_names)
        raise ValueError(f"{uri} has no column of image bytes named {names}: set image_column. There are: {there}")
    if source.caption_column and not captions:
        raise ValueError(f"{uri} has no column of text named caption_column={source.caption_column!r}. There are: {there}")
    return images[0], captions[0] if captions else None


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _read_sidecars(sidecars: Mapping[str, bytes | Exception]) -> Row:
    """`caption` and `metadata` of the files beside an image, by their ending. The .txt is the caption before the .json."""
    caption, metadata = None, {}
    content = sidecars.get(".json")
    if isinstance(content, bytes):
        try:
            metadata = json.loads(content)
            if not isinstance(metadata, dict):
                metadata = {"sidecar_error": f"the .json holds a {type(metadata).__name__}, not an object"}
        except ValueError as error:
            metadata = {"sidecar_error": f".json: {error}"}
    content = sidecars.get(".txt")
    if isinstance(content, bytes):
        caption = _clean(content.decode("utf-8-sig", errors="replace"))
    if caption is None:
        named = [name for name in CAPTION_COLUMNS if isinstance(metadata.get(name), str)]
        caption = _clean(metadata.pop(named[0])) if named else None
    failed = [f"{ending}: {error}" for ending, error in sidecars.items() if isinstance(error, Exception)]
    if failed:
        metadata["sidecar_error"] = "; ".join(failed)
    return {"caption": caption, "metadata": _to_json(metadata)}


def _clean(caption: str | None) -> str | None:
    return (caption.strip() or None) if caption else None


def _to_json(metadata: Mapping[str, Any]) -> str | None:
    """A strict JSON object of the values that are there; what JSON does not know as text, NaN as null."""
    present = {name: value for name, value in metadata.items() if value is not None}
    loose = json.dumps(present, default=lambda value: f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value))
    return json.dumps(json.loads(loose, parse_constant=lambda name: None)) if present else None
