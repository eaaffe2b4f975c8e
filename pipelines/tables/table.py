"""A table: a folder of Parquet shards on any fsspec URI, with a manifest that says what made it.

A shard is written whole or not at all, under the name of the shard of `images` that it is about. The listing says what is
done: a stage that was killed resumes with the missing shards. A table whose identity differs from the one with which a stage
would make it now is refused: it is never mixed and never overwritten.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from pipelines.storage.errors import StorageError
from pipelines.storage.files import NUM_THREADS, find_files, list_folder, list_sizes, open_file, read_file, write_file
from pipelines.storage.home import expand_home
from pipelines.storage.lease import Ticket
from pipelines.tables.errors import DamagedFileError, DamagedShardError, MissingTableError, StaleTableError
from pipelines.tables.hashed_json import from_hashed_json, to_hashed_json
from pipelines.tables.identity import MANIFEST, Identity, Manifest, _now, describe_differences, software_versions, to_manifest
from pipelines.tables.schema import MADE_BY, READ_WHOLE, REJECTS, form_of
from pipelines.tables.sealed import TAIL_BYTES, SealedFile, write_sealed
from sana_model.files.inside import check_inside
from sana_model.files.redact import redact_uri

REBUILD = "_rebuild.json"  # exists while the table is being deleted to be rebuilt
REPORT = "report.html"
REJECTS_FOLDER = "rejects"  # holds a table of refused rows for each table of the dataset
TABLE_KEY = "table"  # field of a JSON file: the path of the table whose it is
FACTS_KEY = b"sana.facts"  # key in a shard's Parquet footer: JSON, see ShardFacts
REMAKE = "let python -m jobs.repair move it aside, and its stage makes it again"
MEND_FILE = "put it back, or let python -m jobs.repair mend it or move it aside"
ROW_GROUP_BYTES = 2**26  # memory for a shard that is read a few rows at a time

T = TypeVar("T")


def absolute_if_here(path: str | None) -> str | None:
    """The path of a local file or folder as `absolute_uri` has it; a hub id, a URI or None as it is."""
    return absolute_uri(path) if path is not None and Path(path).exists() else path


def absolute_uri(uri: str) -> str:
    """A local path made absolute (Ray's workers run elsewhere), ~ too; any other URI as it is, without a slash at its end."""
    uri = expand_home(uri)
    if "://" in uri:
        return uri.rstrip("/")
    return str(Path(uri).absolute())


def table_uri(dataset_uri: str, name: str) -> str:
    """The URI of a table from its name: its path in the dataset, or a URI in another dataset (see `Table.name_in`)."""
    return name if is_elsewhere(name) else f"{dataset_uri.rstrip('/')}/{name}"


def is_elsewhere(name: str) -> bool:
    """Whether a table's name refers to another dataset."""
    return "://" in name or Path(name).is_absolute()


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """The footer of a shard's file: number of rows, fingerprint of the identity that made it, the worker's figures, and for a
    shard of rejects the number of rows by reason."""

    num_rows: int
    fingerprint: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    rejects_by_reason: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One table of a dataset; `path` is its folder there ("captions/llava"). Raises ValueError if it would lie elsewhere."""

    dataset_uri: str
    path: str
    schema: pa.Schema

    def __post_init__(self) -> None:
        check_inside(self.path)  # it may come from a configuration or a manifest that a stranger wrote

    @property
    def uri(self) -> str:
        return f"{self.dataset_uri.rstrip('/')}/{self.path}"

    def name_in(self, dataset_uri: str) -> str:
        """Its path, or its URI if the table is in another dataset."""
        return self.path if self.dataset_uri.rstrip("/") == dataset_uri.rstrip("/") else redact_uri(self.uri)

    def rejects(self) -> "Table":
        """The table of the refused rows, with the same shard names."""
        return Table(self.dataset_uri, f"{REJECTS_FOLDER}/{self.path}", REJECTS)

    def shard_uri(self, shard: str) -> str:
        return f"{self.uri}/{check_inside(shard)}.parquet"

    def list_shards(self) -> list[str]:
        """Names of the shards that exist, sorted."""
        return list(self.list_sizes())

    def list_sizes(self) -> dict[str, int]:
        """Names of the shards that exist, sorted, with the sizes of their files in bytes."""
        sizes = list_sizes(self.uri)
        return {
            name.removesuffix(".parquet"): size
            for name, size in sizes.items()
            if name.endswith(".parquet") and name[0] not in "._"
        }

    def count_bytes(self, shards: Iterable[str]) -> int:
        """Bytes of the files of some shards, and of their rejects; without those that do not exist."""
        sizes = [self.list_sizes(), self.rejects().list_sizes()]
        return sum(found.get(shard, 0) for shard in shards for found in sizes)

    def list_files(self) -> dict[str, int]:
        """Path and size in bytes of each file in the table's folder, and in folders there whose names begin with "." or "_".

        Other folders there are other tables: see `_outer`.
        """
        return {name: size for name, size in find_files(self.uri).items() if "/" not in name or name[0] in "._"}

    def read_shard(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """Read all rows of a shard; from an object store only the parts with these columns are fetched, or a small file whole.

        Raises FileNotFoundError, StorageError, or DamagedShardError.
        """
        with self.open_shard(shard) as file:
            return file.read(columns).replace_schema_metadata(None)

    def iter_shard(self, shard: str, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Read a shard `num_rows` rows at a time, so that not all of it is in memory. Raises as `read_shard`."""
        with self.open_shard(shard) as file:
            yield from file.iter_batches(num_rows)

    def read_facts(self, shard: str) -> "ShardFacts":
        """Read only the footer of a shard's file. Raises as `read_shard`."""
        with self.open_shard(shard) as file:
            noted = json.loads((file.metadata.metadata or {}).get(FACTS_KEY, b"{}"))
            return ShardFacts(num_rows=file.metadata.num_rows, **noted)

    def is_sealed(self, shard: str) -> bool:
        """Whether a shard knows its own name and checksums; those of earlier versions do not. Raises as `read_shard`."""
        with self.open_shard(shard) as file:
            return file.is_sealed

    @contextmanager
    def open_shard(self, shard: str) -> Iterator[SealedFile]:
        """Open a shard's file, whose bytes are checked as they are read.

        Raises, also for what is read in the block, FileNotFoundError, StorageError, or DamagedShardError: the file is not what
        was written, or was written as another shard.
        """
        uri = self.shard_uri(shard)
        is_small = self.path.split("/")[0] in READ_WHOLE
        with BytesIO(read_file(uri)) if is_small else open_file(uri, buffer_size=TAIL_BYTES) as opened:
            try:
                yield SealedFile(opened, folder=self.path, name=shard)
            except StorageError:
                raise
            except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
                raise DamagedShardError(f"{uri} is damaged ({error}): {REMAKE}") from error

    def write_shard(
        self,
        shard: str,
        rows: pa.Table,
        *,
        fingerprint: str = "",
        figures: Mapping[str, float] | None = None,
        ticket: Ticket | None = None,
    ) -> None:
        """Write a shard whole, with its facts in the file's footer, from which `read_facts` reads them.

        Args:
            fingerprint: of the identity that makes the shard.
            figures: facts about the shard, by name.
            ticket: of the table's lease. As in all methods that write, it is checked right before the write; without it,
                nothing keeps two writers apart.

        Raises:
            pyarrow.ArrowInvalid: the rows are not of the table's schema.
            LeaseLostError: another writer has the table now; nothing is written then.
            StorageError: it could not be written; nothing is left of it then.
        """
        facts = {"fingerprint": fingerprint, "figures": dict(figures or {})}
        if self.schema == REJECTS:
            facts["rejects_by_reason"] = count_reasons(rows)
        noted = rows.cast(self.schema).replace_schema_metadata({FACTS_KEY: json.dumps(facts)})
        rows_at_once = max(noted.num_rows * ROW_GROUP_BYTES // max(noted.nbytes, 1), 1)
        content = write_sealed(noted, rows_at_once, folder=self.path, name=check_inside(shard))
        self.write_file(f"{shard}.parquet", content, ticket=ticket)

    def write_file(self, name: str, content: bytes | memoryview, *, ticket: Ticket | None = None) -> None:
        """Write a file in the table's folder; readers see the old one or the whole new one. Raises as `write_shard`."""
        if ticket is not None:
            ticket.check()
        write_file(f"{self.uri}/{name}", content)

    def write_json(
        self, name: str, content: Mapping[str, Any], *, indent: int | None = 2, ticket: Ticket | None = None
    ) -> None:
        """Write a JSON file with its checksums in the table's folder. Raises as `write_shard`."""
        self.write_file(name, to_hashed_json({**content, TABLE_KEY: self.path}, indent=indent), ticket=ticket)

    def read_json(self, name: str, parse: Callable[[Any], T]) -> T:
        """Read a JSON file that `write_json` wrote, or an earlier version without checksums, and pass its content to `parse`.

        Raises FileNotFoundError; DamagedFileError, also for what `parse` raises; StorageError.
        """
        content = read_file(f"{self.uri}/{name}")
        try:
            fields = from_hashed_json(content)
            if isinstance(fields, dict) and (written_as := fields.pop(TABLE_KEY, self.path)) != self.path:
                raise ValueError(f"it is a copy of that of {written_as}")
            return parse(fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            remedy = getattr(error, "remedy", MEND_FILE)
            raise DamagedFileError(f"{self.uri}/{name} is not what this version wrote ({reason}): {remedy}") from error

    def write_report(self, html: str) -> None:
        """Write a page as `report.html` in the table's folder. Raises StorageError."""
        self.write_file(REPORT, html.encode())

    def read_manifest(self) -> Manifest | None:
        """Read the manifest; None if there is none. Raises DamagedFileError."""
        try:
            return self.read_json(MANIFEST, to_manifest)
        except FileNotFoundError:
            return None

    def require(self) -> Manifest:
        """The manifest of a stage's input. Raises MissingTableError; StaleTableError if the table is of an old form."""
        manifest = self.read_manifest()
        if manifest is None or manifest.is_old:
            self.refuse_old()
        if manifest is None:
            raise MissingTableError(f"there is no table {self.path!r} in {self.dataset_uri}{self._explain_missing()}")
        return manifest

    def refuse_old(self) -> None:
        """Raise StaleTableError if a table of an old form lies where this one does, or would, and is not being deleted."""
        old = self._find_old()
        if old is not None and not old[0].deletion_begun():
            raise StaleTableError(_explain_old(*old))

    def _find_old(self) -> "tuple[Table, Manifest] | None":
        """A table of a form that is no longer read: this one, or one in the folder above it."""
        for table in (self, *self._outer()):
            manifest = table.read_manifest()
            if manifest is not None:
                return (table, manifest) if manifest.is_old else None
        return None

    def _outer(self) -> "list[Table]":
        """The table that may lie in the folder above: `scores/<clip>` once held the scores of all captioners."""
        folder = self.path.rpartition("/")[0]
        return [Table(self.dataset_uri, folder, self.schema)] if "/" in folder else []

    def _explain_missing(self) -> str:
        """The likely cause: no dataset at all, or another table of the same kind is meant, or its stage has not run."""
        if not list_folder(self.dataset_uri):
            return ", where nothing is: is this the dataset? (jobs.ingest begins one)"
        group, folder = self.path.split("/")[0], self.path.rpartition("/")[0]
        names = list_folder(f"{self.dataset_uri}/{folder}", with_files=False) if folder else []
        others = [path for name in names if name[0] not in "._" and (path := f"{folder}/{name}") != self.path]
        there = f", which has {', '.join(others)}" if others else ""
        maker = f" (jobs.{MADE_BY[group]})" if group in MADE_BY else ""
        return f"{there}: run the stage that makes it first{maker}"

    def claim(self, identity: Identity, *, ticket: Ticket | None = None) -> Manifest:
        """Begin or resume writing this table with `identity`.

        Shards without a manifest are taken over if this identity made them.

        Raises StaleTableError, with the fields that differ, if the table was begun with another identity; DamagedFileError if
        its manifest is damaged or was edited: then nobody knows, and nothing may be deleted.
        """
        for table in (self, *self._outer()):
            if table.deletion_begun():
                message = f"{table.uri} is being deleted, to be made anew: start its job again, it goes on there"
                raise StaleTableError(message, table)
        manifest = self.read_manifest()
        if (manifest is None or manifest.is_old) and (old := self._find_old()) is not None:
            raise StaleTableError(_explain_old(*old), old[0])
        if manifest is None:
            self._refuse_others_shards(identity)
            manifest = Manifest(
                fingerprint=identity.fingerprint,
                schema_version=form_of(identity.stage),
                rejects_by_reason={},
                versions=software_versions(),
                begun=_now(),
                **asdict(identity),
            )
            self.write_manifest(manifest, ticket=ticket)
        if manifest.identity().fingerprint != manifest.fingerprint:
            raise DamagedFileError(f"{self.uri}/{MANIFEST} was edited: its fingerprint is not that of its content: {MEND_FILE}")
        if manifest.fingerprint != identity.fingerprint:
            differences = "\n".join(f"  {line}" for line in describe_differences(manifest.identity(), identity))
            raise StaleTableError(
                f"{self.uri} was made in another way:\n{differences}\n"
                "Give the new table another name, put the setting back, or let the job delete this table and make it anew with "
                "--on_stale rebuild (tables that were made from it are stale then, and rebuilt by their own jobs).",
                self,
            )
        return manifest

    def _refuse_others_shards(self, identity: Identity) -> None:
        """Raise StaleTableError if there are shards that another identity made. The footer of each says which one did."""
        shards = self.list_shards()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            if all(facts.fingerprint == identity.fingerprint for facts in pool.map(self.read_facts, shards)):
                return
        raise StaleTableError(
            f"{self.uri} holds {len(shards)} shards and no {MANIFEST}, and the settings, models or inputs that made them were "
            "others. Put the manifest back, or let the job delete them and make the table anew with --on_stale rebuild.",
            self,
        )

    def deletion_begun(self) -> bool:
        """Whether a deletion of this table was begun and has not ended; see `audit.rebuild.delete_table`."""
        try:
            read_file(f"{self.uri}/{REBUILD}")
        except FileNotFoundError:
            return False
        return True

    def write_manifest(self, manifest: Manifest, *, ticket: Ticket | None = None) -> None:
        """Raises as `write_shard`."""
        self.write_json(MANIFEST, asdict(manifest) | {"updated": _now()}, ticket=ticket)


def _explain_old(table: Table, manifest: Manifest) -> str:
    return (
        f"{table.uri} is of form {manifest.schema_version}, and this program knows form {form_of(manifest.stage)} of "
        f"what jobs.{manifest.stage} makes: let jobs.{manifest.stage} make it anew with --on_stale rebuild"
    )


def count_reasons(rejects: pa.Table) -> dict[str, int]:
    """How many rows there are for each reject_reason."""
    return dict(Counter(rejects["reject_reason"].to_pylist()))
