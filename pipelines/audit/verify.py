"""Reads every byte of a dataset's tables, and says what is wrong, where, and how to mend it.

Checks for each table:
- The manifest matches its fingerprint, and its inputs have the fingerprints that it names.
- Each file can be read to its end with correct page checksums, has the table's schema, and was made under this manifest.
- The ids of a shard and of its rejects are together exactly those of the shard that it was made from, and none occurs twice.
- The number of shards, rows and rejects is that of the manifest, and no temporary file is left.
- In `images`, each id is the hash of the bytes, and no id occurs twice in the dataset.

Memory: some megabytes a thread, and the ids of the shards that are being read; the ids of all images go to disk (`seen_ids`).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.audit.seen_ids import SeenIds
from pipelines.audit.status import FoundTable, expected_shards, find_stale, find_tables
from pipelines.storage.errors import StorageError
from pipelines.storage.files import open_file
from pipelines.tables.captions import read_captions
from pipelines.tables.identity import MANIFEST, Manifest
from pipelines.tables.schema import IMAGES_PATH, NESTED, ORIGINAL_CAPTIONER
from pipelines.tables.table import FACTS_KEY, REBUILD, Table

BATCH_ROWS = 64
BUFFER_BYTES = 2**20
REMAKE = "delete it, and its stage makes it again"
REBUILD_ADVICE = "run its stage with --on_stale rebuild"
KEYS = ("id", "reject_reason")
ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Violation:
    """Something wrong in a dataset. `file` is relative to the dataset; `remedy` says what a user can do."""

    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}: {self.remedy}"


@dataclass
class VerifyProgress:
    """How far a verification is. `num_shards` counts the shards of all chosen tables, `num_rows` the rows read so far."""

    num_shards: int = 0
    done_shards: int = 0
    num_rows: int = 0
    num_violations: int = 0


@dataclass
class _Counts:
    """Counts of a table, to be compared with its manifest."""

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    damaged: bool = False


@dataclass(frozen=True)
class _Shard:
    """The result of reading one shard. If it is `damaged`, nothing was counted."""

    rows: int
    reasons: Counter[str]
    violations: list[Violation]
    damaged: bool


OnVerifyProgress = Callable[[VerifyProgress], None]


def verify_dataset(
    dataset_uri: str,
    *,
    paths: Sequence[str] = (),
    num_threads: int = 8,
    on_progress: OnVerifyProgress = lambda progress: None,
) -> Iterator[Violation]:
    """Yield every violation as it is found.

    Args:
        paths: the tables to check; all tables unless given.
        num_threads: shards that are read at the same time.
        on_progress: called after each shard.

    Raises:
        ValueError: there is no such table, or no table at all.
        StorageError: a file could not be read for a reason other than damage.
    """
    tables = find_tables(dataset_uri)
    known = {found.path: found for found in tables}
    if not tables:
        raise ValueError(f"there is no dataset at {dataset_uri}: none of its folders holds a table (jobs.ingest begins one)")
    if missing := [path for path in paths if path not in known]:
        raise ValueError(f"there is no table {missing[0]!r} in {dataset_uri}; it holds {', '.join(known)}")
    chosen = [found for found in tables if not paths or found.path in paths]
    stale = find_stale(tables)
    shards = {found.path: found.table.list_shards() for found in tables}
    progress = VerifyProgress(num_shards=sum(len(shards[found.path]) for found in chosen))
    for found in chosen:
        for violation in _verify_table(found, known, shards, stale[found.path], num_threads, progress, on_progress):
            progress.num_violations += 1
            yield violation


def _verify_table(
    found: FoundTable,
    known: dict[str, FoundTable],
    shards: dict[str, list[str]],
    stale: list[str],
    num_threads: int,
    progress: VerifyProgress,
    on_progress: OnVerifyProgress,
) -> Iterator[Violation]:
    table, names = found.table, shards[found.path]
    yield from _check_manifest(found, stale)
    if found.manifest is not None and found.manifest.is_old:
        return
    yield from _check_listing(found, names, expected_shards(found, shards))
    source = None if stale else _source_of(found, known)
    counts = _Counts()
    with ExitStack() as stack:
        seen = stack.enter_context(SeenIds(names)) if found.path == IMAGES_PATH else None
        for shard in _in_threads(lambda name: _verify_shard(found, source, name, seen), names, num_threads):
            yield from shard.violations
            counts.rows += shard.rows
            counts.reasons.update(shard.reasons)
            counts.damaged |= shard.damaged
            progress.done_shards += 1
            progress.num_rows += shard.rows
            on_progress(progress)
        if seen is not None:
            yield from _duplicates(table, seen)
    if found.manifest is not None and found.manifest.complete and not counts.damaged:
        yield from _check_counts(table, found.manifest, len(names), counts)


def _in_threads(work: Callable[[str], _Shard], names: Iterable[str], num_threads: int) -> Iterator[_Shard]:
    """Yield the results in order, and start no more work than twice `num_threads` ahead of the caller."""
    waiting = iter(names)
    with ThreadPoolExecutor(num_threads) as pool:
        running = [pool.submit(work, name) for name in islice(waiting, 2 * num_threads)]
        while running:
            result = running.pop(0).result()
            running += [pool.submit(work, name) for name in islice(waiting, 1)]
            yield result


def _source_of(found: FoundTable, known: dict[str, FoundTable]) -> Table | None:
    """The input table whose rows are a table's rows and rejects."""
    manifest = found.manifest
    path = manifest.rows_of or next(iter(manifest.inputs), "") if manifest else ""
    return known[path].table if path in known else None


