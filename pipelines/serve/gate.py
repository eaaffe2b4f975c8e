"""What every request passes before it is read: keys, the origin of a web page, and the size of the body."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serve.config import KEYS_VARIABLE
from pipelines.serve.errors import ApiError

GUARDED = "/v1/"
"""Paths below it need a key, if there are keys. The page itself, which asks for the key, does not, nor does /healthz."""


def read_keys(text: str) -> list[str]:
    """The keys in the value of SANA_API_KEYS."""
    return [key for key in re.split(r"[,\s]+", text) if key]


class Gate:
    """ASGI middleware. A refused request is answered with OpenAI's form of an error, and its body is not read.

    Args:
        keys: one of them must come as `Authorization: Bearer KEY`; none: no key is asked for.
        origins: web pages of other servers that may send requests; "*": all. The server's own page always may. (A browser
            sends a form to any server without asking it first: a strange page could have pictures drawn here.)
        max_body_bytes: of a request.
    """

    def __init__(self, app: ASGIApp, *, keys: Iterable[str], origins: Iterable[str], max_body_bytes: int):
        self._app = app
        self._keys = [_digest(key) for key in keys]
        self._origins = {origin.rstrip("/") for origin in origins}
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def receive_limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body_bytes:
                raise self._too_large()
            return message

        try:
            self._check(scope)
            await self._app(scope, receive_limited, send)
        except ApiError as error:  # of `_check`: the app answers those of its own
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request that must not pass."""
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is not None and not self._may_come_from(origin, headers.get("host", "")):
            text = f"a page of {origin[:200]} sent this, and may not use this server (cors_origins)"
            raise ApiError(403, text, "origin_refused")
        if scope["path"].startswith(GUARDED) and scope["method"] != "OPTIONS" and self._keys:
            self._check_key(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self._max_body_bytes:
            raise self._too_large()

    def _may_come_from(self, origin: str, host: str) -> bool:
        return bool({"*", origin} & self._origins) or urlsplit(origin).netloc == host

    def _check_key(self, given: str) -> None:
        kind, _, key = given.partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            text = "this server asks for a key: send the header Authorization: Bearer KEY (api_key of OpenAI's clients)"
            raise ApiError(401, text, "missing_api_key")
        digest = _digest(key.strip())
        if not any([hmac.compare_digest(digest, known) for known in self._keys]):  # a list: all are compared, whichever fits
            raise ApiError(401, f"this key is none of the server's ({KEYS_VARIABLE})", "invalid_api_key")

    def _too_large(self) -> ApiError:
        text = f"the request has more than {self._max_body_bytes} bytes, this server's limit"
        return ApiError(413, text, "request_too_large")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
