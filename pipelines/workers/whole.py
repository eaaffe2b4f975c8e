"""Refuses images whose end is missing or damaged, and which decoders take for whole.

Such are downloads and copies that got their size first and broke off: the rest of the file is of zero bytes, in which a decoder
sees pixels. (A good WebP may end in zero bytes, and those of BMP and TIFF may be pixels: nothing tells there.)
"""

import struct
import zlib

from pipelines.tables.rejects import RowRefused


def check_whole(image_bytes: bytes, format: str | None) -> None:
    """Check the end of a JPEG, and the checksums of a PNG's pixels. `format`: Pillow's name. Raises RowRefused: truncated,
    corrupt."""
    if format in ("JPEG", "MPO"):
        scan = _find_scan(image_bytes)
        if scan is not None and image_bytes.find(b"\xff\xd9", scan) < 0:
            raise RowRefused("truncated", "no end-of-image mark after its data")
    elif format == "PNG":
        _check_png(image_bytes)


def _find_scan(image_bytes: bytes) -> int | None:
    """Where the first scan of a JPEG begins, behind the segments that may hold other JPEGs; None if that is not certain."""
    place = 2
    while place + 4 <= len(image_bytes):
        mark, kind, size = struct.unpack_from(">BBH", image_bytes, place)
        if mark != 0xFF or kind == 0xFF:
            return None
        if kind == 0xDA:
            return place
        place += 2 + size
    return None


def _check_png(image_bytes: bytes) -> None:
    place = 8
    content = memoryview(image_bytes)
    while place + 12 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + size
        if kind == b"IEND" or end + 4 > len(content):
            return
        if kind == b"IDAT" and zlib.crc32(content[place + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise RowRefused("corrupt", f"the checksum of its pixels at byte {place} is wrong")
        place = end + 4
