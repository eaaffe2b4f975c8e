"""Reads the rows of Parquet files, in bounded memory. A value that cannot be read costs that value, and no more."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.ingest.columns import unique_schema
from pipelines.storage.errors import StorageError
from pipelines.tables.encodings import decode_caption
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row

ROWS_PER_BYTE = 8  # of a file: a footer that claims more rows is wrong, or made to do harm
BATCH_BYTES = 2**26  # of a column, decoded at once
UNPACKED_BYTES, UNPACKED_RATIO = 2**28, 200
"""A row group may unpack to so many bytes, or to so many times the size of its file, whichever is more."""
PROBE_ROWS = 2**16
PROBE_BYTES = 2**20  # read at once: a dictionary is at the beginning of its column

ValueErrors = dict[str, str]
"""Why values of a row could not be read, by column."""


class TableFile:
    """An open Parquet file. Its columns are called by unique names, those of `schema`.

    Raises pyarrow.ArrowException if it cannot be read; OSError, StorageError.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.size = file, file.seek(0, io.SEEK_END)
        with naming_damage():
            self.parquet = pq.ParquetFile(file)
            self.names = self.parquet.schema_arrow.names
            self.schema = unique_schema(self.parquet.schema_arrow)
            self.paths = [self.parquet.schema.column(index).path for index in range(len(self.parquet.schema))]  # of leaves
            groups = range(self.parquet.num_row_groups)
            self.group_rows = [self.parquet.metadata.row_group(group).num_rows for group in groups]
            self.num_rows = self.parquet.metadata.num_rows
        is_wrong = self.num_rows != sum(self.group_rows) or min(self.group_rows, default=0) < 0
        if is_wrong or self.num_rows > ROWS_PER_BYTE * self.size:
            raise pa.ArrowInvalid(f"its footer claims {self.num_rows} rows, in {self.size} bytes")

    def iter_rows(
        self, columns: Sequence[str], start: int, stop: int | None, *, batch: int
    ) -> Iterator[tuple[int, Row, ValueErrors]]:
        """Rows `start` to `stop` (None: the last) with their numbers, and the errors of values that cannot be read.

        Where a column cannot be read, the others are. Raises pyarrow.ArrowException where none can be.

        Args:
            columns: names in `schema`.
            batch: rows decoded at once, at most.
        """
        stop = self.num_rows if stop is None else stop
        first = 0
        for group, count in enumerate(self.group_rows):
            index, last = max(start, first), min(stop, first + count)
            errors: ValueErrors = {}
            while index < last:
                readable = [column for column in columns if column not in errors]
                try:
                    with naming_damage():
                        for row, problems in self._read_group(group, readable, index - first, last - first, batch):
                            yield index, row | dict.fromkeys(errors), problems | errors
                            index += 1
                    if index < last:
                        raise pa.ArrowInvalid(f"row {index} is not there, though the footer claims {self.num_rows}")
                except (pa.ArrowException, OSError) as error:
                    errors = errors or self._find_errors(group, columns)
                    if isinstance(error, StorageError) or not errors or len(errors) == len(columns):
                        raise
            first += count

    def _read_group(
        self, group: int, columns: Sequence[str], start: int, stop: int, batch: int
    ) -> Iterator[tuple[Row, ValueErrors]]:
        """Rows `start` to `stop` of a row group."""
        index = 0
        for table in self._read_batches(group, columns, batch):
            low, high = max(start - index, 0), min(stop - index, len(table))
            if low < high:
                yield from to_rows(table.slice(low, high - low))
            index += len(table)
            if index >= stop:
                return

    def _read_batches(self, group: int, columns: Sequence[str], batch: int) -> Iterator[pa.RecordBatch]:
        """A row group in batches, with the names of `schema`."""
        names = list(zip(self.schema.names, self.names, strict=True))
        asked = list(dict.fromkeys(plain for name, plain in names if name in set(columns)))
        came = list(dict.fromkeys(name for one in asked for name, plain in names if _is_read(plain, {one})))
        for table in self.parquet.iter_batches(self._fitting_batch(group, asked, batch), row_groups=[group], columns=asked):
            yield table.rename_columns(came).select(list(columns))

    def _find_errors(self, group: int, columns: Sequence[str]) -> ValueErrors:
        """The columns of a row group that cannot be read, and why."""
        errors: ValueErrors = {}
        for column in columns:
            try:
                with naming_damage():
                    for _ in self._read_batches(group, [column], PROBE_ROWS):
                        pass
            except (pa.ArrowException, OSError) as error:
                errors[column] = str(error)
        return errors

    def _fitting_batch(self, group: int, asked: Sequence[str], batch: int) -> int:
        """The number of rows that are decoded at once, so that a large value that comes often fills no memory."""
        row_group = self.parquet.metadata.row_group(group)
        if row_group.total_byte_size > max(UNPACKED_BYTES, UNPACKED_RATIO * self.size):
            raise pa.ArrowInvalid(f"{self.size} bytes unpack to {row_group.total_byte_size}: made to do harm")
        if row_group.total_byte_size * batch <= BATCH_BYTES:
            return batch
        longest = 1
        for index, path in enumerate(self.paths):
            if self.parquet.schema.column(index).physical_type == "BYTE_ARRAY" and _is_read(path, set(asked)):
                longest = max(longest, self._longest(group, index, batch))
        return max(min(batch, BATCH_BYTES // longest), 1)

    def _longest(self, group: int, index: int, batch: int) -> int:
        """Bytes of the longest value of a column's dictionary in a row group, which comes before the values; the size of the
        whole column, if it is not asked cheaply. Values that are in no dictionary come once each, and need no bound."""
        path = self.paths[index]
        parquet = pq.ParquetFile(
            self.file, metadata=self.parquet.metadata, read_dictionary=[path], buffer_size=PROBE_BYTES, pre_buffer=False
        )
        for table in parquet.iter_batches(batch, row_groups=[group], columns=[path]):
            values = table.column(0)
            if not pa.types.is_dictionary(values.type):  # inside of lists and structs
                # Asked only now: where a damaged footer contradicts itself, this ends the process, and reading raises an error.
                return int(self.parquet.metadata.row_group(group).column(index).total_uncompressed_size)
            if len(values.dictionary):
                return pc.max(pc.binary_length(values.dictionary)).as_py() or 1
        return 1


@contextmanager
def naming_damage() -> Iterator[None]:
    """Raise ArrowException for whatever pyarrow raises on a damaged file, but for errors of the storage."""
    try:
        yield
    except (pa.ArrowException, OSError):
        raise
    except Exception as error:  # such as UnicodeDecodeError, for a column's name
        raise pa.ArrowInvalid(f"{type(error).__name__}: {error}") from error


def _is_read(name: str, asked: set[str]) -> bool:
    """Whether pyarrow reads a column: its name is asked for, or begins with one that is, and a dot."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in asked for length in range(1, len(parts) + 1))


def to_rows(batch: pa.RecordBatch) -> list[tuple[Row, ValueErrors]]:
    """The rows of a batch, whose names are unique, each with its errors. A value that cannot be read is None.

    Texts that are no UTF-8 are decoded where their encoding is certain. A date that Python cannot hold becomes a number.
    """
    try:
        return [(row, {}) for row in batch.to_pylist()]
    except Exception:  # bytes that are no UTF-8, the year 300000, an unknown time zone: each type fails in its own way
        rows: list[tuple[Row, ValueErrors]] = [({}, {}) for _ in range(len(batch))]
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for (row, errors), scalar in zip(rows, column, strict=True):
            problems: list[str] = []
            row[name] = _read_value(scalar, problems)
            if problems:
                errors[name] = "; ".join(problems)
    return rows


def _read_value(scalar: pa.Scalar, problems: list[str]) -> Any:
    """A scalar as a Python value. What cannot be read in it is None, and `problems` says why."""
    try:
        return scalar.as_py()
    except Exception as error:  # as in `to_rows`
        problem = f"{scalar.type}: {error}"
    if isinstance(scalar, pa.DictionaryScalar):
        return _read_value(scalar.value, problems)
    if isinstance(scalar, pa.StructScalar):
        fields = enumerate(scalar.type)
        return {field.name: _read_value(scalar[index], problems) for index, field in fields}
    if isinstance(scalar, pa.ListScalar):  # maps too: lists of structs of key and value
        return [_read_value(value, problems) for value in scalar.values]
    if isinstance(scalar, pa.StringScalar):  # large strings and string views too
        try:
            return decode_caption(scalar.as_buffer().to_pybytes(), None)
        except RowRefused as refused:
            problem = refused.detail
    elif isinstance(number := getattr(scalar, "value", None), int):
        return f"{number} ({scalar.type})"
    problems.append(problem)
    return None
