"""Errors of storage, and the kinds of errors, which decide a job's exit code."""

from typing import ClassVar, Literal

ErrorKind = Literal["wrong_input", "fault", "too_many_rejects", "training_failed", "stopped"]
"""Who has to act on an error, and how; `jobs.common.exit_codes` gives each kind a number."""


def is_expected(error: BaseException) -> bool:
    """Whether a user can fix it, or it passes by itself: such an error is shown as one message, without a traceback."""
    return hasattr(error, "error_kind") or isinstance(error, (FileNotFoundError, ValueError, ConnectionError))


class StorageError(OSError):
    """A file could not be read or written; the message names it, and what to do."""

    error_kind: ClassVar[ErrorKind] = "fault"


class NotAFolderError(StorageError):
    """A file lies where a folder is needed, as when a user gives a file for a dataset."""

    error_kind: ClassVar[ErrorKind] = "wrong_input"


class BadNameError(StorageError):
    """No file or folder of the storage can have this name."""

    error_kind: ClassVar[ErrorKind] = "wrong_input"


class LeaseHeldError(ValueError):
    """Another writer is at work on the table."""

    error_kind: ClassVar[ErrorKind] = "fault"


class LeaseLostError(RuntimeError):
    """Another writer has taken the table over."""

    error_kind: ClassVar[ErrorKind] = "fault"
