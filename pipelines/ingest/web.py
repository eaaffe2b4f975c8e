"""Downloads over HTTP: each URL is asked for exactly as it is listed, within the limits of `DownloadConfig`."""

import asyncio
import re
import socket
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import quote, urljoin

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt
from yarl import URL

from pipelines.ingest.addresses import PrivateAddressError, is_spelled_private, public_socket
from pipelines.ingest.config import DownloadConfig
from pipelines.ingest.memory import Memory
from pipelines.tables.rejects import RowRefused
from sana_model.files.retry import TRANSIENT_STATUS, Backoff, parse_retry_after

PASSING_REASONS = {"download_failed", "timeout", *(f"http_{status}" for status in TRANSIENT_STATUS)}
"""Reasons of failures that may pass by themselves."""
PRIVATE_ADDRESS = "private_address"
NO_SUCH_HOST = "no_such_host"
SILENT_HOST = "silent_host"
NO_HOST_ERRORS = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
"""What looking up a name that does not exist, or has no address, ends with. A resolver that fails ends with others."""
CONNECT_SECONDS = 10.0
"""Seconds that a connection may take, at most: three lost packets of its beginning are sent again in that time."""
SILENT_ATTEMPTS, SILENT_SECONDS = 16, 15.0
"""A host is silent if so many attempts in a row, of any of its URLs, over so many seconds got no answer at all."""
LONGEST_WAIT = 60.0  # seconds between two attempts, even if the server asks for more
CHUNK = 2**16
UNCOUNTED = 2**20  # bytes of each download that need no reservation: most images are smaller
GOOD_STATUS = (200, 203)
REDIRECTS = (301, 302, 303, 307, 308)
HTTP_URL = re.compile(r"(https?://)([^/?#\\]*)(.*)", re.IGNORECASE | re.DOTALL)
NOT_SENDABLE = re.compile(r"[^!-~]+")  # in a request's first line: spaces, control characters, and all that is no ASCII
OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "none"}
RULES_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
AGENT = re.compile(r"[a-z*][\w.*-]*")
MAX_CODINGS = 4
UNKNOWN_CODINGS = {"br", "zstd", "compress", "x-compress", "dcb", "dcz"}
IMAGE_HEADS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF")


class FetchError(RowRefused):
    """`retry_after`: seconds that the server asks to wait before it is asked again. None: it names no time."""

    def __init__(self, reason: str, detail: str, retry_after: float | None = None):
        super().__init__(reason, detail)
        self.retry_after = retry_after


class Host:
    """What is known of a host and port: whose turn it is, and whether it answers. Times are those of the event loop."""

    def __init__(self, connections: int):
        self.turn = asyncio.Semaphore(connections)
        self.last_answer = self.silent_since = float("-inf")
        self.unanswered = 0  # attempts in a row

    def note_answer(self, now: float) -> None:
        self.last_answer, self.unanswered = now, 0

    def note_failure(self, begun: float) -> None:
        """Note that an attempt failed; it counts if nothing was answered, to nobody, since it began."""
        if self.last_answer < begun:
            self.silent_since = self.silent_since if self.unanswered else begun
            self.unanswered += 1

    def check(self, now: float) -> None:
        """Raise FetchError if the host is silent: not each of its URLs is waited for then."""
        seconds = now - self.silent_since
        if self.unanswered >= SILENT_ATTEMPTS and seconds >= SILENT_SECONDS:
            raise FetchError(
                SILENT_HOST,
                f"no answer to the last {self.unanswered} attempts at this host, over {seconds:.0f} s: it was not asked for "
                "this URL; --ingest.retry_rejects true asks again",
            )


