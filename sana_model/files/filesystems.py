"""Opens the file system of a URI, with the settings that suit `retry.call_patiently`."""

from pathlib import Path
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "retries": {"mode": "standard", "total_max_attempts": 3},
    },
}
"""Endpoint and credentials come from the environment, as botocore reads it (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID ...).

botocore repeats a single request twice by itself (a page of a listing, a part of an upload), which is cheaper than to repeat
the whole. s3fs's own repeats are switched off: three layers would multiply to many silent minutes, and s3fs does not notice
an answer that is cut short.
"""


STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
"""Stores of objects by bucket and key. Nothing in their URIs leads to another host, or to another file system."""


def open_filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URI (or local path), and the path on it, without a slash at its end.

    Its own calls are not repeated: wrap them in `retry.call_patiently`.
    """
    if "::" in uri and "://" not in uri:  # part of a local file's name; in most URIs it chains file systems
        return LocalFileSystem(), str(Path(uri).absolute())
    options = S3_OPTIONS if uri.startswith(("s3://", "s3a://")) else {}
    scheme = uri.partition("://")[0]
    if "::" in uri and scheme in (*STORES, "file", "local"):  # they lie on nothing: "::" is part of the name
        filesystem = fsspec.filesystem(scheme, **options)
        path = filesystem._strip_protocol(uri)
    else:
        filesystem, path = fsspec.url_to_fs(uri, **options)
    if options:
        filesystem.retries = 1
    return filesystem, path.rstrip("/")
