"""Bytes to text, where their encoding is certain.

UTF-8 and byte order marks are certain, and so are some encodings of East Asia, once there is enough text. Detectors were tried
on captions in 25 languages: charset-normalizer was wrong for one caption in two, and for a third of a hundred captions
together; chardet and uchardet, where they agreed, for one in 60. A wrong guess would be worse than no text.
"""

import codecs
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

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
ESCAPES = (b"\x1b$B", b"\x1b$@", b"\x1b(J", b"\x1b(I")  # of ISO-2022-JP, all of whose bytes are ASCII
EAST_ASIAN = ("gb18030", "big5", "cp932", "euc_jp", "cp949")
CERTAIN_SHARE, DOUBTFUL_SHARE = 0.95, 0.7
"""An encoding is certain if so many of its characters are common ones, and fewer of all others'."""
CERTAIN_CHARACTERS = 8  # beyond ASCII, in which that is no chance
CERTAIN_HANGUL = 24  # the bytes of Hangul are common Chinese characters, always; and those of Chinese text Hangul, to 62%
PUNCTUATION = frozenset("，。、；：？！“”‘’（）《》〈〉「」『』【】—…·～￥％＋－．／＝ー々")
LATIN = ("cp1252", "cp1250", "cp1254", "cp1257", "cp1258")  # of Windows; ISO 8859's have the same letters at these places
LATIN_LETTERS = frozenset("äöüßéóÄÖÜÉÓ")
"""Letters that have the same byte in all of LATIN."""


def decode_text(content: bytes) -> str:
    """Decode a text. A byte order mark says how; without one it must be UTF-8.

    Raises RowRefused (unknown_encoding) if it is neither.
    """
    mark, encoding = next(((mark, name) for mark, name in MARKS if content.startswith(mark)), (b"", "utf-8"))
    try:
        return content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise RowRefused(UNKNOWN_ENCODING, f"no {encoding.upper()} ({error.reason} at byte {error.start})") from error


def decode_caption(content: bytes, encoding: str | None) -> str:
    """Decode a caption: as `decode_text`, or else as what it is for certain.

    Args:
        encoding: of captions that have no mark and are no UTF-8; None: they are refused, unless theirs is certain.

    Raises RowRefused (unknown_encoding): a wrong guess would be worse than no caption.
    """
    is_marked = any(content.startswith(mark) for mark, _ in MARKS)
    found = None if is_marked else _find_unmarked(content)
    try:
        text = content.decode(found) if found else decode_text(content)
    except UnicodeDecodeError as error:
        raise RowRefused(UNKNOWN_ENCODING, f"no {found} ({error.reason} at byte {error.start})") from error
    except RowRefused as refused:
        found = encoding or find_encoding([content])
        if found is None or is_marked:
            raise RowRefused(UNKNOWN_ENCODING, f"{refused.detail}: say which it is with text_encoding") from refused
        text = content.decode(found, errors="replace")
    if "\ufffd" in text:
        raise RowRefused(UNKNOWN_ENCODING, f"characters of it are lost, as {found or 'UTF-8'}")
    return text


def _find_unmarked(content: bytes) -> str | None:
    """The encoding of a text without a mark whose bytes look like UTF-8, and are not. Raises RowRefused if it is no text."""
    if any(escape in content for escape in ESCAPES):
        return "iso2022_jp_2"
    if b"\0" not in content:
        return None
    if not (wide := find_wide(content)):
        raise RowRefused(UNKNOWN_ENCODING, "it holds zero bytes, as no text does")
    return wide


def find_wide(content: bytes) -> str:
    """UTF-16 without a mark, by the zero bytes of its ASCII characters; empty if it is not that."""
    halves = content[0::2], content[1::2]
    zeros = [half.count(0) for half in halves]
    if len(content) % 2 or min(zeros) or 2 * max(zeros) < len(halves[0]):
        return ""
    return "utf-16-be" if zeros[0] else "utf-16-le"


def find_encoding(contents: Iterable[bytes]) -> str | None:
    """The encoding of texts that are no UTF-8, all together; None if it is not certain.

    In an East Asian encoding other than their own, texts become rare characters. Of Latin ones, a text is certain whose
    letters are the same in all of them; DOS and old Macintosh are not thought of.
    """
    content = b"\n".join(contents)
    shares = {name: _share_of_common(content, name) for name in EAST_ASIAN}
    best = max(shares, key=lambda name: shares[name][0])
    if not any(0x80 <= byte < 0xC0 for byte in content):  # only those of Cyrillic letters
        return LATIN[0] if _is_latin(content) else None
    share, count, has_kana = shares[best]
    is_clear = all(other < DOUBTFUL_SHARE for name, (other, _, _) in shares.items() if name != best)
    if share >= CERTAIN_SHARE and count >= CERTAIN_CHARACTERS and is_clear:
        return best if has_kana or best not in ("cp932", "euc_jp") else None
    if shares["cp949"][0] >= 0.99 and shares["cp949"][1] >= CERTAIN_HANGUL:
        return "cp949"
    return LATIN[0] if _is_latin(content) else None


def _share_of_common(content: bytes, encoding: str) -> tuple[float, int, bool]:
    """How many of the characters beyond ASCII are common ones of the encoding's language, as a share; their number; and
    whether there are Japanese syllables among them. 0 if the text is not of this encoding."""
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return 0.0, 0, False
    characters = [character for character in text if not character.isascii()]
    common = _common(encoding)
    share = sum(character in common for character in characters) / max(len(characters), 1)
    return share, len(characters), any("\u3041" <= character <= "\u30fa" for character in characters)


@cache
def _common(encoding: str) -> frozenset[str]:
    """The common characters: those of the first level of each standard, and punctuation."""
    rows = {  # two-byte codes, by their first and second bytes
        "gb18030": ("gb2312", range(0xB0, 0xD8)),
        "big5": ("big5", range(0xA4, 0xC7)),
        "cp932": ("euc_jp", [0xA4, 0xA5, *range(0xB0, 0xD0)]),
        "euc_jp": ("euc_jp", [0xA4, 0xA5, *range(0xB0, 0xD0)]),
        "cp949": ("euc_kr", range(0xB0, 0xC9)),
    }
    codec, firsts = rows[encoding]
    seconds = [*range(0x40, 0x7F), *range(0xA1, 0xFF)] if encoding == "big5" else range(0xA1, 0xFF)
    codes = (bytes([first, second]) for first in firsts for second in seconds)
    return frozenset("".join(code.decode(codec, errors="ignore") for code in codes)) | PUNCTUATION


def _is_latin(content: bytes) -> bool:
    """Whether a text is of Latin letters that have the same bytes in all of LATIN, most of each word ASCII."""
    try:
        text = content.decode(LATIN[0])
    except UnicodeDecodeError:
        return False
    if any(not character.isascii() and character not in LATIN_LETTERS for character in text):
        return False
    for word in text.split():
        letters = [letter for letter in word if letter.isalpha()]
        is_mixed = any(before.islower() and after.isupper() for before, after in pairwise(letters))
        if not word.isascii() and (is_mixed or 2 * sum(map(str.isascii, letters)) < len(letters)):
            return False
    return True
