"""Reads CSV, TSV and JSON lines. A line that is no row costs that line, and is told; the lines after it are read."""

import io
import re
from collections import deque
from collections.abc import Iterator
from typing import BinaryIO

from pipelines.ingest.columns import unique_names
from pipelines.ingest.sidecars import load_json
from pipelines.tables.encodings import MARKS, decode_caption, decode_text, find_wide
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row

LIST_ERROR = "list_error"  # key of a row that could not be parsed, with the reason
VALUE_ERRORS = "value_errors"  # key of a row in which values could not be read, with the reasons by column
MAX_LINE = 2**22  # characters: a row may hold a whole image, as a URL that begins with "data:"
MAX_FIELD = 2**20  # characters of a field that goes over several lines
LINE_ENDS = "\r\n"
MAX_COLUMNS = 10_000  # of a table: a row that lacks them all tells so for each
_EXCEL = re.compile(r"sep=(.)[\r\n]*$", re.IGNORECASE)  # a first line that Excel writes and obeys
_OPENING = re.compile(r' *"')
_QUOTED = re.compile(r'(?:[^"]|"")*+')  # what stands between the quotes of a field
_ESCAPED = re.compile(r'(?:[^"\\]|\\.)*+', re.DOTALL)  # the same where a quote in it is \"
_ESCAPE = re.compile(r'\\(["\\])')
_URL = re.compile(r' *"?[a-z][a-z0-9+.-]*://', re.IGNORECASE)  # a line that begins so is a row of its own


def read_table(file: BinaryIO, path: str, text_encoding: str | None = None) -> Iterator[Row]:
    """The rows of a text file: CSV, TSV or JSON lines, by the ending of its path.

    A byte order mark tells its encoding. Without one it is UTF-8, or UTF-16 by the zero bytes of its first characters.

    A row that cannot be parsed has LIST_ERROR alone. A value that cannot be read is None, and is in VALUE_ERRORS.

    Args:
        text_encoding: of values that are no UTF-8, as in `decode_caption`.
    """
    head = file.read(4)
    file.seek(0)
    encoding = next((name for mark, name in MARKS if head.startswith(mark)), (b"\0" in head and find_wide(head)) or "utf-8")
    text = io.TextIOWrapper(file, encoding, errors="surrogateescape" if encoding == "utf-8" else "replace", newline="")
    lines, lower = _iter_lines(text), path.lower()
    if lower.endswith((".csv", ".tsv")):
        return (_decode_values(row, text_encoding) for row in read_csv(lines, is_tsv=lower.endswith(".tsv")))
    return read_json_lines(lines)


def _iter_lines(text: io.TextIOWrapper) -> Iterator[str | None]:
    """The lines of a text, without a byte order mark; None for one that is too long to be held."""
    is_first = True
    while line := text.readline(MAX_LINE):
        if is_first:
            line, is_first = line.removeprefix("\ufeff"), False
        if len(line) < MAX_LINE or line[-1] in LINE_ENDS:
            yield line
            continue
        while line and line[-1] not in LINE_ENDS:
            line = text.readline(MAX_LINE)
        yield None


def _decode_values(row: Row, text_encoding: str | None) -> Row:
    """Decode the values whose bytes are no UTF-8, which were read as surrogates."""
    errors: dict[str, str] = {}
    for name, value in row.items():
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                try:
                    row[name] = decode_caption(value.encode("utf-8", "surrogateescape"), text_encoding)
                except RowRefused as refused:
                    row[name], errors[name] = None, refused.detail
    return row | {VALUE_ERRORS: row.get(VALUE_ERRORS, {}) | errors} if errors else row


def _decode_name(name: str) -> str:
    """The name of a column, readable whatever its encoding is."""
    content = name.encode("utf-8", "surrogateescape")
    try:
        return decode_text(content)
    except RowRefused:
        return content.decode("utf-8", "backslashreplace")


class _Lines:
    """An iterator of lines, to which lines can be given back."""

    def __init__(self, lines: Iterator[str | None]):
        self.lines = lines
        self.waiting: deque[str | None] = deque()

    def __iter__(self) -> Iterator[str | None]:
        return self

    def __next__(self) -> str | None:
        return self.waiting.popleft() if self.waiting else next(self.lines)

    def give_back(self, taken: list[str | None]) -> None:
        self.waiting.extendleft(reversed(taken))


