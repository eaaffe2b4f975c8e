"""Bytes to text, where their encoding is certain."""

import codecs

from pipelines.tables.rejects import RowRefused

UNKNOWN_ENCODING = "unknown_encoding"
MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks, and the encodings that they announce."""


def decode_text(content: bytes) -> str:
    """Decode a text. A byte order mark says how; without one it must be UTF-8.

    Raises RowRefused (unknown_encoding) if it is neither: a wrong guess would be worse than no text.
    """
    mark, encoding = next(((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", "utf-8"))
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise RowRefused(UNKNOWN_ENCODING, f"no {encoding.upper()} ({error.reason} at byte {error.start})") from error
