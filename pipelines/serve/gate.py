"""What every request passes before it is read: keys, the server's name, the origin of a web page, the size of the body."""

import hashlib
import hmac
import ipaddress
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
MAX_HELD_BYTES = 2**30
"""Of the bodies of all requests that a front has at one time."""
STAYS_HEADER = "x-request-disconnect-disabled"
"""Tells Ray Serve to go on with a request whose client has gone away."""


def read_keys(text: str) -> list[str]:
    """The keys in the value of SANA_API_KEYS."""
    return [key for key in re.split(r"[,\s]+", text) if key]


class Gate:
    """ASGI middleware. A refused request is answered with OpenAI's form of an error, and its body is not read.

    Args:
        keys: one of them must come as `Authorization: Bearer KEY`; none: no key is asked for.
        host: the address that the server listens on. Without keys the Host header of a request must be this, localhost, an IP
            address or the host of one of `origins`. (DNS rebinding: a strange page can make its own name lead here, and is then
            this server's own page to the browser.)
        origins: web pages of other servers that may send requests; "*": all. The server's own page always may. (A browser
            sends a form to any server without asking it first: a strange page could have pictures drawn here.)
        max_body_bytes: of a request.
    """

    def __init__(self, app: ASGIApp, *, keys: Iterable[str], host: str, origins: Iterable[str], max_body_bytes: int):
        self._app = app
        self._keys = [_digest(key) for key in keys]
        self._origins = set(origins)
        self._names = {"localhost", host.lower(), *(_name_of(_host_of(origin)) for origin in self._origins)}
        self._max_body_bytes = max_body_bytes
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def receive_limited() -> Message:
            nonlocal read
            message = await receive()
            size = len(message.get("body", b""))
            read += size
            self._held_bytes += size
            if read > self._max_body_bytes:
                raise self._too_large()
            if size and self._held_bytes > MAX_HELD_BYTES:
                raise ApiError(429, "too many pictures came at once: try again later", "queue_full", retry_after=10)
            return message

        try:
            self._check(scope)
            await self._app(scope, receive_limited, send)
        except ApiError as error:  # of `_check`: the app answers those of its own
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
        finally:
            self._held_bytes -= read

    def _check(self, scope: Scope) -> None:
        """Raise ApiError for a request that must not pass."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._keys and not self._is_own(host):
            text = (
                f"Host is {host[:200]!r}: without keys this server goes by localhost and by IP addresses alone. Add its name "
                f"to cors_origins, such as http://{host[:200] or 'example.org'}, or set keys in {KEYS_VARIABLE}"
            )
            raise ApiError(403, text, "host_refused")
        if STAYS_HEADER in headers:
            raise ApiError(400, f"{STAYS_HEADER} is not taken here: what nobody waits for is given up", "unsupported_header")
        if origin is not None and not self._may_come_from(origin, host):
            text = f"a page of {origin[:200]} sent this, and may not use this server (cors_origins)"
            raise ApiError(403, text, "origin_refused")
        if scope["path"].startswith(GUARDED) and scope["method"] != "OPTIONS" and self._keys:
            self._check_key(headers.get("authorization", ""))
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self._max_body_bytes:
            raise self._too_large()

    def _may_come_from(self, origin: str, host: str) -> bool:
        return bool({"*", origin} & self._origins) or _host_of(origin) == host

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this server, and nobody else can have made it do so."""
        name = _name_of(host)
        return "*" in self._origins or (name != "" and (name in self._names or _is_address(name)))

    def _check_key(self, given: str) -> None:
        kind, _, key = given.partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            text = "this server asks for a key: send the header Authorization: Bearer KEY (api_key of OpenAI's clients)"
            raise ApiError(401, text, "missing_api_key")
        digest = _digest(key.strip())
        if not any([hmac.compare_digest(digest, known) for known in self._keys]):  # a list: all are compared, whichever fits
            raise ApiError(401, f"this key is none of the server's ({KEYS_VARIABLE})", "invalid_api_key")

    def _too_large(self) -> ApiError:
        return ApiError.too_large("request", self._max_body_bytes)


def _host_of(origin: str) -> str:
    """The host of an origin, with its port if it names one."""
    return origin.partition("://")[2]


def _name_of(host: str) -> str:
    """A host without its port; "" if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # such as "["
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
