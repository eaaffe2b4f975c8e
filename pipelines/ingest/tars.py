"""Lists and reads the images of a WebDataset tar, plain or compressed, and the side files of each.

A tar may be cut off, damaged, put together of several, full of links, or made to do harm: each costs what it must, and is told.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from pipelines.ingest.image_names import HEAD_BYTES, has_no_ending, looks_like_image
from pipelines.ingest.not_taken import TRAILING_BYTES
from pipelines.ingest.pairing import TarImage, find_images
from pipelines.storage.errors import StorageError

BLOCK = tarfile.BLOCKSIZE
CHUNK = 2**20
MAX_HEADER_BYTES = 2**20  # of names and attributes that stand before a member
MAX_GLOBAL_BYTES = 2**16  # of attributes for all members: Python's tarfile copies them for each
MAX_ZEROS = 2**24  # bytes after the end of an archive that are looked through for another one
UNPACKED_BYTES, UNPACKED_RATIO = 2**28, 200
"""A compressed tar may unpack to so many bytes, or to so many times its own size, whichever is more. Images hardly shrink."""
COMPRESSED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Types of members that are about the next member, and are read into memory."""
MAGIC, MAGIC_OFFSET = b"ustar", 257


@dataclass
class TarListing:
    """The images of a tar in order, what else it holds by kind, and why not all of it could be read, if so."""

    images: list[TarImage] = field(default_factory=list)
    not_taken: Counter[str] = field(default_factory=Counter)
    damage: Exception | None = None


class _CutOffError(tarfile.HeaderError):
    """The file ends where a header should be."""


class _Header(tarfile.TarInfo):
    """A header of Python's tarfile whose faults are all of one type, and which takes no more memory than it may."""

    def _proc_member(self, archive: tarfile.TarFile) -> "_Header":
        limit = MAX_GLOBAL_BYTES if self.type == tarfile.XGLTYPE else MAX_HEADER_BYTES
        if self.size < 0 or (self.type in HEADERS and self.size > limit):
            raise tarfile.HeaderError(f"a header of {self.size} bytes")
        try:
            return super()._proc_member(archive)  # type: ignore[misc]
        except (tarfile.HeaderError, OSError, EOFError, zlib.error, lzma.LZMAError):
            raise
        except Exception as error:  # numbers that are none, and whatever else a header can hold
            raise tarfile.HeaderError(f"{type(error).__name__}: {error}") from error


