"""Read, list and write files at any fsspec URI. Failures that may pass are tried again; others raise a clear error."""

import glob
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec import AbstractFileSystem

from pipelines.storage.errors import StorageError
from pipelines.storage.retry import call
from sana_model.files.atomic import write_atomically
from sana_model.files.filesystems import open_filesystem

NUM_THREADS = 32  # threads of a pool that reads many small files: they mostly wait for the storage


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", "local://"))


def read_file(uri: str) -> bytes:
    """Read a whole file. Raises FileNotFoundError, StorageError."""
    filesystem, path = open_filesystem(uri)
    # With more than one connection, s3fs would first ask how large the file is.
    options = {"max_concurrency": 1} if uri.startswith(("s3://", "s3a://")) else {}
    return call(lambda: filesystem.cat_file(path, **options), "read", uri)


def open_file(uri: str, *, buffer_size: int = 2**20) -> BinaryIO:
    """Open a file for reading and seeking. Of a remote file only the ranges that are read are fetched, `buffer_size` at least.

    Both this call and every read raise FileNotFoundError or StorageError.
    """
    filesystem, path = open_filesystem(uri)
    if is_local(uri):
        return call(lambda: cast(BinaryIO, open(path, "rb")), "read", uri)
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(filesystem, path, uri), buffer_size))


class _RemoteFile(io.RawIOBase):
    """Reads ranges of a remote file. Each range is fetched by `call`, and fetched again if it came cut short."""

    def __init__(self, filesystem: AbstractFileSystem, path: str, uri: str):
        self.filesystem, self.path, self.uri = filesystem, path, uri
        self.size = call(lambda: int(filesystem.size(path)), "read", uri)
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self.position)
        if count <= 0:
            return 0
        buffer[:count] = call(lambda: self._fetch(self.position, count), "read", self.uri)
        self.position += count
        return count

    def readall(self) -> bytes:
        """The rest of the file by one request; that of `io.RawIOBase` makes one for every 8 KiB."""
        return self.read(max(0, self.size - self.position)) or b""

    def _fetch(self, start: int, count: int) -> bytes:
        content = self.filesystem.cat_file(self.path, start=start, end=start + count)
        if len(content) != count:
            raise EOFError(f"{len(content)} of {count} bytes came")
        return content


def list_folder(uri: str, *, with_files: bool = True) -> list[str]:
    """Names of the files (if wanted) and folders in a folder, sorted; empty if it does not exist. Raises StorageError."""
    return sorted(_name(entry) for entry in _list(uri) if with_files or entry["type"] != "file")


def list_sizes(uri: str) -> dict[str, int]:
    """Names of the files in a folder, sorted, with their sizes in bytes; empty if it does not exist. Raises StorageError."""
    return {_name(entry): entry["size"] or 0 for entry in sorted(_list(uri), key=_name) if entry["type"] == "file"}


def _list(uri: str) -> list[dict[str, Any]]:
    filesystem, root = open_filesystem(uri)

    def entries() -> list[dict[str, Any]]:
        filesystem.invalidate_cache()
        try:
            return filesystem.ls(root, detail=True)
        except FileNotFoundError:
            return []

    return call(entries, "list", uri)


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rsplit("/", 1)[-1]


def find_files(uri: str) -> dict[str, int]:
    """Find every file below a folder, at any depth: path relative to it -> size in bytes. Raises StorageError."""
    filesystem, root = open_filesystem(uri)

    def files() -> dict[str, int]:
        filesystem.invalidate_cache()
        found = filesystem.find(root, detail=True)
        return {path.removeprefix(f"{root}/"): info["size"] or 0 for path, info in sorted(found.items())}

    return call(files, "list", uri)


def write_file(uri: str, content: bytes | memoryview) -> None:
    """Write a file, and make its folders. Readers see the old file or the whole new one, even if the writer dies.

    Raises StorageError; nothing of the new file is left then.
    """
    filesystem, path = open_filesystem(uri)
    if is_local(uri):
        call(lambda: write_atomically(Path(path), lambda temporary: temporary.write_bytes(content)), "write", uri)
        return
    try:  # an object store shows an object only when all of it has arrived
        call(lambda: filesystem.pipe_file(path, bytes(content)), "write", uri)
    except FileNotFoundError as error:
        raise StorageError(f"cannot write {uri}: there is no such bucket: make it, or give another ({error})") from error


def upload_folder(folder: str | Path, uri: str) -> None:
    """Copy every file in a local folder, at any depth, below a URI. Raises StorageError."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            write_file(f"{uri}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def move_file(uri: str, target_uri: str) -> None:
    """Move a file within its storage, and make the folders. Raises FileNotFoundError, StorageError."""
    filesystem, path = open_filesystem(uri)
    target = open_filesystem(target_uri)[1]
    if is_local(uri):
        call(lambda: Path(target).parent.mkdir(parents=True, exist_ok=True), "write", target_uri)
        call(lambda: Path(path).replace(target), "move", uri)
        return
    call(lambda: filesystem.cp_file(path, target), "move", uri)
    remove_file(uri)


def remove_file(uri: str) -> None:
    """Delete a file, if it exists. Raises StorageError."""
    filesystem, path = open_filesystem(uri)

    def remove() -> None:
        try:
            filesystem.rm_file(path)
        except FileNotFoundError:
            return

    call(remove, "delete", uri)


def remove_files(uris: Sequence[str]) -> None:
    """Delete those of some files that exist; from an object store a thousand with each request. Raises StorageError."""
    if not uris:
        return
    if is_local(uris[0]):
        for uri in uris:
            remove_file(uri)
        return
    filesystem, _ = open_filesystem(uris[0])
    # `rm` takes a path for a pattern, and "captions/*/x" would delete from all captioners.
    paths = [glob.escape(open_filesystem(uri)[1]) for uri in uris]

    def remove() -> None:
        try:
            filesystem.rm(paths)
        except FileNotFoundError:  # at least one is missing, and a store that deletes one by one stops there
            for path in (open_filesystem(uri)[1] for uri in uris):
                if filesystem.exists(path):
                    filesystem.rm_file(path)

    call(remove, "delete", f"{uris[0]} and {len(uris) - 1} more")


def remove_leftovers(uri: str) -> None:
    """Delete the temporary files of killed writers from a local folder. Nobody else may be writing there."""
    if not is_local(uri):
        return
    _, root = open_filesystem(uri)
    for path in Path(root).glob(".*.tmp"):
        call(partial(path.unlink, missing_ok=True), "delete", str(path))
