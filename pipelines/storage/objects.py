"""Reads objects of S3 by one request each, which also tells their size before their content comes."""

from collections.abc import Callable
from typing import Any

from fsspec.asyn import sync

VERSION = "?versionId="


def read_object(filesystem: Any, path: str, check: Callable[[int], None], *, is_literal: bool = False) -> bytes:
    """Read an object.

    Args:
        filesystem: of s3fs.
        path: bucket and key. "?versionId=..." at its end asks for a version, unless the key `is_literal`.
        check: called with the size in bytes, before the content is read; what it raises is raised.

    Raises FileNotFoundError, and the errors of s3fs. Safe to repeat.
    """
    path, mark, rest = path.partition(VERSION)
    bucket, key, _ = filesystem.split_path(path)
    version = {"VersionId": rest} if mark and not is_literal else {}
    response = filesystem.call_s3("get_object", Bucket=bucket, Key=f"{key}{mark}{rest}" if is_literal else key, **version)
    try:
        check(response["ContentLength"])
        content: bytes = sync(filesystem.loop, response["Body"].read)
    finally:
        response["Body"].close()
    if len(content) != response["ContentLength"]:
        raise EOFError(f"{len(content)} of {response['ContentLength']} bytes came")
    return content
