"""A table: a folder of Parquet shards on any fsspec URI, with a manifest that says what made it.

A shard is written whole or not at all, under the name of the shard of `images` that it is about. What is done is what is
listed: a killed stage goes on with the shards that are absent. A table made otherwise than a stage would make it now is
refused, never mixed and never overwritten.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from pipelines.schema import REJECTS, SCHEMA_VERSION

MANIFEST = "_manifest.json"
REPORT = "report.html"


class StaleTableError(ValueError):
    """A table exists that was made in another way than it would be made now."""


class MissingTableError(ValueError):
    """A stage's input is not there."""


def absolute_uri(uri: str) -> str:
    """A local path made absolute (Ray's workers run elsewhere); any other URI as it is, without a slash at its end."""
    if "://" in uri:
        return uri.rstrip("/")
    return str(Path(uri).absolute())


@dataclass(frozen=True)
class Identity:
    """Everything that can change a value in a table."""

    stage: str
    config: Mapping[str, Any]
    models: Mapping[str, str]
    """Each model's revision or hash of weights."""
    inputs: Mapping[str, str]
    """Path and fingerprint of the tables that were read."""

    @cached_property
    def fingerprint(self) -> str:
        """Hex; the same for equal content on every machine."""
        content = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`_manifest.json` of a table. Counts are those of the last run that ended; `complete` says that none was missing then."""

    fingerprint: str
    stage: str
    config: dict[str, Any]
    models: dict[str, str]
    inputs: dict[str, str]
    schema_version: int = SCHEMA_VERSION
    complete: bool = False
    num_shards: int = 0
    num_rows: int = 0
    num_rejects: int = 0
    rejects_by_reason: dict[str, int]
    updated: str = ""

    def identity(self) -> Identity:
        return Identity(self.stage, self.config, self.models, self.inputs)


@dataclass(frozen=True)
class Table:
    """One table of a dataset; `path` is its folder there ("captions/llava")."""

    dataset_uri: str
    path: str
    schema: pa.Schema

    @property
    def uri(self) -> str:
        return f"{self.dataset_uri.rstrip('/')}/{self.path}"

    def rejects(self) -> "Table":
        """The rows that were refused, under the same shard names."""
        return Table(self.dataset_uri, f"rejects/{self.path}", REJECTS)

    def list_shards(self) -> list[str]:
        """Names of the shards that exist, sorted."""
        filesystem, root = self._open()
        filesystem.invalidate_cache()
        try:
            names = filesystem.ls(root, detail=False)
        except FileNotFoundError:
            return []
        names = [name.rsplit("/", 1)[-1] for name in names]
        return sorted(name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and name[0] not in "._")

    def read_shard(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """All rows of a shard. Raises FileNotFoundError, or ValueError naming the file if it is damaged."""
        filesystem, root = self._open()
        with filesystem.open(f"{root}/{shard}.parquet", "rb") as file:
            return self._parse(shard, file, columns)

    def _parse(self, shard: str, file: Any, columns: list[str] | None) -> pa.Table:
        """Of a file on an object store only the parts with these columns are fetched."""
        try:
            return pq.read_table(file, columns=columns)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(
                f"{self.uri}/{shard}.parquet is damaged ({error}): delete it, and its stage makes it again"
            ) from error

    def write_shard(self, shard: str, rows: pa.Table) -> None:
        """Write a shard whole. Raises pyarrow.ArrowInvalid if the rows are not of the table's schema."""
        buffer = BytesIO()
        pq.write_table(rows.cast(self.schema), buffer, compression="zstd")
        self.write_file(f"{shard}.parquet", buffer.getvalue())

    def write_file(self, name: str, content: bytes) -> None:
        """Put a file into the table's folder: readers see the old one or the whole new one."""
        filesystem, root = self._open()
        if "file" not in filesystem.protocol:  # an object store shows an object only when all of it has arrived
            filesystem.pipe_file(f"{root}/{name}", content)
            return
        Path(root).mkdir(parents=True, exist_ok=True)
        temporary = Path(root, f".{name}.{uuid.uuid4().hex}")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(Path(root, name))
        finally:
            temporary.unlink(missing_ok=True)

    def read_manifest(self) -> Manifest | None:
        """None if there is none. Raises ValueError naming the file if it cannot be read."""
        filesystem, root = self._open()
        try:
            content = filesystem.cat_file(f"{root}/{MANIFEST}")
        except FileNotFoundError:
            return None
        try:
            return Manifest(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.uri}/{MANIFEST} is no manifest of this version ({error})") from error

    def require(self) -> Manifest:
        """The manifest of a stage's input. Raises MissingTableError."""
        manifest = self.read_manifest()
        if manifest is None:
            raise MissingTableError(f"there is no table {self.path!r} in {self.dataset_uri}: run the stage that makes it first")
        return manifest

    def claim(self, identity: Identity) -> Manifest:
        """Begin or go on writing this table as `identity` says.

        Raises StaleTableError if it was begun in another way, with the fields that differ.
        """
        manifest = self.read_manifest()
        if manifest is None:
            if shards := self.list_shards():
                raise StaleTableError(f"{self.uri} holds {len(shards)} shards and no {MANIFEST}: nothing says what made them")
            fields = asdict(identity)
            manifest = Manifest(fingerprint=identity.fingerprint, rejects_by_reason={}, **fields)
            self.write_manifest(manifest)
        if manifest.fingerprint != identity.fingerprint:
            differences = "\n".join(f"  {line}" for line in describe_differences(manifest.identity(), identity))
            raise StaleTableError(
                f"{self.uri} was made in another way:\n{differences}\n"
                "Give the new table another name, put the setting back, or delete the table (and what was made from it)."
            )
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        content = asdict(manifest) | {"updated": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write_file(MANIFEST, (json.dumps(content, indent=2) + "\n").encode())

    def _open(self) -> tuple[AbstractFileSystem, str]:
        filesystem, root = fsspec.url_to_fs(self.uri)
        return filesystem, root.rstrip("/")


def describe_differences(old: Identity, new: Identity) -> list[str]:
    """A line "field: old -> new" for each field that differs."""
    before, after = _flatten(asdict(old)), _flatten(asdict(new))
    absent = "(absent)"
    return [
        f"{name}: {_shorten(before.get(name, absent))} -> {_shorten(after.get(name, absent))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name, absent) != after.get(name, absent)
    ] or ["schema_version"]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{name}" if prefix else name)
    return flat


def _shorten(value: object, limit: int = 80) -> str:
    text = repr(value) if value != "(absent)" else "(absent)"
    return text if len(text) <= limit else text[: limit - 3] + "..."