def _check_manifest(found: FoundTable, stale: list[str]) -> Iterator[Violation]:
    table, manifest = found.table, found.manifest
    file = f"{table.path}/{MANIFEST}"
    if table.deletion_begun():
        yield Violation(f"{table.path}/{REBUILD}", "the deletion of the table was broken off", "start its stage again")
    elif found.problem:
        yield Violation(file, found.problem, f"put it back, or {REBUILD_ADVICE}")
    elif manifest is None:
        yield Violation(file, "is missing: nothing says what made the shards", f"put it back, or {REBUILD_ADVICE}")
    elif not manifest.is_old and manifest.identity().fingerprint != manifest.fingerprint:
        yield Violation(file, "was edited: its fingerprint is not that of its content", f"put it back, or {REBUILD_ADVICE}")
    for cause in stale:
        yield Violation(table.path, f"is stale: {cause}", REBUILD_ADVICE)


def _check_listing(found: FoundTable, shards: list[str], expected: list[str] | None) -> Iterator[Violation]:
    table, manifest = found.table, found.manifest
    refused = set(table.rejects().list_shards())
    for folder in (table, table.rejects()):
        for name in folder.list_files():
            if name.startswith("."):
                yield Violation(
                    f"{folder.path}/{name}",
                    "is a leftover of a writer that died",
                    "delete it once no job is writing this table",
                )
    if expected is not None and found.path != IMAGES_PATH:
        for shard in sorted(set(shards) - set(expected)):
            yield Violation(_file(table, shard), "is about no shard of the table's inputs", "delete it")
    if manifest is not None and manifest.complete and expected is not None:
        for shard in sorted(set(expected) - set(shards))[: max(manifest.num_shards - len(shards), 0)]:
            yield Violation(_file(table, shard), "is missing, of a table that was complete", "run its stage again: it makes it")
    for shard in shards:
        if shard not in refused:
            yield Violation(
                _file(table.rejects(), shard), "is missing", f"delete {_file(table, shard)}, and its stage makes both"
            )


def _verify_shard(found: FoundTable, source: Table | None, shard: str, seen: SeenIds | None) -> _Shard:
    table, rejects = found.table, found.table.rejects()
    violations: list[Violation] = []
    kept = _read_through(found, table, shard, violations)
    refused = _read_through(found, rejects, shard, violations) if kept is not None else None
    if kept is None or refused is None:
        return _Shard(0, Counter(), violations, True)
    file, ids = _file(table, shard), kept["id"]
    if doubled := {row_id for row_id, count in Counter(ids).items() if count > 1}:
        violations.append(Violation(file, f"holds {_some(doubled)} more than once", REMAKE))
    if seen is not None:
        seen.add(shard, [row_id for row_id in ids if ID.fullmatch(row_id)])
    elif source is not None and (given := _ids_of(source, table, shard)) is not None:
        violations += _check_ids(file, set(ids), set(refused["id"]), given, source.path)
    return _Shard(len(ids), Counter(refused["reject_reason"]), violations, False)


def _check_ids(file: str, kept: set[str], refused: set[str], given: set[str], source: str) -> Iterator[Violation]:
    """Compare the ids of a shard with those of the shard that it was made from.

    Args:
        kept, refused: ids in the shard and in its rejects.
        given: ids in the same shard of the table `source`.
    """
    if lost := given - kept - refused:
        yield Violation(file, f"lacks {_some(lost)} of {source}, which its rejects lack too", REMAKE)
    if alien := (kept | refused) - given:
        yield Violation(file, f"or its rejects hold {_some(alien)} that {source} has not in this shard", REMAKE)
    if both := kept & refused:
        yield Violation(file, f"holds {_some(both)}, refused at the same time", REMAKE)


