"""Compare and swap: replace a small file only if it still holds what was read from it.

On a local disk, a lock on a second file beside it keeps other writers away between reading and writing. On S3 the request to
write carries a condition (If-None-Match, or If-Match with the ETag), and the store refuses one of two writers. A store that
refuses conditions, or ignores them, is read again `SETTLE_SECONDS` after the write: two writers that came within that time of
each other both see the same winner.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from tenacity import Retrying, retry_if_result, stop_after_attempt

from pipelines.storage.errors import StorageError
from pipelines.storage.files import is_local, read_file, remove_file, write_file
from pipelines.storage.retry import call
from sana_model.files.filesystems import open_filesystem
from sana_model.files.retry import Backoff

SETTLE_SECONDS = 1.0
LOCK_SUFFIX = ".lock"
CONFLICT = "ConditionalRequestConflict"  # another write was under way: AWS asks to try again
CONFLICTS = 4  # answers of this kind after which a swap gives up
CONFLICT_BACKOFF = Backoff(first=0.25, longest=2.0)
CONDITION_FAILED = {"PreconditionFailed", "NoSuchKey", CONFLICT}
NO_CONDITIONS = {"NotImplemented", "InvalidArgument", "MethodNotAllowed"}


def read_if_there(uri: str) -> bytes | None:
    """Read a whole file; None if it does not exist. Raises StorageError."""
    try:
        return read_file(uri)
    except FileNotFoundError:
        return None


def swap(uri: str, expected: bytes | None, content: bytes | None, *, settle: bool = False) -> bool:
    """Replace a file if it holds `expected`. Return whether it did; if not, nothing is changed.

    Args:
        expected: the file's content; None: there is no file.
        content: the new content, which no other writer would write too; None: the file is deleted.
        settle: others may be swapping at the same moment; on a remote store, look again after `SETTLE_SECONDS`.

    Raises StorageError.
    """
    if is_local(uri):
        with _locked(uri):
            if read_if_there(uri) != expected:
                return False
            _put(uri, content)
            return True
    if uri.startswith(("s3://", "s3a://")):
        swapped = _swap_on_s3(uri, expected, content)
    else:
        swapped = read_if_there(uri) == expected
        if swapped:
            _put(uri, content)
    if swapped and settle:
        time.sleep(SETTLE_SECONDS)
        swapped = read_if_there(uri) == content
    return swapped


def _put(uri: str, content: bytes | None) -> None:
    if content is None:
        remove_file(uri)
    else:
        write_file(uri, content)


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Hold the lock of a local file. The lock file stays: were it deleted, two processes could lock two files of one name."""
    path = Path(open_filesystem(uri)[1])

    def open_lock() -> Any:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(path.name + LOCK_SUFFIX).open("ab")

    with call(open_lock, "lock", uri) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _swap_on_s3(uri: str, expected: bytes | None, content: bytes | None) -> bool:
    conflicts = count()

    def attempt() -> bool | None:
        number = next(conflicts)
        if number > 0 and read_if_there(uri) == content:  # our write came late, and our repeat of it was refused
            return True
        return _try_on_s3(uri, expected, content) if number < CONFLICTS else None

    swapped = Retrying(
        retry=retry_if_result(lambda swapped: swapped is None),
        stop=stop_after_attempt(CONFLICTS + 1),  # the last one only looks
        wait=CONFLICT_BACKOFF,
        retry_error_callback=lambda state: None,
    )(attempt)
    if swapped is None:
        raise StorageError(f"cannot write {uri}: other writes were in conflict with it {CONFLICTS} times")
    return swapped


def _try_on_s3(uri: str, expected: bytes | None, content: bytes | None) -> bool | None:
    """Try once to swap. Return whether the file was swapped; None if another write was under way, which may have won."""
    filesystem, path = open_filesystem(uri)
    condition: dict[str, str] = {"IfNoneMatch": "*"}
    if expected is not None:
        try:
            condition = {"IfMatch": call(lambda: filesystem.info(path)["ETag"], "read", uri)}
        except FileNotFoundError:
            return False
    if read_if_there(uri) != expected:  # read after the ETag: its version or a later one
        return False
    try:
        refusal = call(lambda: _put_on_s3(filesystem, path, content, condition), "write", uri)
    except FileNotFoundError as error:
        raise StorageError(f"cannot write {uri}: there is no such bucket: make it, or give another ({error})") from error
    if refusal in NO_CONDITIONS:
        _put(uri, content)
        return True
    if refusal == CONFLICT:
        return None
    return refusal is None or read_if_there(uri) == content  # a repeat is refused if only the answer was lost


def _put_on_s3(filesystem: AbstractFileSystem, path: str, content: bytes | None, condition: dict[str, str]) -> str | None:
    """Write or delete an object under a condition. Return None, or the store's error code if it refuses the condition."""
    bucket, key, _ = filesystem.split_path(path)
    try:
        if content is None:
            filesystem.call_s3("delete_object", Bucket=bucket, Key=key, **condition)
        else:
            filesystem.call_s3("put_object", Bucket=bucket, Key=key, Body=content, **condition)
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}
        code = response.get("Error", {}).get("Code")
        if code in CONDITION_FAILED | NO_CONDITIONS:
            return code
        raise
    return None
