"""What the rows of a list may name. Whoever writes a list is not whoever runs the job, and must not reach all that the job may.

A row may name URLs of HTTP, `data:` URLs, keys of object stores, and files below the list's own folder or `base_uri`, which
whoever runs the job has given. Symbolic links are followed before a path is judged.
"""

import base64
import binascii
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import unquote_to_bytes, urljoin

from pipelines.storage.files import is_local
from pipelines.tables.rejects import RowRefused
from pipelines.workers.images import too_many_bytes
from sana_model.files.filesystems import STORES, open_filesystem

DATA = "data:"
OUTSIDE = "outside_folder"


def resolve(key: str, folder: str) -> str:
    """The URI that a row names.

    Args:
        folder: URI of the folder that keys are relative to.
    """
    over_http = folder.lower().startswith(("http://", "https://"))
    if key[:5].lower() == DATA:
        return DATA + key[5:]
    if key.startswith("//"):  # a URL without its scheme, as in web pages
        return urljoin(folder, key) if over_http else f"https:{key}"
    if key.startswith("/") and over_http:
        return urljoin(folder, key)
    return key if "://" in key or key.startswith("/") else f"{folder}/{key}"


def find_allowed(uri: str, folders: Sequence[str]) -> str:
    """The URI to read for one that a row names: that of the file itself, where it is a symbolic link.

    Args:
        folders: URIs of the folders in which any file may be named.

    Raises RowRefused: outside_folder, bad_url, unreadable.
    """
    scheme = uri.partition("://")[0].lower() if "://" in uri else ""
    if uri.startswith(DATA) or scheme in ("http", "https", *STORES):
        return uri
    if scheme in ("", "file", "local"):
        return _allowed_path(uri, folders)
    below = [folder for folder in folders if uri.startswith(f"{folder}/")]
    rest = [uri.removeprefix(folder) for folder in below]
    if any("::" not in end and "://" not in end and ".." not in end.split("/") for end in rest):
        return uri
    raise RowRefused(
        "bad_url",
        f"{scheme[:50]!r}: a list may name http, https, data, {', '.join(STORES)}, and what lies below its own folder or "
        "base_uri",
    )


def _allowed_path(uri: str, folders: Sequence[str]) -> str:
    try:
        path = _real_path(uri)
    except (OSError, ValueError) as error:
        raise RowRefused("unreadable", f"{type(error).__name__}: {error}") from error
    roots = [_real_folder(folder) for folder in folders if is_local(folder)]
    if any(path.startswith(root.rstrip("/") + "/") for root in roots):
        return path
    raise RowRefused(
        OUTSIDE,
        "it lies outside the list's own folder, or a symbolic link leads outside: give the folder that holds both as "
        "--ingest.base_uri, if the list may name what is in it",
    )


def _real_path(uri: str) -> str:
    return os.path.realpath(open_filesystem(uri)[1] or "/")


_real_folder = lru_cache(_real_path)


def decode_data(url: str, max_bytes: int) -> bytes:
    """The content of a `data:` URL. Raises RowRefused: bad_url, too_many_bytes."""
    head, comma, body = url.partition(",")
    if not comma:
        raise RowRefused("bad_url", "a data: URL without a comma")
    if len(body) > 4 * max_bytes:  # one byte is three characters at most
        raise too_many_bytes(len(body), max_bytes)
    content = unquote_to_bytes(body)
    if head.lower().rstrip().endswith(";base64"):
        content = re.sub(rb"\s", b"", content).translate(bytes.maketrans(b"-_", b"+/"))
        try:
            content = base64.b64decode(content.rstrip(b"=") + b"=" * (-len(content.rstrip(b"=")) % 4), validate=True)
        except binascii.Error as error:
            raise RowRefused("bad_url", f"a data: URL whose base64 is broken ({error})") from error
    if len(content) > max_bytes:
        raise too_many_bytes(len(content), max_bytes)
    return content
