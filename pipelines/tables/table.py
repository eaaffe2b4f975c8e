"""A table: a folder of Parquet shards on any fsspec URI, with a manifest that says what made it.

A shard is written whole or not at all, under the name of the shard of `images` that it is about. The listing says what is
done: a stage that was killed resumes with the missing shards. A table whose identity differs from the one with which a stage
would make it now is refused: it is never mixed and never overwritten.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.errors import StorageError
from pipelines.storage.files import find_files, list_folder, open_file, read_file, write_file
from pipelines.tables.errors import DamagedShardError, MissingTableError, StaleTableError
from pipelines.tables.identity import MANIFEST, Identity, Manifest, _now, describe_differences, software_versions
from pipelines.tables.schema import MADE_BY, READ_WHOLE, REJECTS, form_of
from sana_model.files.inside import check_inside

REBUILD = "_rebuild.json"  # exists while the table is being deleted to be rebuilt
REPORT = "report.html"
REJECTS_FOLDER = "rejects"  # holds a table of refused rows for each table of the dataset
FACTS_KEY = b"sana.facts"  # key in a shard's Parquet footer: JSON, see ShardFacts
FOOTER_BYTES = 2**16  # pyarrow looks for a footer in as many bytes
ROW_GROUP_BYTES = 2**26  # memory for a shard that is read a few rows at a time


def absolute_uri(uri: str) -> str:
    """A local path made absolute (Ray's workers run elsewhere); any other URI as it is, without a slash at its end."""
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
        return self.path if self.dataset_uri.rstrip("/") == dataset_uri.rstrip("/") else self.uri

    def rejects(self) -> "Table":
        """The table of the refused rows, with the same shard names."""
        return Table(self.dataset_uri, f"{REJECTS_FOLDER}/{self.path}", REJECTS)

    def shard_uri(self, shard: str) -> str:
        return f"{self.uri}/{check_inside(shard)}.parquet"

    def list_shards(self) -> list[str]:
        """Names of the shards that exist, sorted."""
        names = list_folder(self.uri)
        return [name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and name[0] not in "._"]

    def list_files(self) -> dict[str, int]:
        """Path and size in bytes of each file in the table's folder, and in folders there whose names begin with "." or "_".

        Other folders there are other tables: see `_outer`.
        """
        return {name: size for name, size in find_files(self.uri).items() if "/" not in name or name[0] in "._"}

    def read_shard(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """Read all rows of a shard; from an object store only the parts with these columns are fetched, or a small file whole.

        Raises FileNotFoundError, StorageError, or DamagedShardError.
        """
        uri = self.shard_uri(shard)
        is_small = self.path.split("/")[0] in READ_WHOLE
        opened = BytesIO(read_file(uri)) if is_small else open_file(uri, buffer_size=FOOTER_BYTES)
        with opened as file, self._naming_damage(shard):
            return pq.read_table(file, columns=columns).replace_schema_metadata(None)

    def iter_shard(self, shard: str, num_rows: int) -> Iterator[pa.RecordBatch]:
        """Read a shard `num_rows` rows at a time, so that not all of it is in memory. Raises as `read_shard`."""
        with open_file(self.shard_uri(shard), buffer_size=FOOTER_BYTES) as file, self._naming_damage(shard):
            parquet = pq.ParquetFile(file)
            for group in range(parquet.num_row_groups):  # one call for all groups would read far more ahead
                yield from parquet.iter_batches(num_rows, row_groups=[group], use_threads=False)

    def read_facts(self, shard: str) -> "ShardFacts":
        """Read only the footer of a shard's file. Raises as `read_shard`."""
        with open_file(self.shard_uri(shard), buffer_size=FOOTER_BYTES) as file, self._naming_damage(shard):
            footer = pq.read_metadata(file)
            noted = json.loads((footer.metadata or {}).get(FACTS_KEY, b"{}"))
            return ShardFacts(num_rows=footer.num_rows, **noted)

    @contextmanager
    def _naming_damage(self, shard: str) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except (pa.ArrowException, OSError, ValueError, TypeError) as error:
            raise DamagedShardError(
                f"{self.shard_uri(shard)} is damaged ({error}): delete it, and its stage makes it again"
            ) from error

    def write_shard(
        self, shard: str, rows: pa.Table, *, fingerprint: str = "", figures: Mapping[str, float] | None = None
    ) -> None:
        """Write a shard whole, with its facts in the file's footer, from which `read_facts` reads them.

        Args:
            fingerprint: of the identity that makes the shard.
            figures: facts about the shard, by name.

        Raises:
            pyarrow.ArrowInvalid: the rows are not of the table's schema.
            StorageError: it could not be written; nothing is left of it then.
        """
        facts = {"fingerprint": fingerprint, "figures": dict(figures or {})}
        if self.schema == REJECTS:
            facts["rejects_by_reason"] = count_reasons(rows)
        noted = rows.cast(self.schema).replace_schema_metadata({FACTS_KEY: json.dumps(facts)})
        buffer = BytesIO()
        rows_at_once = max(noted.num_rows * ROW_GROUP_BYTES // max(noted.nbytes, 1), 1)
        pq.write_table(noted, buffer, rows_at_once, compression="zstd", write_page_checksum=True)
        write_file(self.shard_uri(shard), buffer.getvalue())

    def write_file(self, name: str, content: bytes) -> None:
        """Write a file in the table's folder; readers see the old one or the whole new one. Raises StorageError."""
        write_file(f"{self.uri}/{name}", content)

    def write_report(self, html: str) -> None:
        """Write a page as `report.html` in the table's folder. Raises StorageError."""
        self.write_file(REPORT, html.encode())

    def read_manifest(self) -> Manifest | None:
        """Read the manifest; None if there is none. Raises ValueError, which names the file, if it cannot be parsed."""
        try:
            content = read_file(f"{self.uri}/{MANIFEST}")
        except FileNotFoundError:
            return None
        try:
            return Manifest(**json.loads(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.uri}/{MANIFEST} is no manifest of this version ({error})") from error

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
        others = [f"{folder}/{name}" for name in names if name[0] not in "._"]
        there = f", which has {', '.join(others)}" if others else ""
        maker = f" (jobs.{MADE_BY[group]})" if group in MADE_BY else ""
        return f"{there}: run the stage that makes it first{maker}"

    def claim(self, identity: Identity) -> Manifest:
        """Begin or resume writing this table with `identity`.

        Raises StaleTableError, with the fields that differ, if the table was begun with another identity.
        """
        for table in (self, *self._outer()):
            if table.deletion_begun():
                message = f"{table.uri} is being deleted, to be made anew: start its job again, it goes on there"
                raise StaleTableError(message, table)
        try:
            manifest = self.read_manifest()
        except ValueError as error:
            raise StaleTableError(
                f"{error}. Put it back, or let the job make the table anew with --on_stale rebuild.", self
            ) from error
        if (manifest is None or manifest.is_old) and (old := self._find_old()) is not None:
            raise StaleTableError(_explain_old(*old), old[0])
        if manifest is None:
            if shards := self.list_shards():
                raise StaleTableError(
                    f"{self.uri} holds {len(shards)} shards and no {MANIFEST}: nothing says what made them. "
                    "Delete them, or let the job do it with --on_stale rebuild.",
                    self,
                )
            manifest = Manifest(
                fingerprint=identity.fingerprint,
                schema_version=form_of(identity.stage),
                rejects_by_reason={},
                versions=software_versions(),
                begun=_now(),
                **asdict(identity),
            )
            self.write_manifest(manifest)
        if {manifest.fingerprint, manifest.identity().fingerprint} != {identity.fingerprint}:  # the second: it was edited
            differences = "\n".join(f"  {line}" for line in describe_differences(manifest.identity(), identity))
            raise StaleTableError(
                f"{self.uri} was made in another way:\n{differences}\n"
                "Give the new table another name, put the setting back, or let the job delete this table and make it anew with "
                "--on_stale rebuild (tables that were made from it are stale then, and rebuilt by their own jobs).",
                self,
            )
        return manifest

    def deletion_begun(self) -> bool:
        """Whether a deletion of this table was begun and has not ended; see `audit.rebuild.delete_table`."""
        try:
            read_file(f"{self.uri}/{REBUILD}")
        except FileNotFoundError:
            return False
        return True

    def write_manifest(self, manifest: Manifest) -> None:
        content = asdict(manifest) | {"updated": _now()}
        self.write_file(MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def _explain_old(table: Table, manifest: Manifest) -> str:
    return (
        f"{table.uri} is of form {manifest.schema_version}, and this program knows form {form_of(manifest.stage)} of "
        f"what jobs.{manifest.stage} makes: let jobs.{manifest.stage} make it anew with --on_stale rebuild"
    )


def count_reasons(rejects: pa.Table) -> dict[str, int]:
    """How many rows there are for each reject_reason."""
    return dict(Counter(rejects["reject_reason"].to_pylist()))
