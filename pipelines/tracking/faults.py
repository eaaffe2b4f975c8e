"""What MLflow raises: which errors pass by themselves, which never will, and how they are told to people."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from mlflow.exceptions import MlflowException
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from pipelines.storage.errors import ErrorKind, StorageError
from sana_model.files.redact import redact
from sana_model.files.retry import TRANSIENT_STATUS, is_transient

SERVER_ERROR = 500
BUSY = ("locked", "busy", "disk i/o", "is full")
"""Parts of what SQLite says when the same call may succeed a little later."""
FIXES = (
    ("no module named", "install the driver of that database (psycopg2-binary, pymysql), or take another tracking.uri"),
    ("not a database", "the file holds something else: give tracking.uri another name"),
    ("unable to open database file", "its folder must exist, and be writable"),
    ("readonly database", "its file and its folder must be writable"),
    ("permission", "its file and its folder must be writable"),
    ("out-of-date database schema", "an older MLflow made it: back it up, and run `mlflow db upgrade` on it"),
    ("401", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
    ("403", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"),
    ("certificate", "set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate that it is signed with"),
    ("404", "is there an MLflow server at this address? set tracking.uri, or MLFLOW_TRACKING_URI"),
)
"""Parts of an error's message, in lower case, and what to do about it."""
ANY_FIX = "set tracking.uri, or MLFLOW_TRACKING_URI, to a server (http://host:5000) or a file (sqlite:////folder/mlflow.db)"


class TrackingError(ValueError):
    """MLflow will never take the runs as things are: an address that is none, a deleted experiment, no rights."""

    error_kind: ClassVar[ErrorKind] = "wrong_input"


def is_passing(error: BaseException) -> bool:
    """Whether the same call to MLflow may succeed later: the server, the network or a lock is at fault, not what was asked."""
    if isinstance(error, StorageError):
        return True
    if isinstance(error, MlflowException):
        status, told = error.get_http_status_code(), str(error).lower()
        if status not in TRANSIENT_STATUS and status < SERVER_ERROR:
            return False
        # MLflow gives nearly everything that fails in this process the code of a server's error.
        return "certificate verify failed" not in told and ("api request to" in told or any(word in told for word in BUSY))
    if isinstance(error, (OperationalError, InterfaceError, sqlite3.OperationalError)):
        told = str(error).lower()
        is_file = "sqlite3" in told or isinstance(error, sqlite3.Error)
        return not is_file or any(word in told for word in BUSY)
    return is_transient(error)


def is_refused(error: BaseException) -> bool:
    """Whether MLflow takes other things, but never what was logged: it has a name or a value that is not allowed."""
    if isinstance(error, MlflowException):
        known = error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INTERNAL_ERROR")
        return known and not is_passing(error) and "must be in the" not in str(error)  # a run that was deleted
    return isinstance(error, (ValueError, TypeError)) and not isinstance(error, TrackingError)


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])[:200]


def tell_waiting(error: BaseException, uri: str) -> str:
    """The notice that MLflow cannot be reached now, while a training goes on."""
    return f"MLflow at {uri} cannot be reached, figures wait and are sent later: {first_line(error)}"


def describe(error: BaseException, uri: str) -> Exception:
    """The error for people: a TrackingError that says what to do, or a StorageError if it may pass."""
    if isinstance(error, (TrackingError, StorageError)):
        return error
    reason, uri = first_line(error), redact(uri)
    if is_passing(error):
        return StorageError(f"MLflow cannot keep its runs in {uri}: {reason}. What was finished stays; try again later")
    fix = next((fix for part, fix in FIXES if part in reason.lower()), ANY_FIX)
    return TrackingError(f"MLflow cannot keep its runs in {uri}: {reason}: {fix}")


@contextmanager
def naming_the_store(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into those that `describe` makes."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, OSError, ImportError) as error:
        raise describe(error, uri) from error
