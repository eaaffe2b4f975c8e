"""Files at any fsspec URI: read, listed and written with patience for failures that pass, and clear errors for the rest.

One loop decides how long to try (`ATTEMPTS`). Beneath it botocore repeats a single request twice by itself (a page of a
listing, a part of an upload: cheaper than the whole); s3fs's own repeats are switched off, since three layers multiply to
many minutes without a word, and none of them sees an answer that is cut short.
"""

import errno
import io
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from aiohttp import ClientError as HttpError
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.exceptions import HTTPClientError
from botocore.parsers import ResponseParserError
from fsspec import AbstractFileSystem
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem

from pipelines.storage.errors import StorageError

NUM_THREADS = 32  # that wait for the storage side by side, wherever many small files are read
ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds; doubled after each attempt: about a minute in all

S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"mode": "standard", "total_max_attempts": 3},
    },
}
"""Endpoint and credentials come from the environment, as botocore reads it (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID ...)."""

TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
TRANSIENT_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"}
TRANSIENT_TYPES = (
    HTTPClientError,
    BotoConnectionError,
    ResponseParserError,
    HttpError,
    FSTimeoutError,
    TimeoutError,
    ConnectionError,
    EOFError,
)
TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in ("EAGAIN", "EBUSY", "ENETUNREACH", "EHOSTUNREACH", "ETIMEDOUT", "ECONNRESET", "ESTALE", "EREMOTEIO")
    if hasattr(errno, name)
}
ADVICE = {
    errno.ENOSPC: "the disk is full: free space there and start again, what was finished stays",
    errno.EDQUOT: "the disk quota is used up: free space there and start again, what was finished stays",
    errno.EFBIG: "a file as large is not allowed: raise the limit (ulimit -f) or make smaller shards",
    errno.EROFS: "the file system is read-only: choose a folder that can be written",
    errno.EACCES: "permission denied: let this user read and write there, or choose another folder",
    errno.EPERM: "permission denied: let this user read and write there, or choose another folder",
}

logger = logging.getLogger(__name__)
T = TypeVar("T")


def open_filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URI (or local path), and the path on it, without a slash at its end.

    Its own calls are not repeated: wrap them in `call`.
    """
    if "::" in uri and "://" not in uri:  # part of a local file's name; in a URI it chains file systems
        return LocalFileSystem(), str(Path(uri).absolute())
    options = S3_OPTIONS if uri.startswith(("s3://", "s3a://")) else {}
    filesystem, path = fsspec.url_to_fs(uri, **options)
    if options:
        filesystem.retries = 1
    return filesystem, path.rstrip("/")


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", "local://"))


def call(operation: Callable[[], T], action: str, uri: str) -> T:
    """The operation's result; failures that may pass are tried again, `ATTEMPTS` times in all, after longer and longer pauses.

    Args:
        operation: safe to repeat.
        action: what it does, for the messages ("read", "write", "list").
        uri: what it does it to.

    Raises:
        FileNotFoundError: as the operation raised it.
        StorageError: whatever else kept it from succeeding.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation()
        except FileNotFoundError:
            raise
        except Exception as error:
            if not is_transient(error):
                if (advice := _advice(error)) is None:
                    raise
                raise StorageError(f"cannot {action} {uri}: {advice} ({_describe(error)})") from error
            if attempt == ATTEMPTS:
                raise StorageError(
                    f"cannot {action} {uri}: gave up after {ATTEMPTS} attempts, at last {_describe(error)}"
                ) from error
            wait = min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)
            logger.warning(
                "cannot %s %s (%s): attempt %d of %d, again in %.1f s", action, uri, _describe(error), attempt, ATTEMPTS, wait
            )
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's ClientError
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status in TRANSIENT_STATUS or response.get("Error", {}).get("Code") in TRANSIENT_CODES
        status = getattr(cause, "status", None) or getattr(cause, "code", None)  # of aiohttp, of gcsfs
        if isinstance(status, int):
            return status in TRANSIENT_STATUS
        if isinstance(cause, TRANSIENT_TYPES) or (isinstance(cause, OSError) and cause.errno in TRANSIENT_ERRNO):
            return True
    return False


def _advice(error: BaseException) -> str | None:
    for cause in _causes(error):
        if type(cause).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or an instance role"
        if isinstance(cause, OSError) and cause.errno in ADVICE:
            return ADVICE[cause.errno]
        if isinstance(cause, PermissionError):
            return "access denied: check the credentials, and what they may do there"
    return "the storage refuses it" if isinstance(error, OSError) else None


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(":")[:300]