class WebDownloads:
    """The downloads of one HTTP session. Each event loop needs an object of its own."""

    def __init__(self, config: DownloadConfig, max_bytes: int, memory: Memory):
        self.config, self.max_bytes, self.memory = config, max_bytes, memory

    async def fetch(self, urls: Sequence[str]) -> list[bytes | RowRefused]:
        """Fetch each URL: its content, or why there is none."""
        # These limits are ours and not the connector's, so that waiting for a turn does not count towards the timeout.
        self.turn = asyncio.Semaphore(self.config.connections)
        self.hosts: dict[str, Host] = defaultdict(lambda: Host(self.config.connections_per_host))
        self.loop = asyncio.get_running_loop()
        # Names are looked up in threads. With fewer, what waits for its name would take time from downloads that could go on.
        self.loop.set_default_executor(ThreadPoolExecutor(self.config.connections, "look up"))
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=None if self.config.allow_private else public_socket),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),  # see `_fetch_once`
            headers={"User-Agent": self.config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),  # what one row's server says must not change another row's answer
            auto_decompress=False,  # we ask for no compression, and a few KB could unfold into gigabytes
        ) as self.session:
            return await asyncio.gather(*(self._fetch_patiently(url) for url in urls))

    async def _fetch_patiently(self, listed: str) -> bytes | RowRefused:
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, FetchError) and error.reason in PASSING_REASONS),
            stop=stop_after_attempt(self.config.attempts),
            wait=Backoff(first=self.config.first_wait, longest=LONGEST_WAIT),
            reraise=True,
        )
        try:
            url = as_listed(listed)
            return await retrying(self._fetch_in_turn, url, f"{url.raw_host}:{url.port}".lower())
        except ValueError as error:
            return FetchError("bad_url", str(error))
        except RowRefused as error:
            return error.bare()

    async def _fetch_in_turn(self, url: URL, name: str) -> bytes:
        host = self.hosts[name]
        async with host.turn, self.turn:
            self.memory.check()
            host.check(self.loop.time())
            content = await self._fetch_once(url, host)
            self.memory.keep(len(content))
            return content

    async def _fetch_once(self, url: URL, host: Host) -> bytes:
        begun = self.loop.time()
        try:
            async with asyncio.timeout(self.config.timeout) as clock:
                return await self._follow(url, host, clock)
        except aiohttp.ConnectionTimeoutError as error:
            host.note_failure(begun)
            raise FetchError("timeout", f"no connection within {CONNECT_SECONDS:g} s") from error
        except TimeoutError as error:
            host.note_failure(begun)
            raise FetchError("timeout", f"nothing whole within {self.config.timeout:g} s") from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, ValueError) as error:
            raise FetchError("bad_url", f"{type(error).__name__}: {error}") from error
        except aiohttp.ClientResponseError as error:  # its text has the first bytes of what came
            raise FetchError("download_failed", f"{type(error).__name__}: what came is no answer of HTTP") from error
        except (aiohttp.ClientError, OSError) as error:
            cause = getattr(error, "os_error", None)
            if isinstance(cause, PrivateAddressError):
                raise _private(url) from error
            if isinstance(cause, socket.gaierror) and cause.errno in NO_HOST_ERRORS:
                raise FetchError(NO_SUCH_HOST, f"{type(error).__name__}: {error}") from error
            host.note_failure(begun)
            raise FetchError("download_failed", f"{type(error).__name__}: {error}") from error

    async def _follow(self, url: URL, host: Host, clock: asyncio.Timeout) -> bytes:
        """Ask for a URL, whose host it tells of an answer, and for those that it is redirected to."""
        cookies: dict[str, str] = {}  # some servers send everybody away once, to see whether cookies come back
        for _ in range(self.config.max_redirects + 1):
            if not self.config.allow_private and is_spelled_private(url.raw_host or ""):
                raise _private(url)
            async with self.session.get(url, allow_redirects=False, cookies=cookies) as response:
                host.note_answer(self.loop.time())
                location = response.headers.get("Location") or response.headers.get("URI")
                if response.status not in REDIRECTS or not location:
                    self._check(response)
                    return await self._read(response, clock)
                target = as_listed(location if HTTP_URL.match(location) else urljoin(str(url), location))
                cookies = cookies | {name: cookie.value for name, cookie in response.cookies.items()}
                url, cookies = target, cookies if target.raw_host == url.raw_host else {}
        raise FetchError("too_many_redirects", f"over max_redirects={self.config.max_redirects}")

    def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status not in GOOD_STATUS:
            retry_after = parse_retry_after(response.headers.get("Retry-After"))
            raise FetchError(f"http_{response.status}", f"{response.reason}"[:100], retry_after)
        if self.config.obey_robots_tag:
            values = response.headers.getall("X-Robots-Tag", [])
            if forbidden := opt_outs(values, self.config.user_agent):
                raise FetchError("robots_tag", f"X-Robots-Tag: {', '.join(sorted(forbidden))}")
        if response.content_length is not None and response.content_length > self.max_bytes:
            raise FetchError("too_many_bytes", f"{response.content_length} bytes, over max_bytes={self.max_bytes}")

    async def _read(self, response: aiohttp.ClientResponse, clock: asyncio.Timeout) -> bytes:
        codings = response.headers.getall("Content-Encoding", [])
        expected = response.content_length or self.max_bytes
        expected += self.max_bytes if codings else 0
        content = bytearray()
        is_reserved = False
        async with AsyncExitStack() as stack:
            async for chunk in response.content.iter_chunked(CHUNK):
                content += chunk
                if len(content) > self.max_bytes:
                    raise FetchError("too_many_bytes", f"over max_bytes={self.max_bytes}")
                if not is_reserved and (len(content) > UNCOUNTED or codings):
                    is_reserved = True
                    await stack.enter_async_context(self._reserved(expected, clock))
            return decompress(bytes(content), codings, self.max_bytes)

    @asynccontextmanager
    async def _reserved(self, count: int, clock: asyncio.Timeout) -> AsyncIterator[None]:
        """Hold memory. The time of waiting for it does not count."""
        until = clock.when()
        assert until is not None
        left = until - self.loop.time()
        clock.reschedule(None)
        taken = await self.memory.take(count)
        clock.reschedule(self.loop.time() + left)
        try:
            yield
        finally:
            await self.memory.give_back(taken)


