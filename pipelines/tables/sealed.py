"""Parquet files that tell whether they are whole: every part has a CRC-32, which is checked wherever the part is read.

Parquet's own page checksums leave out the headers of pages and the footer, and readers do not look at them unless asked. A
sealed file has in its footer the CRC-32 of each column of each row group, and a CRC-32 of the footer itself. Together they
cover every byte but the first four, which are always the same. A reader checks the footer and the columns that it reads; other
columns cost it nothing. The file also has its folder and its name, by which a copy that lies elsewhere is recognized.

Files of earlier versions have no seal. Of them, page checksums are verified where there are any.
"""

import json
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from io import BytesIO, FileIO
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

SEAL = b"sana.seal"  # key of the seal in the footer
SEALED = b"sana.sealed"  # a second key, in the schema: were the seal cut out, it would still say that there was one
ARROW_SCHEMA = b"ARROW:schema"  # a key that was in all files before there were seals
TAIL_BYTES = 2**16  # read at once from the end of a file; few footers are longer
GAP_BYTES, REQUEST_BYTES = 2**16, 2**26  # remote: parts that are less apart are read by one request; the most of one request
BLOCK_BYTES = 2**18  # local: a block is checked while it is in the processor's cache
MAGIC = b"PAR1"
END_BYTES = 8  # after the footer: its length, and MAGIC
DIGITS = 8  # of a CRC-32 in hex
NO_CHECKSUM = "0" * DIGITS
SEAL_START = b'{"footer": "'
SEAL_FORM = re.compile(
    SEAL_START + rb'([0-9a-f]{8})", "columns": "([0-9a-f]*)", "folder": "(?:[^"\\]|\\.)*", "name": "(?:[^"\\]|\\.)*"\}'
)


class Part(NamedTuple):
    """A column of a row group: the bytes of the file from `start` up to `stop`."""

    group: int
    column: str
    start: int
    stop: int


