"""Run an operation on storage: try again if its failure may pass, and raise a clear error if it fails for good.

`sana_model.files.retry` says which failures may pass, how often they are tried again, and how long the waits are.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pipelines.storage.errors import BadNameError, NotAFolderError, StorageError
from sana_model.files import retry
from sana_model.files.redact import redact
from sana_model.files.retry import causes, describe, is_transient

ADVICE = {
    errno.ENOSPC: "the disk is full: free space there and start again, what was finished stays",
    errno.EDQUOT: "the disk quota is used up: free space there and start again, what was finished stays",
    errno.EFBIG: "a file as large is not allowed: raise the limit (ulimit -f) or make smaller shards",
    errno.EROFS: "the file system is read-only: choose a folder that can be written",
    errno.EACCES: "permission denied: let this user read and write there, or choose another folder",
    errno.EPERM: "permission denied: let this user read and write there, or choose another folder",
}
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # botocore's

NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)

T = TypeVar("T")


def call(operation: Callable[[], T], action: str, uri: str) -> T:
    """Run an operation and return its result. Failures that may pass are tried again, after longer and longer waits.

    Args:
        operation: safe to repeat.
        action: what it does, for the messages ("read", "write", "list").
        uri: what it does it to.

    Raises:
        FileNotFoundError: as the operation raised it.
        NotAFolderError: a file lies where a folder is needed.
        BadNameError: the storage takes no such name.
        StorageError: any other failure of the storage.
    """
    try:
        return retry.call_patiently(operation, f"{action} {uri}")
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise NotAFolderError(f"{redact(_find_file(uri))} is a file: give the folder of a dataset or of a training") from error
    except Exception as error:
        if _is_bad_name(error):
            raise BadNameError(f"{redact(uri)} is no name that this storage takes: {describe(error)}") from error
        if is_transient(error):
            reason = f"gave up after {retry.STORAGE_ATTEMPTS} attempts, at last {describe(error)}"
        elif advice := _advice(error):
            reason = f"{advice} ({describe(error)})"
        else:
            raise
        raise StorageError(f"cannot {action} {redact(uri)}: {reason}") from error


def _find_file(uri: str) -> str:
    """The file that a local path goes through as if it were a folder; the path itself if there is none."""
    path = Path(uri.removeprefix("file://"))
    return str(next((part for part in (path, *path.parents) if part.is_file()), path))


def _is_bad_name(error: BaseException) -> bool:
    invalid = type(error).__name__ == "ParamValidationError"  # botocore's, such as for a bucket with a colon
    return invalid or (isinstance(error, OSError) and error.errno in NO_NAME)


def _advice(error: BaseException) -> str | None:
    """What a user can do about a failure of the storage. None: it is no such failure."""
    for cause in causes(error):
        if type(cause).__name__ in NO_CREDENTIALS:
            return "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or an instance role"
        if isinstance(cause, OSError) and cause.errno in ADVICE:
            return ADVICE[cause.errno]
        if isinstance(cause, PermissionError):
            return "access denied: check the credentials, and what they may do there"
    return "the storage refuses it" if isinstance(error, OSError) else None
