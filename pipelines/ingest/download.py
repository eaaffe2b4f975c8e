"""Fetches the images that a list names, over HTTP or from any fsspec file system.

A failure is returned and not raised: its short code becomes the row's reject reason.
"""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt

from pipelines.ingest.config import DownloadConfig
from pipelines.storage.errors import StorageError
from pipelines.storage.retry import call
from pipelines.tables.rejects import RowRefused
from sana_model.files.filesystems import open_filesystem
from sana_model.files.retry import TRANSIENT_STATUS, Backoff, is_transient, parse_retry_after

TRANSIENT_REASONS = {"download_failed", "timeout", *(f"http_{status}" for status in TRANSIENT_STATUS)}
"""Reject reasons of downloads that may succeed at another time."""

NUM_THREADS = 16
LONGEST_WAIT = 60.0  # seconds between two attempts, even if the server asks for more
CHUNK = 2**16


class FetchError(RowRefused):
    """`retry_after`: seconds that the server asks to wait before it is asked again. None: it names no time."""

    def __init__(self, reason: str, detail: str, retry_after: float | None = None):
        super().__init__(reason, detail)
        self.retry_after = retry_after


def fetch_all(uris: Sequence[str], config: DownloadConfig, max_bytes: int) -> list[bytes | RowRefused]:
    """Fetch the content of each URI. Return it, or the reason why it could not be fetched, in the order of `uris`.

    Reasons: http_<status>, timeout, download_failed, too_many_redirects, too_many_bytes, robots_tag, bad_url; for keys of a
    file system missing_source, too_many_bytes, unreadable, bad_url, and download_failed where it cannot be connected to.

    Raises StorageError if a file system does not answer.
    """
    different = dict.fromkeys(uris)
    over_http = [uri for uri in different if uri.lower().startswith(("http://", "https://"))]
    keys = [uri for uri in different if not uri.lower().startswith(("http://", "https://"))]
    found = dict(zip(over_http, asyncio.run(_Downloads(config, max_bytes).fetch(over_http)), strict=True)) if over_http else {}
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found |= zip(keys, pool.map(lambda uri: read_key(uri, max_bytes), keys), strict=True)
    return [found[uri] for uri in uris]


def read_key(uri: str, max_bytes: int, size: int | None = None) -> bytes | RowRefused:
    """Read a file from any file system, unless it is too large. `size` is the file's size, if a listing told it.

    Raises StorageError if the file system does not answer.
    """
    try:
        filesystem, path = open_filesystem(uri)
    except Exception as error:  # some connect when they are opened, and each fails in its own way
        return FetchError("download_failed" if is_transient(error) else "bad_url", f"{type(error).__name__}: {error}")
    try:
        if size is None:
            size = call(lambda: filesystem.size(path), "read", uri) or 0
        if size > max_bytes:
            return FetchError("too_many_bytes", f"{size} bytes, over max_bytes={max_bytes}")
        return call(lambda: filesystem.cat_file(path), "read", uri)
    except FileNotFoundError as error:
        return FetchError("missing_source", f"{type(error).__name__}: {error}")
    except Exception as error:  # a key may be nonsense, and file systems say so in many ways
        if isinstance(error, StorageError) and is_transient(error):
            raise
        return FetchError("unreadable", f"{type(error).__name__}: {error}")


class _Downloads:
    """The downloads of one HTTP session. Each event loop needs an object of its own."""

    def __init__(self, config: DownloadConfig, max_bytes: int):
        self.config, self.max_bytes = config, max_bytes

    async def fetch(self, urls: Sequence[str]) -> list[bytes | RowRefused]:
        # These limits are ours and not the connector's, so that waiting for a turn does not count towards the timeout.
        self.turn = asyncio.Semaphore(self.config.connections)
        self.turns_of_host: dict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(self.config.connections_per_host)
        )
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout),
            headers={"User-Agent": self.config.user_agent, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"},
            auto_decompress=False,  # we ask for no compression, and a few KB could unfold into gigabytes
        ) as self.session:
            return await asyncio.gather(*(self._fetch_patiently(url) for url in urls))

    async def _fetch_patiently(self, url: str) -> bytes | RowRefused:
        try:
            host = urlsplit(url).netloc
        except ValueError as error:
            return FetchError("bad_url", str(error))
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, FetchError) and error.reason in TRANSIENT_REASONS),
            stop=stop_after_attempt(self.config.attempts),
            wait=Backoff(first=self.config.first_wait, longest=LONGEST_WAIT),
            reraise=True,
        )
        try:
            return await retrying(self._fetch_in_turn, url, host)
        except FetchError as error:
            return error

    async def _fetch_in_turn(self, url: str, host: str) -> bytes:
        async with self.turns_of_host[host], self.turn:
            return await self._fetch_once(url)

    async def _fetch_once(self, url: str) -> bytes:
        try:
            async with self.session.get(url, max_redirects=self.config.max_redirects) as response:
                self._check(response)
                content = bytearray()
                async for chunk in response.content.iter_chunked(CHUNK):
                    content += chunk
                    if len(content) > self.max_bytes:
                        raise FetchError("too_many_bytes", f"over max_bytes={self.max_bytes}")
                return bytes(content)
        except TimeoutError as error:
            raise FetchError("timeout", f"nothing whole within {self.config.timeout:g} s") from error
        except aiohttp.TooManyRedirects as error:
            raise FetchError("too_many_redirects", f"over max_redirects={self.config.max_redirects}") from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, ValueError) as error:
            raise FetchError("bad_url", f"{type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise FetchError("download_failed", f"{type(error).__name__}: {error}") from error

    def _check(self, response: aiohttp.ClientResponse) -> None:
        if response.status != 200:
            retry_after = parse_retry_after(response.headers.get("Retry-After"))
            raise FetchError(f"http_{response.status}", f"{response.reason}", retry_after)
        if self.config.obey_robots_tag:
            tags = {tag.strip().lower() for value in response.headers.getall("X-Robots-Tag", []) for tag in value.split(",")}
            if forbidden := tags & {"noai", "noimageai", "noindex", "noimageindex"}:
                raise FetchError("robots_tag", f"X-Robots-Tag: {', '.join(sorted(forbidden))}")
        if response.content_length is not None and response.content_length > self.max_bytes:
            raise FetchError("too_many_bytes", f"{response.content_length} bytes, over max_bytes={self.max_bytes}")