def read_file(uri: str) -> bytes:
    """All of a file. Raises FileNotFoundError, StorageError."""
    filesystem, path = open_filesystem(uri)
    return call(lambda: filesystem.cat_file(path), "read", uri)


def open_file(uri: str, *, buffer_size: int = 2**20) -> BinaryIO:
    """A file to read anywhere in it: of a remote one only what is asked for is fetched, `buffer_size` bytes at least.

    Raises FileNotFoundError, StorageError, here and from every read.
    """
    filesystem, path = open_filesystem(uri)
    if is_local(uri):
        return call(lambda: cast(BinaryIO, open(path, "rb")), "read", uri)
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(filesystem, path, uri), buffer_size))


class _RemoteFile(io.RawIOBase):
    """Reads ranges of a remote file, each with the patience of `call`."""

    def __init__(self, filesystem: AbstractFileSystem, path: str, uri: str):
        self.filesystem, self.path, self.uri = filesystem, path, uri
        self.size = call(lambda: int(filesystem.size(path)), "read", uri)
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self.position)
        if count <= 0:
            return 0
        buffer[:count] = call(lambda: self._fetch(self.position, count), "read", self.uri)
        self.position += count
        return count

    def _fetch(self, start: int, count: int) -> bytes:
        content = self.filesystem.cat_file(self.path, start=start, end=start + count)
        if len(content) != count:
            raise EOFError(f"{len(content)} of {count} bytes came")
        return content


def list_folder(uri: str, *, with_files: bool = True) -> list[str]:
    """Names of what lies in a folder, sorted; empty if there is no such folder. Raises StorageError."""
    filesystem, root = open_filesystem(uri)

    def names() -> list[str]:
        filesystem.invalidate_cache()
        try:
            found = filesystem.ls(root, detail=True)
        except FileNotFoundError:
            return []
        paths = [entry["name"] for entry in found if with_files or entry["type"] != "file"]
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    return call(names, "list", uri)


def find_files(uri: str) -> dict[str, int]:
    """Path under the folder, and size in bytes, of every file at any depth. Raises StorageError."""
    filesystem, root = open_filesystem(uri)

    def files() -> dict[str, int]:
        filesystem.invalidate_cache()
        found = filesystem.find(root, detail=True)
        return {path.removeprefix(f"{root}/"): info["size"] or 0 for path, info in sorted(found.items())}

    return call(files, "list", uri)


def write_file(uri: str, content: bytes) -> None:
    """Put a file there, with its folders: readers see the old one or the whole new one, whatever dies meanwhile.

    Raises StorageError, and leaves nothing of the new file then.
    """
    filesystem, path = open_filesystem(uri)
    if is_local(uri):
        call(lambda: _replace(Path(path), content), "write", uri)
        return
    try:  # an object store shows an object only when all of it has arrived
        call(lambda: filesystem.pipe_file(path, content), "write", uri)
    except FileNotFoundError as error:
        raise StorageError(f"cannot write {uri}: there is no such bucket: make it, or give another ({error})") from error


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def upload_folder(folder: str | Path, uri: str) -> None:
    """Put every file under a local folder below a URI. Raises StorageError."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            write_file(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def remove_file(uri: str) -> None:
    """Nothing happens if it is not there. Raises StorageError."""
    filesystem, path = open_filesystem(uri)

    def remove() -> None:
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return

    call(remove, "delete", uri)


def remove_files(uris: Sequence[str]) -> None:
    """Those that are there; of an object store a thousand with each request. Raises StorageError."""
    if not uris:
        return
    if is_local(uris[0]):
        for uri in uris:
            remove_file(uri)
        return
    filesystem, _ = open_filesystem(uris[0])
    paths = [open_filesystem(uri)[1] for uri in uris]

    def remove() -> None:
        try:
            filesystem.rm(paths)
        except FileNotFoundError:  # one at least: a store that deletes one by one stops there
            for path in paths:
                if filesystem.exists(path):
                    filesystem.rm_file(path)

    call(remove, "delete", f"{uris[0]} and {len(uris) - 1} more")


def remove_leftovers(uri: str) -> None:
    """Delete what killed processes left half-written in a local folder. Nobody else may be writing there."""
    if not is_local(uri):
        return
    _, root = open_filesystem(uri)
    for path in Path(root).glob(".*.tmp"):
        call(partial(path.unlink, missing_ok=True), "delete", str(path))