def read_csv(lines: Iterator[str | None], *, is_tsv: bool) -> Iterator[Row]:
    """The rows of a table of text, by the names in its first line. Empty lines are passed over.

    A field may be quoted, with quotes in it doubled or escaped by a backslash, and then hold line breaks. A quote that does not
    close its field costs its line. Where a ".csv" has no comma in its first line, its delimiter is the tab, ";" or "|".
    """
    source = _Lines(lines)
    names: list[str] = []
    delimiter = "\t" if is_tsv else ","
    for line in source:
        if line is not None and not line.strip(LINE_ENDS):
            continue
        if not names and line is not None and (told := _EXCEL.match(line)):
            delimiter = told[1]
            continue
        if not names and line is not None and delimiter not in line:
            delimiter = next((other for other in "\t;|" if other in line), delimiter)
        try:
            fields = _read_record(line, source, delimiter, len(names), is_tsv)
        except ValueError as error:
            yield dict.fromkeys(names) | {LIST_ERROR: str(error)}
            continue
        if not names and len(fields) > MAX_COLUMNS:
            yield {LIST_ERROR: f"{len(fields)} columns, over {MAX_COLUMNS}"}
            return
        if not names:
            names = unique_names(_decode_name(name).strip() for name in fields)
            continue
        row: Row = dict.fromkeys(names) | dict(zip(names, fields, strict=False))
        if absent := names[len(fields) :]:
            row[VALUE_ERRORS] = dict.fromkeys(absent, f"the row has {len(fields)} of {len(names)} fields")
        yield row


def _read_record(line: str | None, lines: _Lines, delimiter: str, width: int, is_tsv: bool) -> list[str]:
    """The fields of the record that begins with a line, and may go on in the next ones.

    Args:
        width: number of fields that it may have; 0: any.

    Raises ValueError if it is none; the next lines are left where they are then.
    """
    if line is None:
        raise ValueError(f"a line of more than {MAX_LINE} characters")
    plain = line.rstrip(LINE_ENDS).split(delimiter)
    if '"' not in line:
        fields: list[str] | None = plain
    else:
        for pattern in (_QUOTED, _ESCAPED):
            taken: list[str | None] = []
            fields = _parse(line, lines, delimiter, pattern, taken)
            if fields is not None and (not width or len(fields) <= width):
                return fields
            lines.give_back(taken)
        if is_tsv:  # many have no quoting at all
            fields = plain
    if fields is None:
        raise ValueError("a quote is opened, and not closed where a field ends")
    if width and any(fields[width:]):
        raise ValueError(f"{len(fields)} fields, and the first line names {width}")
    return fields[:width] if width else fields


def _parse(
    line: str, lines: Iterator[str | None], delimiter: str, pattern: re.Pattern[str], taken: list[str | None]
) -> list[str] | None:
    """The fields of a record, some of them quoted; None if a quote does not close its field.

    Args:
        pattern: of what may stand between the quotes of a field.
        taken: the further lines that it needed are added to it.
    """
    fields: list[str] = []
    place = 0
    while True:
        quote = _OPENING.match(line, place)
        if quote is None:
            end = line.find(delimiter, place)
            if end < 0:
                return [*fields, line[place:].rstrip(LINE_ENDS)]
            fields.append(line[place:end])
            place = end + 1
            continue
        place, pieces, size = quote.end(), [], 0
        while (end := _end_of(pattern, line, place)) == len(line):
            pieces.append(line[place:])
            size += len(line)
            following = next(lines, None)
            taken.append(following)
            if following is None or size > MAX_FIELD or _URL.match(following):
                if following is None:
                    taken.pop()
                return None
            line, place = following, 0
        text = "".join([*pieces, line[place:end]])
        fields.append(text.replace('""', '"') if pattern is _QUOTED else _ESCAPE.sub(r"\1", text))
        place = end + 1
        if not line[place:].strip(LINE_ENDS):
            return fields
        if line[place] != delimiter:
            return None
        place += 1


def _end_of(pattern: re.Pattern[str], line: str, place: int) -> int:
    found = pattern.match(line, place)
    assert found is not None  # it matches nothing too
    return found.end()


def read_json_lines(lines: Iterator[str | None]) -> Iterator[Row]:
    """The objects of JSON lines; for a line that holds none, an object whose LIST_ERROR says why."""
    for line in lines:
        if line is not None and not line.strip():
            continue
        try:
            if line is None:
                raise ValueError(f"a line of more than {MAX_LINE} characters")
            record = load_json(line if line.isascii() else line.encode("utf-8", "surrogateescape"))
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            record = {LIST_ERROR: str(error)}
        except RowRefused as refused:
            record = {LIST_ERROR: refused.detail}
        yield record