def write_sealed(table: pa.Table, rows_per_group: int, *, folder: str, name: str) -> memoryview:
    """The content of a sealed Parquet file with the rows, and the metadata of the schema, of a table.

    Args:
        rows_per_group: rows in each row group but the last.
        folder, name: where the file is to lie.
    """
    noted = table.replace_schema_metadata({**(table.schema.metadata or {}), SEALED: b"1"})
    num_parts = max(-(-table.num_rows // rows_per_group), 1) * table.num_columns
    seal = {"footer": NO_CHECKSUM, "columns": NO_CHECKSUM * num_parts, "folder": folder, "name": name}
    sink = pa.BufferOutputStream()
    written: list[pq.FileMetaData] = []
    options = {"compression": "zstd", "write_page_checksum": True, "metadata_collector": written}
    with pq.ParquetWriter(sink, noted.schema, **options) as writer:
        writer.write_table(noted, rows_per_group)
        writer.add_key_value_metadata({SEAL: json.dumps(seal)})
    content = memoryview(sink.getvalue()).cast("B")
    start = len(content) - END_BYTES - int.from_bytes(content[-END_BYTES : -len(MAGIC)], "little")
    footer, parts = content[start:], _find_parts(written[0])
    found = _find_seal(bytes(footer))
    assert found is not None and len(parts) == num_parts and _cover(parts, start)
    footer[slice(*found.span(2))] = "".join(_checksum(content[part.start : part.stop]) for part in parts).encode()
    footer[slice(*found.span(1))] = _checksum(footer).encode()
    return content


class SealedFile:
    """A Parquet file whose bytes are checked as they are read, if it is sealed.

    Args:
        file: must stay open while this is used.
        folder, name: where it was found. One that was written as another file is refused.

    Every call raises ValueError or pyarrow.ArrowException if the file is damaged; and what `file` raises.
    """

    def __init__(self, file: BinaryIO, *, folder: str, name: str):
        self.file = file
        is_local = isinstance(getattr(file, "raw", file), (FileIO, BytesIO))
        self.gap_bytes, self.block_bytes = (1, BLOCK_BYTES) if is_local else (GAP_BYTES, REQUEST_BYTES)
        self.size = file.seek(0, 2)
        self.tail = self._read_range(max(self.size - TAIL_BYTES, 0), self.size)
        end = self.tail[-END_BYTES:]
        length = int.from_bytes(end[:4], "little")
        if len(end) < END_BYTES or end[4:] != MAGIC or length > self.size - END_BYTES - len(MAGIC):
            raise ValueError("it does not end as a Parquet file does")
        self.footer_start = self.size - END_BYTES - length
        if self.footer_start < self.size - len(self.tail):
            self.tail = self._read_range(self.footer_start, self.size)
        footer = self.tail[-END_BYTES - length :]
        seal = _find_seal(footer)
        if seal is not None:
            zeroed = memoryview(footer)
            parts = zeroed[: seal.start(1)], NO_CHECKSUM.encode(), zeroed[seal.end(1) :]
            if _checksum(*parts).encode() != seal[1]:
                raise ValueError("its footer is not what was written")
        self.metadata: pq.FileMetaData = pq.read_metadata(pa.BufferReader(footer))
        noted = self.metadata.metadata or {}
        if seal is None and (SEALED in noted or ARROW_SCHEMA not in noted):
            raise ValueError("its seal is gone")
        self.is_sealed = seal is not None
        self.checksums = seal[2].decode() if seal is not None else ""
        if seal is not None and (own := json.loads(seal[0])) and (own["folder"], own["name"]) != (folder, name):
            raise ValueError(f"it is a copy of {own['folder']}/{own['name']}.parquet")

    def read(self, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None) -> pa.Table:
        """Some columns in that order, of all rows or of some row groups; all columns unless given."""
        chosen = range(self.metadata.num_row_groups) if groups is None else groups
        names = None if columns is None else list(columns)
        if self.is_sealed:
            table = pq.ParquetFile(self._read_parts(chosen, names), metadata=self.metadata).read_row_groups(chosen, names)
        else:
            table = self._open_unsealed(pre_buffer=True).read_row_groups(chosen, names)
        return table if names is None else table.select(names)

    def iter_batches(self, num_rows: int) -> Iterator[pa.RecordBatch]:
        """All rows, `num_rows` at a time. Memory: a row group as it is in the file, and a batch of it."""
        for group in range(self.metadata.num_row_groups):  # one call for all groups would read far more ahead
            if self.is_sealed:
                reader = pq.ParquetFile(self._read_parts([group], None), metadata=self.metadata)
            else:
                reader = self._open_unsealed(pre_buffer=False)
            yield from reader.iter_batches(num_rows, row_groups=[group], use_threads=False)

    def _open_unsealed(self, *, pre_buffer: bool) -> pq.ParquetFile:
        return pq.ParquetFile(self.file, metadata=self.metadata, page_checksum_verification=True, pre_buffer=pre_buffer)

    def _read_parts(self, groups: Sequence[int], columns: Sequence[str] | None) -> pa.BufferReader:
        """The whole file as Parquet's reader sees it, in which only the parts asked for are filled in, after a check."""
        parts = _find_parts(self.metadata)
        if len(parts) * DIGITS != len(self.checksums) or not _cover(parts, self.footer_start):
            raise ValueError("its length is not what was written")
        chosen = deque(
            (part, self.checksums[number * DIGITS : (number + 1) * DIGITS])
            for number, part in enumerate(parts)
            if part.group in groups and (columns is None or part.column in columns)
        )
        content = pa.allocate_buffer(self.size)  # pages that are never touched take no memory
        view, checksum = memoryview(content).cast("B"), 0
        for start, stop in self._blocks([part for part, _ in chosen]):
            self._read_into(view[start:stop], start)
            if start == 0 and view[: len(MAGIC)] != MAGIC:
                raise ValueError("it does not begin as a Parquet file does")
            while chosen and chosen[0][0].start <= stop:
                part, expected = chosen[0]
                checksum = zlib.crc32(view[max(part.start, start) : min(part.stop, stop)], checksum)
                if part.stop > stop:
                    break
                if f"{checksum:08x}" != expected:
                    raise ValueError(f"column {part.column} of row group {part.group} is not what was written")
                chosen.popleft()
                checksum = 0
        assert not chosen
        return pa.BufferReader(content)

    def _blocks(self, parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
        """What to read for some parts, in order. The file's magic, and what lies in a small gap, is read along."""
        ranges: list[tuple[int, int]] = []
        for part in parts:
            if ranges and part.start - ranges[-1][1] < self.gap_bytes:
                ranges[-1] = (ranges[-1][0], part.stop)
            else:
                ranges.append((0 if part.start == len(MAGIC) else part.start, part.stop))
        for start, stop in ranges:
            yield from ((place, min(place + self.block_bytes, stop)) for place in range(start, stop, self.block_bytes))

    def _read_into(self, target: memoryview, start: int) -> None:
        tail_start = self.size - len(self.tail)
        if start >= tail_start:
            target[:] = self.tail[start - tail_start : start - tail_start + len(target)]
            return
        self.file.seek(start)
        filled = 0
        while filled < len(target):
            count = self.file.readinto(target[filled:])  # type: ignore[attr-defined]
            if not count:
                raise ValueError("it ends early")
            filled += count

    def _read_range(self, start: int, stop: int) -> bytes:
        self.file.seek(start)
        content = self.file.read(stop - start)
        if len(content) != stop - start:
            raise ValueError("it ends early")
        return content


def _find_seal(footer: bytes) -> re.Match[bytes] | None:
    """The seal in a footer: the last text of its form. (Statistics, which come before it, hold texts of strangers.)"""
    return SEAL_FORM.match(footer, start) if (start := footer.rfind(SEAL_START)) >= 0 else None


def _find_parts(metadata: pq.FileMetaData) -> list[Part]:
    """The parts of a file, in the order in which they lie there. A nested column has several chunks, one after another."""
    parts: list[Part] = []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for index in range(row_group.num_columns):
            chunk = row_group.column(index)
            name = chunk.path_in_schema.split(".")[0]
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            stop = start + chunk.total_compressed_size
            if parts and parts[-1][:2] == (group, name):
                start = parts.pop().start
            parts.append(Part(group, name, start, stop))
    return parts


def _cover(parts: Sequence[Part], stop: int) -> bool:
    """Whether the parts follow each other without a gap from the file's magic to `stop`."""
    edges = [len(MAGIC), *(place for part in parts for place in (part.start, part.stop)), stop]
    return all(first == second for first, second in zip(edges[::2], edges[1::2], strict=True))


def _checksum(*contents: bytes | memoryview) -> str:
    """The CRC-32 of contents that follow each other, in hex."""
    checksum = 0
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    return f"{checksum:0{DIGITS}x}"
