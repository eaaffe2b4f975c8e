"""JSON files that tell whether they are whole: the last two fields are checksums of all that the file holds.

A reader refuses a file that is not what was written, whether a disk or a person changed it. With the CRC-32 a single flipped
bit is found in one pass, and the SHA-256 says whether it was that. Files of earlier versions have no such fields, and are read
as before.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

CRC, SHA = "crc32", "sha256"
CRC_DIGITS, SHA_DIGITS = 8, 64
END = re.compile(rb'"crc32": "([0-9a-f]{8})",\s+"sha256": "([0-9a-f]{64})"\s*\}\n\Z')
KEYS = re.compile(rb'"(crc32|sha256)"')
SHA_FORM = re.compile("[0-9a-f]{64}")
END_BYTES = 160  # more than END ever takes
POLYNOMIAL = 0xEDB88320  # of CRC-32


def to_hashed_json(content: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """JSON with its checksums. `content` must have no field of their names."""
    fields = {**content, CRC: "0" * CRC_DIGITS, SHA: "0" * SHA_DIGITS}
    text = (json.dumps(fields, indent=indent) + "\n").encode()
    end = _find_end(text)
    assert end is not None
    return _fill_in(text, end)


def from_hashed_json(content: bytes) -> Any:
    """The content of a JSON file, without its checksums. Raises ValueError if it is not what was written, or no JSON."""
    end = _find_end(content)
    if end is not None and _fill_in(content, end) != content:
        raise ValueError("its content is not that of its checksum: it was damaged or edited")
    try:
        fields = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    named = fields.items() if isinstance(fields, dict) else ()
    if end is None and (KEYS.search(content) or any(_is_checksum(name, value) for name, value in named)):
        raise ValueError("its checksum was damaged or edited")
    if isinstance(fields, dict) and end is not None:
        del fields[CRC], fields[SHA]
    return fields


def _is_checksum(name: str, value: object) -> bool:
    """Whether a field looks like the SHA-256 with a name that was damaged."""
    return name != "fingerprint" and isinstance(value, str) and SHA_FORM.fullmatch(value) is not None


def mend(content: bytes) -> bytes | None:
    """The file as it was, if a single bit of it was flipped; None if more was changed, or nothing, or it has no checksums."""
    if (whole := _find_end(content)) is not None and _fill_in(content, whole) == content:
        return None
    for candidate in _candidates(content):
        end = _find_end(candidate)
        if end is not None and hashlib.sha256(_blank(candidate, end)).hexdigest().encode() == end[2]:
            return _fill_in(candidate, end)
    return None


def _candidates(content: bytes) -> Iterator[bytes]:
    end = _find_end(content)
    if end is None:  # then the bit is in the form of the checksums
        for place in range(max(len(content) - END_BYTES, 0), len(content)):
            for bit in range(8):
                yield _flip(content, place, bit)
        return
    blank = _blank(content, end)
    if _fill_in(blank, end)[end.start(1) : end.end(1)] == end[1]:  # then the bit is in the SHA-256
        yield _fill_in(blank, end)
        return
    yield content  # the bit may be in the CRC-32
    table = _crc_table()
    tops = {entry >> 24: index for index, entry in enumerate(table)}
    singles = {table[1 << bit]: bit for bit in range(8)}  # what a flipped bit in the last byte does to the CRC-32
    state = zlib.crc32(blank) ^ int(end[1], 16)
    for place in reversed(range(len(blank))):
        if state in singles:
            yield _flip(content, place, singles[state])
        index = tops[state >> 24]
        state = ((state ^ table[index]) << 8 | index) & 0xFFFFFFFF


@cache
def _crc_table() -> tuple[int, ...]:
    """The CRC-32, without its inversions, of each byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


def _flip(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def _find_end(content: bytes) -> re.Match[bytes] | None:
    return END.search(content, max(len(content) - END_BYTES, 0))


def _blank(content: bytes, end: re.Match[bytes]) -> bytes:
    """The file with zeros for its checksums."""
    blank = bytearray(content)
    blank[slice(*end.span(1))], blank[slice(*end.span(2))] = b"0" * CRC_DIGITS, b"0" * SHA_DIGITS
    return bytes(blank)


def _fill_in(content: bytes, end: re.Match[bytes]) -> bytes:
    """The file with the checksums of its content."""
    blank = _blank(content, end)
    filled = bytearray(blank)
    filled[slice(*end.span(1))] = f"{zlib.crc32(blank):0{CRC_DIGITS}x}".encode()
    filled[slice(*end.span(2))] = hashlib.sha256(blank).hexdigest().encode()
    return bytes(filled)
