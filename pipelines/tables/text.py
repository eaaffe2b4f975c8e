"""Texts: those of captions, and small files of text."""

import unicodedata
from typing import Any

from pipelines.storage.files import read_file
from pipelines.tables.encodings import decode_text
from pipelines.tables.rejects import RowRefused

BLANKS = frozenset("\u2800\u3164\u115f\u1160\uffa0\u17b4\u17b5\u180b\u180c\u180d\u180e")
"""Characters that are letters or symbols by their category, and show nothing: a braille pattern without dots, fillers."""


def clean(caption: str | None) -> str | None:
    """Strip white space and replace what UTF-8 cannot hold by "?". Returns None if nothing is left that can be seen."""
    if not caption:
        return None
    text = caption.strip().encode(errors="replace").decode()
    return text if any(map(_is_visible, text)) else None


def _is_visible(character: str) -> bool:
    """Whether it is a letter, digit, punctuation mark or symbol that shows something by itself."""
    return unicodedata.category(character)[0] in "LNPS" and character not in BLANKS


def first_caption(value: Any) -> str | None:
    """The caption in a value that was read from a file: of a list the first that is a text and not empty. None: it has none."""
    texts = value if isinstance(value, list) else [value]
    return next((caption for text in texts if isinstance(text, str) and (caption := clean(text))), None)


def read_text(uri: str) -> str:
    """Read a text file, without the byte order mark at its head. Raises ValueError that names it if it is no UTF-8."""
    try:
        return decode_text(read_file(uri))
    except RowRefused as error:
        raise ValueError(f"{uri} is no text in UTF-8: {error.detail}; save it as UTF-8") from error