def as_listed(url: str) -> URL:
    """The URL as it is sent. Escapes stay as they are, for a signature may cover them; only what cannot be sent is escaped.

    Raises ValueError if it is no URL of HTTP.
    """
    match = HTTP_URL.fullmatch(url)
    if match is None:
        raise ValueError(f"{url[:100]!r} is no URL of HTTP")
    scheme, authority, rest = match.groups()
    authority = URL(f"http://{authority}").raw_authority if not authority.isascii() else authority
    return URL(scheme.lower() + authority + NOT_SENDABLE.sub(_escape, rest), encoded=True)


def _escape(found: re.Match[str]) -> str:
    return quote(found[0], errors="surrogateescape")


def opt_outs(values: Iterable[str], user_agent: str) -> set[str]:
    """The rules in the values of X-Robots-Tag headers that forbid to take an image: those for everybody, and those for us.

    A value may begin with the name of the robot that it is for, "otherbot: noindex, nofollow"; another may follow in it.
    """
    products = re.findall(r"[\w.-]+(?=/)", user_agent) or user_agent.split()[:1]
    ours = {"*", *(product.lower() for product in products)}
    found = set()
    for value in values:
        agent = "*"
        for rule in value.lower().split(","):
            name, colon, rest = rule.partition(":")
            if colon and name.strip() not in RULES_WITH_VALUE and AGENT.fullmatch(name.strip()):
                agent, rule = name.strip(), rest
            if agent in ours:
                found |= OPT_OUTS.intersection(rule.split())
    return found


def decompress(content: bytes, codings: Iterable[str], max_bytes: int) -> bytes:
    """Undo the codings of a Content-Encoding header. Names that are none, such as "utf-8", are passed over, as browsers do, and
    so are codings that are named, but not there.

    Raises FetchError: too_many_bytes, download_failed (it ends too early or is damaged), unsupported_encoding.
    """
    names = [name.strip().lower() for coding in codings for name in coding.split(",")]
    if len(names) > MAX_CODINGS:
        raise FetchError("unsupported_encoding", f"{len(names)} codings, one in another")
    for name in reversed(names):
        if content.startswith(IMAGE_HEADS):
            return content
        if name in UNKNOWN_CODINGS:
            raise FetchError("unsupported_encoding", f"Content-Encoding {name}, though none was asked for")
        if name in ("gzip", "x-gzip") and content.startswith(b"\x1f\x8b"):
            content = _inflate(content, 31, max_bytes)
        elif name == "deflate" and len(content) > 1:
            has_header = content[0] & 15 == 8 and int.from_bytes(content[:2]) % 31 == 0
            content = _inflate(content, 15 if has_header else -15, max_bytes)
    return content


def _inflate(content: bytes, form: int, max_bytes: int) -> bytes:
    """Unpack by zlib, whose `wbits` is `form`; in several members if there are several."""
    unpacked = b""
    try:
        while content:
            member = zlib.decompressobj(form)
            unpacked += member.decompress(content, max_bytes + 1 - len(unpacked))
            if len(unpacked) > max_bytes:
                raise FetchError("too_many_bytes", f"unpacked over max_bytes={max_bytes}")
            if not member.eof:
                raise FetchError("download_failed", "the compressed content ends too early")
            content = member.unused_data if member.unused_data.startswith(b"\x1f\x8b") else b""
    except zlib.error as error:
        raise FetchError("download_failed", f"the compressed content is damaged ({error})") from error
    return unpacked


def _private(url: URL) -> FetchError:
    return FetchError(
        PRIVATE_ADDRESS,
        f"{url.raw_host} leads to a loopback, link-local, private or other special address: if this list may name such, set "
        "--ingest.download.allow_private true (with --ingest.retry_rejects true for shards that are finished)",
    )
