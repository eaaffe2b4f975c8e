"""Which failures pass by themselves, how long to wait before trying again, and what a server asks for (Retry-After).

Everything here that tries again does so through tenacity with these parts; each caller sets its own number of attempts. Errors
of optional libraries are known by name, so that none of these libraries is imported, or even needed.
"""

import errno
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential
from tenacity.wait import wait_base

from sana_model.files.redact import redact

TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 531)})
"""HTTP: the same request may succeed later. 520 to 530 say so at Cloudflare and others: the server behind does not answer."""
TRANSIENT_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException"}
"""Error codes of S3."""
TRANSIENT_TYPES = (TimeoutError, ConnectionError, EOFError)
TRANSIENT_NAMES = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.parsers.ResponseParserError",
    "fsspec.exceptions.FSTimeoutError",
}
LASTING_NAMES = {"huggingface_hub.errors.OfflineModeIsEnabled"}
"""A ConnectionError by its type, and yet what its user asked for (`HF_HUB_OFFLINE`)."""
TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in ("EAGAIN", "EBUSY", "ENETUNREACH", "EHOSTUNREACH", "ETIMEDOUT", "ECONNRESET", "ESTALE", "EREMOTEIO")
    if hasattr(errno, name)
}

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Backoff(wait_base):
    """Waits that double after each attempt (a `wait` of tenacity), shortened at random by up to half: callers spread out.

    A result or exception with a `retry_after` (seconds that the server asked for) is waited for that long instead.

    Args:
        first: seconds before the second attempt.
        longest: seconds; no wait is longer, whatever the server asks for.
    """

    first: float
    longest: float

    def __call__(self, retry_state: RetryCallState) -> float:
        outcome = retry_state.outcome
        assert outcome is not None
        asked = getattr(outcome.exception() if outcome.failed else outcome.result(), "retry_after", None)
        if asked is not None:
            return min(asked, self.longest) + random.uniform(0.0, min(1.0, self.first))
        return wait_exponential(multiplier=self.first, max=self.longest)(retry_state) * random.uniform(0.5, 1.0)


STORAGE_ATTEMPTS = 8
STORAGE_BACKOFF = Backoff(first=0.5, longest=30.0)
"""Together about a minute."""


def call_patiently(operation: Callable[[], T], action: str) -> T:
    """Run an operation on storage; while it fails for a reason that passes, try again, `STORAGE_ATTEMPTS` times in all.

    Args:
        operation: safe to repeat.
        action: what it does, for the log ("read s3://bucket/file").

    Raises the last attempt's error. FileNotFoundError is raised at once.
    """

    def log(state: RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        error = describe(state.outcome.exception())
        attempt = f"attempt {state.attempt_number} of {STORAGE_ATTEMPTS}"
        logger.warning("cannot %s (%s): %s, again in %.1f s", redact(action), error, attempt, state.next_action.sleep)

    return Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(STORAGE_ATTEMPTS),
        wait=STORAGE_BACKOFF,
        before_sleep=log,
        reraise=True,
    )(operation)


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later."""
    if isinstance(error, FileNotFoundError):
        return False
    for cause in causes(error):
        names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(cause).__mro__}
        if names & LASTING_NAMES:
            return False
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's ClientError
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status in TRANSIENT_STATUS or response.get("Error", {}).get("Code") in TRANSIENT_CODES
        status = getattr(cause, "status", None) or getattr(cause, "code", None)  # of aiohttp, of gcsfs
        if isinstance(status, int):
            return status in TRANSIENT_STATUS
        if isinstance(cause, TRANSIENT_TYPES) or (isinstance(cause, OSError) and cause.errno in TRANSIENT_ERRNO):
            return True
        if names & TRANSIENT_NAMES:
            return True
    return False


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and the chain of errors that it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def describe(error: BaseException | None) -> str:
    """Type and message on one line of a log, shortened and without secrets."""
    return redact(f"{type(error).__name__}: {error}".strip().rstrip(":"))[:300]


def parse_retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or an HTTP date; None if it asks for no wait, or is neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return seconds if seconds > 0 else None
