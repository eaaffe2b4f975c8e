"""Which failures pass, how long the waits are, and what a server's Retry-After means."""

import pkgutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import ClientPayloadError, ClientResponseError, RequestInfo
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from huggingface_hub.errors import OfflineModeIsEnabled
from multidict import CIMultiDict, CIMultiDictProxy
from tenacity import Future, RetryCallState, Retrying
from yarl import URL

from sana_model.files import retry
from sana_model.files.retry import Backoff, call_patiently, is_transient, parse_retry_after


class Asking(Exception):
    """A failure with which a server asks to wait."""

    def __init__(self, retry_after: float | None):
        self.retry_after = retry_after


def attempt(number: int, error: Exception) -> RetryCallState:
    """The state of tenacity after an attempt that failed."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = number
    state.outcome = Future.construct(number, error, has_exception=True)
    return state


@pytest.mark.parametrize(("number", "whole"), [(1, 0.5), (2, 1.0), (5, 8.0), (7, 30.0), (5000, 30.0)])
def test_waits_double_up_to_the_longest_and_are_spread(number: int, whole: float) -> None:
    waits = [Backoff(first=0.5, longest=30.0)(attempt(number, TimeoutError())) for _ in range(50)]
    assert all(whole / 2 <= wait <= whole for wait in waits) and len(set(waits)) > 1


@pytest.mark.parametrize(("asked", "least"), [(0.25, 0.25), (7.0, 7.0), (86400.0, 30.0), (float("inf"), 30.0)])
def test_a_server_that_asks_to_wait_is_obeyed_within_the_bound(asked: float, least: float) -> None:
    for number in (1, 6):
        assert least <= Backoff(first=0.5, longest=30.0)(attempt(number, Asking(asked))) <= least + 0.5
    assert Backoff(first=0.5, longest=30.0)(attempt(1, Asking(None))) <= 0.5


@pytest.mark.parametrize("value", [None, "", "0", "-3", "nan", "soon", "Wed, 21 Oct 2015 07:28:00 GMT", "31 Foo 2099"])
def test_a_retry_after_that_asks_for_no_wait(value: str | None) -> None:
    assert parse_retry_after(value) is None


def test_a_retry_after_in_seconds_or_as_a_date() -> None:
    assert (parse_retry_after("120"), parse_retry_after("1.5")) == (120.0, 1.5)
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 80 < (parse_retry_after(date) or 0) <= 90


def http_error(status: int) -> ClientResponseError:
    request = RequestInfo(URL("http://x/a"), "GET", CIMultiDictProxy(CIMultiDict()), URL("http://x/a"))
    return ClientResponseError(request, (), status=status)


def s3_error(status: int, code: str = "Odd") -> OSError:
    """As s3fs raises it: an OSError from botocore's."""
    error = OSError(code)
    error.__cause__ = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")
    return error


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_statuses_that_pass(status: int) -> None:
    assert is_transient(http_error(status)) and is_transient(s3_error(status))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 501])
def test_statuses_that_do_not_pass(status: int) -> None:
    assert not is_transient(http_error(status)) and not is_transient(s3_error(status))


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (s3_error(400, "RequestTimeout"), True),
        (ReadTimeoutError(endpoint_url="http://x"), True),
        (EndpointConnectionError(endpoint_url="http://x"), True),
        (ClientPayloadError("cut short"), True),
        (ConnectionResetError(), True),
        (EOFError(), True),
        (OSError(116, "Stale file handle"), True),
        (OSError(28, "No space left on device"), False),
        (FileNotFoundError(2, "gone"), False),
        (OfflineModeIsEnabled("as the user wishes"), False),
        (ValueError("a fault of ours"), False),
    ],
)
def test_errors_that_pass(error: Exception, passes: bool) -> None:
    assert is_transient(error) is passes


def test_every_name_of_a_library_s_error_is_right() -> None:
    for name in retry.TRANSIENT_NAMES | retry.LASTING_NAMES:
        assert issubclass(pkgutil.resolve_name(name), Exception), name


def test_the_last_error_is_raised_after_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "STORAGE_BACKOFF", Backoff(first=0.001, longest=0.01))
    monkeypatch.setattr(retry, "STORAGE_ATTEMPTS", 3)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise TimeoutError(f"number {len(calls)}")

    with pytest.raises(TimeoutError, match="number 3"):
        call_patiently(fail, "read x")


def test_no_heavy_library_is_imported_for_it() -> None:
    heavy = ("torch", "transformers", "aiohttp", "botocore", "s3fs")
    code = "import sys, sana_model.files.retry, sana_model.files.filesystems, sana_model.files.atomic; "
    code += f"print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
