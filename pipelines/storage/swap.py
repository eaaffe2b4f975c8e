"""Compare and swap: replace a small file only if it still holds what was read from it.

On a local disk a lock on a file beside it makes the two steps one. On S3 the write carries its condition (If-None-Match, or
If-Match with the ETag): of two writers the store itself refuses one. A store that takes no conditions, or takes no notice of
them, is read again `SETTLE_SECONDS` after the write: two writers that came within that time of each other see one winner.
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
CONFLICT = "ConditionalRequestConflict"  # says nothing of the condition: AWS wants it tried again
CONFLICTS = 4  # such answers, before a swap gives up
CONFLICT_BACKOFF = Backoff(first=0.25, longest=2.0)
CONDITION_FAILED = {"PreconditionFailed", "NoSuchKey", CONFLICT}
NO_CONDITIONS = {"NotImplemented", "InvalidArgument", "MethodNotAllowed"}


def read_if_there(uri: str) -> bytes | None:
    try:
        return read_file(uri)
    except FileNotFoundError:
        return None


def swap(uri: str, expected: bytes | None, content: bytes | None, *, settle: bool = False) -> bool:
    """Put `content` in place of `expected` (None: no file); False, and nothing is changed, if something else is there.

    Args:
        content: differs from whatever another writer would put there.
        settle: others may be swapping at this very moment: on a remote store, look again after a while.

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
    """The lock file stays: to delete it would let two processes lock two files of one name."""
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
        if number > 0 and read_if_there(uri) == content:  # the write conflicted with itself, repeated since its answer was late
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
    """Whether it was swapped; None: another write was under way, and who won is to be seen."""
    filesystem, path = open_filesystem(uri)
    condition: dict[str, str] = {"IfNoneMatch": "*"}
    if expected is not None:
        try:
            condition = {"IfMatch": call(lambda: filesystem.info(path)["ETag"], "read", uri)}
        except FileNotFoundError:
            return False
    if read_if_there(uri) != expected:  # after the ETag: what is read is of that version or a later one
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
    return refusal is None or read_if_there(uri) == content  # a write whose answer was lost is refused when it is repeated


def _put_on_s3(filesystem: AbstractFileSystem, path: str, content: bytes | None, condition: dict[str, str]) -> str | None:
    """None, or the store's code if it refuses the condition."""
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