def _ids_of(source: Table, table: Table, shard: str) -> set[str] | None:
    """The ids of a source's shard that `table` is about, or None if it cannot be read: its own table's check reports that."""
    try:
        if source.path == IMAGES_PATH and table.path.split("/")[0] in NESTED:  # about those images that came with a caption
            return set(read_captions(source.dataset_uri, ORIGINAL_CAPTIONER, shard))
        return set(source.read_shard(shard, ["id"])["id"].to_pylist())
    except (FileNotFoundError, ValueError):
        return None


def _read_through(found: FoundTable, table: Table, shard: str, violations: list[Violation]) -> dict[str, list[str]] | None:
    """Read a file to its end, add to `violations`, and return its columns of KEYS; None if it is damaged or missing."""
    file = _file(table, shard)
    columns: dict[str, list[str]] = {name: [] for name in KEYS if name in table.schema.names}
    try:
        with open_file(table.shard_uri(shard), buffer_size=BUFFER_BYTES) as content:
            parquet = pq.ParquetFile(content, page_checksum_verification=True)
            if not parquet.schema_arrow.equals(table.schema):
                difference = _difference(parquet.schema_arrow, table.schema)
                violations.append(Violation(file, f"has other columns ({difference})", REMAKE))
                return None
            made_by = json.loads((parquet.metadata.metadata or {}).get(FACTS_KEY, b"{}")).get("fingerprint", "")
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS):
                for name, values in columns.items():
                    values += batch[name].to_pylist()
                if table.path == IMAGES_PATH and (changed := _changed_images(batch)):
                    violations.append(Violation(file, f"has other bytes than its id says for {_some(changed)}", REMAKE))
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        violations.append(Violation(file, f"is damaged ({str(error).strip() or type(error).__name__})", REMAKE))
        return None
    if found.manifest is not None and made_by not in ("", found.manifest.fingerprint):
        violations.append(Violation(file, f"was made by {made_by[:8]}, its table by {found.manifest.fingerprint[:8]}", REMAKE))
    return columns


def _changed_images(batch: pa.RecordBatch) -> list[str]:
    """The ids that are not the hash of their image's bytes."""
    pairs = zip(batch["id"].to_pylist(), batch["image_bytes"], strict=True)
    return [row_id for row_id, value in pairs if hashlib.sha256(value.as_buffer()).hexdigest() != row_id]


def _difference(found: pa.Schema, wanted: pa.Schema) -> str:
    """How the columns of a file differ from those of its table."""
    here, there = ({one.name: str(one) for one in schema} for schema in (found, wanted))
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    differences = [f"{here.get(name, f'no {name}')} in place of {there.get(name, 'nothing')}" for name in names]
    return ", ".join(differences) or "in another order"


def _check_counts(table: Table, manifest: Manifest, num_shards: int, counts: _Counts) -> Iterator[Violation]:
    reasons = dict(counts.reasons)
    pairs = [
        ("shards", manifest.num_shards, num_shards),
        ("rows", manifest.num_rows, counts.rows),
        ("rejects", manifest.num_rejects, counts.reasons.total()),
        *(
            (f"rejects for {name}", manifest.rejects_by_reason.get(name, 0), reasons.get(name, 0))
            for name in sorted(manifest.rejects_by_reason.keys() | reasons.keys())
        ),
    ]
    for what, told, read in pairs:
        if told != read:
            advice = "run its stage again, which counts anew; if no shard has a violation, nothing else is wrong"
            yield Violation(f"{table.path}/{MANIFEST}", f"tells of {told:,} {what}, there are {read:,}", advice)


def _duplicates(images: Table, seen: SeenIds) -> Iterator[Violation]:
    """Ids that occur in more than one shard."""
    for head, shards in seen.suspects():
        first: dict[str, str] = {}
        for shard in shards:
            for row_id in {row_id for row_id in images.read_shard(shard, ["id"])["id"].to_pylist() if row_id.startswith(head)}:
                if row_id in first:
                    problem = f"holds {row_id[:16]}… which {first[row_id]}.parquet holds too"
                    yield Violation(_file(images, shard), problem, f"{REMAKE} without it")
                first.setdefault(row_id, shard)


def _file(table: Table, shard: str) -> str:
    return f"{table.path}/{shard}.parquet"


def _some(ids: Iterable[object], limit: int = 3) -> str:
    """The number of ids, and the first few of them, as text."""
    listed = sorted(" of ".join(row_id) if isinstance(row_id, tuple) else str(row_id) for row_id in ids)
    shown = ", ".join(row_id if len(row_id) <= 16 else f"{row_id[:16]}…" for row_id in listed[:limit])
    more = f" and {len(listed) - limit:,} more" if len(listed) > limit else ""
    return f"{len(listed):,} id{'s' * (len(listed) != 1)} ({shown}{more})"