class TarReader:
    """Reads one tar from an open file."""

    def __init__(self, file: BinaryIO):
        head = file.read(BLOCK)
        self.size = file.seek(0, io.SEEK_END)
        file.seek(0)
        opener = next((opener for magic, opener in COMPRESSED if head.startswith(magic)), None)
        self.is_packed = opener is not None
        self.stream = cast(BinaryIO, opener(file)) if opener else file
        self.archive = tarfile.TarFile(fileobj=io.BytesIO(bytes(BLOCK)))  # it holds the state that headers are parsed with
        self.archive.fileobj = self.stream

    def list(self) -> TarListing:
        """List the images and their side files. Headers that are damaged are skipped.

        Raises tarfile.ReadError if it is no tar; StorageError if the storage does not answer.
        """
        found = TarListing()
        members: list[tarfile.TarInfo] = []
        sniffed: set[int] = set()
        try:
            for member in self._members(found):
                if member.isreg() and has_no_ending(member.name):
                    self.stream.seek(member.offset_data)
                    if looks_like_image(self.stream.read(min(HEAD_BYTES, member.size))):
                        sniffed.add(len(members))
                members.append(member)
        except StorageError:
            raise
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # of the decompressor
            found.damage = EOFError(f"it cannot be unpacked to its end: {error}")
        if not members and found.damage is not None:
            raise tarfile.ReadError(f"no tar, or damaged at its very beginning: {found.damage}")
        found.images = find_images(members, sniffed, found.not_taken)
        if found.damage is not None:
            found.damage.args = (f"{found.damage}; {len(found.images)} images were found",)
        return found

    def read(self, members: Mapping[str, tarfile.TarInfo]) -> dict[str, bytes | Exception]:
        """Read members, in the order in which the archive holds them: for each step back, a compressed archive is read again
        from its start. Raises StorageError."""
        contents: dict[str, bytes | Exception] = {}
        for name, member in sorted(members.items(), key=lambda named: named[1].offset_data):
            try:
                opened = self.archive.extractfile(member)
                assert opened is not None  # it is a file
                contents[name] = opened.read()
            except StorageError:
                raise
            except Exception as error:  # tarfile and the decompressors raise errors of many types
                contents[name] = error
        return contents

    def _members(self, found: TarListing) -> Iterator[tarfile.TarInfo]:
        """The members of the archive, and of further archives that follow it in the same file."""
        offset, data, is_first = 0, 0, True
        next_offset: int | None
        while True:
            try:
                if not self.is_packed and offset > self.size:
                    raise _CutOffError(f"the last member claims to end at byte {offset} of {self.size}")
                self.stream.seek(offset)
                block = self.stream.read(BLOCK)
                member = None if block == bytes(BLOCK) else self._parse(block, offset)
            except tarfile.HeaderError as error:
                if is_first and offset > 0:
                    found.not_taken[TRAILING_BYTES] += 1
                    return
                next_offset = self._skip_damage(offset, data, found, error)
            else:
                is_first = member is None
                if member is None:
                    next_offset = self._skip_zeros(offset, found)
                else:
                    next_offset, data = self.archive.offset, member.offset_data
                    yield member
                    if self.is_packed and next_offset > max(UNPACKED_BYTES, UNPACKED_RATIO * self.size):
                        raise EOFError(f"{self.size} bytes unpack to {next_offset}: a tar made to do harm")
            if next_offset is None:
                return
            offset = next_offset

    def _parse(self, block: bytes, offset: int) -> tarfile.TarInfo:
        """The member whose header begins with a block, from which the stream goes on. Raises tarfile.HeaderError."""
        if len(block) < BLOCK:
            raise _CutOffError(f"{len(block)} bytes of a header")
        self.archive.offset = offset
        try:
            member = _Header.frombuf(block, tarfile.ENCODING, "surrogateescape")
            member.offset = offset
            member = member._proc_member(self.archive)
        except ValueError as error:
            raise tarfile.HeaderError(str(error)) from error
        if member.size < 0 or self.archive.offset <= offset:
            raise tarfile.HeaderError(f"it claims {member.size} bytes")
        member.pax_headers = {}  # they may be large
        return member

    def _skip_zeros(self, offset: int, found: TarListing) -> int | None:
        """The offset of the first block after the end of an archive that is not of zeros. None: nothing else follows."""
        self.stream.seek(offset)
        for start in range(offset, offset + MAX_ZEROS, CHUNK):
            chunk = self.stream.read(CHUNK)
            rest = chunk.lstrip(b"\0")
            if rest:
                return start + (len(chunk) - len(rest)) // BLOCK * BLOCK
            if len(chunk) < CHUNK:
                return None
        found.not_taken[TRAILING_BYTES] += 1
        return None

    def _skip_damage(self, offset: int, data: int, found: TarListing, error: Exception) -> int | None:
        """The offset of the next header after a damaged one. None: there is none, and all after it is lost.

        Args:
            data: offset of the last member's content: the damage may be its size.
        """
        at_end = isinstance(error, _CutOffError)
        start = data if at_end else offset + BLOCK
        header = None if self.is_packed and at_end else self._find_header(start)
        if header is None:
            reason = "no end-of-archive mark" if at_end else f"{error} at byte {offset}"
            found.damage = found.damage or EOFError(f"the tar ends too early ({reason})")
        else:
            reason = f"{error} at byte {offset}" if not at_end else f"a wrong size before byte {data}"
            found.damage = found.damage or tarfile.ReadError(f"{reason}; what follows was found at byte {header}")
        return header

    def _find_header(self, start: int) -> int | None:
        """The offset of the first block, from the block at `start` on, that is a header."""
        self.stream.seek(start)
        while chunk := self.stream.read(CHUNK):
            place = chunk.find(MAGIC)
            while place >= 0:
                block = place - MAGIC_OFFSET
                if block >= 0 and block % BLOCK == 0 and _is_header(chunk[block : block + BLOCK]):
                    return start + block
                place = chunk.find(MAGIC, place + 1)
            start += len(chunk)
        return None


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True
