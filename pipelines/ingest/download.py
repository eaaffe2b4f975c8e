"""Fetches the images that a list names, over HTTP or from any fsspec file system.

A failure is returned and not raised: its short code becomes the row's reject reason.
"""

import asyncio
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fsspec.implementations.local import LocalFileSystem

from pipelines.ingest.config import DownloadConfig
from pipelines.ingest.memory import SHARD_FULL, Memory
from pipelines.ingest.names import DATA, decode_data, find_allowed
from pipelines.ingest.sources import Source
from pipelines.ingest.web import NO_SUCH_HOST, PASSING_REASONS, PRIVATE_ADDRESS, SILENT_HOST, FetchError, WebDownloads
from pipelines.storage.errors import StorageError
from pipelines.storage.objects import read_object
from pipelines.storage.retry import call
from pipelines.tables.rejects import RowRefused
from pipelines.workers.images import too_many_bytes
from sana_model.files.filesystems import open_filesystem
from sana_model.files.retry import is_transient

NUM_THREADS = 16


def retryable_reasons(config: DownloadConfig) -> set[str]:
    """Reject reasons of downloads that may succeed at another time, or with these settings."""
    passing = PASSING_REASONS | {NO_SUCH_HOST, SILENT_HOST, SHARD_FULL}
    return passing | ({PRIVATE_ADDRESS} if config.allow_private else set())


def fetch_named(source: Source, named: Sequence[tuple[str, str]]) -> list[bytes | RowRefused]:
    """Fetch what files of a source name, by pairs of the path of such a file and a URI that `Source.resolve` gave for it.

    Reasons: those of `fetch_all` and `names.find_allowed`. Raises as `fetch_all`.
    """
    found: list[str | RowRefused] = []
    for path, uri in named:
        try:
            found.append(find_allowed(uri, source.open_folders(path)))
        except RowRefused as refused:
            found.append(refused.bare())
    uris = [uri for uri in found if isinstance(uri, str)]
    contents = iter(fetch_all(uris, source.download, source.max_bytes, source.max_shard_bytes))
    return [next(contents) if isinstance(uri, str) else uri for uri in found]


def fetch_all(uris: Sequence[str], config: DownloadConfig, max_bytes: int, max_total: int) -> list[bytes | RowRefused]:
    """Fetch the content of each URI. Return it, or the reason why it could not be fetched, in the order of `uris`.

    Reasons: http_<status>, timeout, download_failed, no_such_host, silent_host, too_many_redirects, too_many_bytes, robots_tag,
    bad_url, private_address, unsupported_encoding; for keys of a file system missing_source, too_many_bytes, unreadable,
    bad_url, and download_failed where it cannot be connected to; shard_full for what comes when all contents together have more
    than `max_total` bytes.

    Raises StorageError if a file system does not answer.
    """
    different = list(dict.fromkeys(uris))
    found = dict(zip(different, asyncio.run(_fetch(different, config, max_bytes, max_total)), strict=True))
    return [found[uri] for uri in uris]


async def _fetch(uris: list[str], config: DownloadConfig, max_bytes: int, max_total: int) -> list[bytes | RowRefused]:
    memory = Memory(config.bytes_in_flight, max_total)
    over_http = [uri for uri in uris if uri.lower().startswith(("http://", "https://"))]
    found: dict[str, bytes | RowRefused] = {}
    if over_http:
        found |= zip(over_http, await WebDownloads(config, max_bytes, memory).fetch(over_http), strict=True)
    found |= {uri: _decode(uri, max_bytes, memory) for uri in uris if uri.startswith(DATA)}
    keys = [uri for uri in uris if uri not in found]
    return list(map((found | await _read_keys(keys, max_bytes, memory)).__getitem__, uris))


def _decode(url: str, max_bytes: int, memory: Memory) -> bytes | RowRefused:
    try:
        content = decode_data(url, max_bytes)
        memory.keep(len(content))
        return content
    except RowRefused as refused:
        return refused.bare()


async def _read_keys(uris: list[str], max_bytes: int, memory: Memory) -> dict[str, bytes | RowRefused]:
    loop = asyncio.get_running_loop()
    failures: list[StorageError] = []

    async def read(uri: str) -> bytes | RowRefused:
        held: list[int] = []

        def wait_for_room(size: int) -> None:
            if not held:  # a file that is read again has its room already
                held.append(asyncio.run_coroutine_threadsafe(memory.take(size), loop).result())

        try:
            memory.check()
            content = await loop.run_in_executor(pool, partial(_read_unless, failures, uri, max_bytes, wait_for_room))
            if isinstance(content, bytes):
                memory.keep(len(content))
            return content
        except RowRefused as refused:
            return refused.bare()
        finally:
            await memory.give_back(sum(held))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        contents = await asyncio.gather(*map(read, uris))
    if failures:
        raise failures[0]
    return dict(zip(uris, contents, strict=True))


def _read_unless(
    failures: list[StorageError], uri: str, max_bytes: int, before_reading: Callable[[int], None]
) -> bytes | RowRefused:
    """`read_key`, unless a storage did not answer: then it is not asked again for each of the other keys."""
    if not failures:
        try:
            return read_key(uri, max_bytes, before_reading=before_reading)
        except StorageError as error:
            failures.append(error)
    return RowRefused("download_failed", "not tried")


def read_key(
    uri: str,
    max_bytes: int,
    size: int | None = None,
    *,
    is_literal: bool = False,
    before_reading: Callable[[int], None] = lambda size: None,
) -> bytes | RowRefused:
    """Read a file from any file system, unless it is too large.

    Args:
        size: of the file, if a listing told it.
        is_literal: "?versionId=" in a key of S3 is part of its name, and asks for no version.
        before_reading: called with the size in bytes, as soon as it is known for sure.

    Raises StorageError if the file system does not answer.
    """
    if size is not None and size > max_bytes:
        return too_many_bytes(size, max_bytes)
    try:
        filesystem, path = open_filesystem(uri)
    except Exception as error:  # some connect when they are opened, and each fails in its own way
        return FetchError("download_failed" if is_transient(error) else "bad_url", f"{type(error).__name__}: {error}")

    def check(size: int) -> None:
        if size > max_bytes:
            raise too_many_bytes(size, max_bytes)
        before_reading(size)

    def read() -> bytes:
        if isinstance(filesystem, LocalFileSystem):
            return _read_local(path, check)
        if uri.startswith(("s3://", "s3a://")):
            return read_object(filesystem, path, check, is_literal=is_literal)
        check(filesystem.size(path) or 0)
        return filesystem.cat_file(path)

    try:
        return call(read, "read", uri)
    except RowRefused as refused:
        return refused.bare()
    except FileNotFoundError as error:
        return FetchError("missing_source", f"{type(error).__name__}: {error}")
    except Exception as error:  # a key may be nonsense, and file systems say so in many ways
        if isinstance(error, StorageError) and is_transient(error):
            raise
        return FetchError("unreadable", f"{type(error).__name__}: {error}")


def _read_local(path: str, check: Callable[[int], None]) -> bytes:
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RowRefused("unreadable", "a named pipe, a device or a socket, and no file")
        check(status.st_size)
        return file.read(status.st_size)


def _open_at_once(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NONBLOCK)  # else a named pipe is waited for
    except NotADirectoryError as error:  # what is named like a folder is a file
        raise FileNotFoundError(str(error)) from error
