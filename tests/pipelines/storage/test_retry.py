"""Operations on storage that fail: which are tried again, how often, and what is said."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import ParamValidationError

from pipelines.storage.errors import BadNameError, NotAFolderError, StorageError
from pipelines.storage.retry import call
from sana_model.files import retry
from sana_model.files.retry import Backoff


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "STORAGE_BACKOFF", Backoff(first=0.001, longest=0.01))


def failing(*errors: Exception) -> tuple[Callable[[], str], list[Exception]]:
    """An operation that raises these errors in turn, then succeeds; and those that it has not raised yet."""
    left = list(errors)

    def operation() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return operation, left


def test_a_failure_that_passes_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    operation, left = failing(TimeoutError("late"), EOFError("3 of 5 bytes came"), ConnectionResetError("reset"))
    with caplog.at_level(logging.WARNING):
        assert call(operation, "read", "s3://b/file") == "done" and not left
    first, second, _ = (record.getMessage() for record in caplog.records)
    assert first.startswith("cannot read s3://b/file (TimeoutError: late): attempt 1 of 8, again in 0.0 s")
    assert "(EOFError: 3 of 5 bytes came): attempt 2 of 8" in second


def test_after_the_last_attempt_the_error_says_so() -> None:
    operation, left = failing(*[TimeoutError("late")] * 9)
    with pytest.raises(StorageError, match=r"cannot list s3://b: gave up after 8 attempts, at last TimeoutError: late"):
        call(operation, "list", "s3://b")
    assert len(left) == 1


def test_a_file_in_place_of_a_folder_is_the_user_s_to_mend(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("read me")
    for uri in (f"{file}/images/_manifest.json", f"file://{file}/images"):
        operation, _ = failing(NotADirectoryError(20, "Not a directory"))
        with pytest.raises(NotAFolderError, match=f"^{file} is a file: give the folder of a dataset") as error:
            call(operation, "read", uri)
        assert error.value.error_kind == "wrong_input"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (FileNotFoundError("gone"), FileNotFoundError, "^gone$"),
        (OSError(28, "No space left on device"), StorageError, r"cannot write /a/b: the disk is full: .*\(OSError: "),
        (PermissionError("AccessDenied"), StorageError, "cannot write /a/b: access denied"),
        (OSError(36, "File name too long"), BadNameError, "^/a/b is no name that this storage takes: .*too long"),
        (ParamValidationError(report="Invalid bucket name"), BadNameError, "(?s)is no name that .*: .*Invalid bucket name"),
        (OSError("odd"), StorageError, "cannot write /a/b: the storage refuses it"),
        (KeyError("a fault of ours"), KeyError, "a fault of ours"),
    ],
)
def test_any_other_failure_is_raised_at_once(error: Exception, kind: type[Exception], message: str) -> None:
    operation, left = failing(error, error)
    with pytest.raises(kind, match=message):
        call(operation, "write", "/a/b")
    assert left == [error]
