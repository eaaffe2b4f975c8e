"""Reads every byte of a dataset's tables, and says what is wrong, where, and how to mend it.

Checks for each table:
- The manifest matches its fingerprint, and its inputs have the fingerprints that it names.
- What its stage keeps beside the shards can be read: the plan of ingest, generations, verdicts, copied lists, counts.
- Each file can be read to its end with correct checksums, is the shard that its name says, has the table's schema, and was made
  under this manifest.
- The ids of a shard and of its rejects are together exactly those of the shard that it was made from, and none occurs twice.
- The number of shards, rows, rejects and bytes is that of the manifest, and no temporary file is left.
- In `images`, each id is the hash of the bytes, and no id occurs twice in the dataset.

Nothing is changed. `repair` does what each violation proposes; a shard is compared only with inputs that are whole themselves.

Memory: a row group (64 MB at most) a thread, and the ids of the shards that are being read; the ids of all images go to disk
(`seen_ids`).
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
import pyarrow.compute as pc

from pipelines.audit.comparisons import check_counts, check_ids, difference, find_duplicates, some
from pipelines.audit.kept_files import check_kept_files
from pipelines.audit.seen_ids import SeenIds
from pipelines.audit.status import FoundTable, expected_shards, find_stale, find_tables
from pipelines.audit.violations import Violation, file_of, mend_or_move, move, remake
from pipelines.tables.captions import read_captions
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.identity import MANIFEST, LaterVersionError
from pipelines.tables.schema import ABOUT_CAPTIONS, IMAGES_PATH, ORIGINAL_CAPTIONER
from pipelines.tables.table import FACTS_KEY, REBUILD, Table

BATCH_ROWS = 64
REBUILD_ADVICE = "run its stage with --on_stale rebuild"
TAKES_OVER = "its stage then takes the shards over, if it runs with the settings that made them"
KEYS = ("id", "reject_reason")
ID = re.compile(r"[0-9a-f]{64}")


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
    look = _Look(known, shards, stale, num_threads)
    for found in tables:
        expected = expected_shards(found, shards)
        due = set(expected or ()).union(shards[found.path])
        look.due[found.path] = sorted(due)
        if found not in chosen:
            continue
        for violation in _verify_table(found, look, expected, progress, on_progress):
            progress.num_violations += 1
            yield violation


@dataclass
class _Look:
    """What a verification knows of all tables, by path.

    Args:
        bad: files of shards that are not what they should be, or may not be.
        due: the shards that are there, and those that should be.
        strangers: of the table that is read, (shard, file, fingerprint) of files that another identity made.
    """

    known: dict[str, FoundTable]
    shards: dict[str, list[str]]
    stale: dict[str, list[str]]
    num_threads: int
    bad: set[str] = field(default_factory=set)
    due: dict[str, list[str]] = field(default_factory=dict)
    strangers: list[tuple[str, str, str]] = field(default_factory=list)


def _verify_table(
    found: FoundTable, look: _Look, expected: list[str] | None, progress: VerifyProgress, on_progress: OnVerifyProgress
) -> Iterator[Violation]:
    table, names, stale = found.table, look.shards[found.path], look.stale[found.path]
    yield from _check_manifest(found, stale)
    if found.manifest is not None and found.manifest.is_old:
        return
    yield from check_kept_files(table, names)
    yield from _check_listing(found, names, expected, look)
    source = None if stale else _source_of(found, look.known)
    counts = _Counts()
    with ExitStack() as stack:
        seen = stack.enter_context(SeenIds(names)) if found.path == IMAGES_PATH else None
        for shard in _in_threads(lambda name: _verify_shard(found, source, name, seen, look), names, look.num_threads):
            yield from shard.violations
            look.bad.update(violation.file for violation in shard.violations)
            counts.rows += shard.rows
            counts.reasons.update(shard.reasons)
            counts.damaged |= shard.damaged
            progress.done_shards += 1
            progress.num_rows += shard.rows
            on_progress(progress)
        if seen is not None:
            yield from find_duplicates(table, seen, look.bad)
    yield from _tell_strangers(found, look)
    if found.manifest is not None and found.manifest.complete and not counts.damaged:
        yield from check_counts(table, found.manifest, names, counts.rows, counts.reasons)


def _tell_strangers(found: FoundTable, look: _Look) -> Iterator[Violation]:
    """Files that another identity made than the manifest's. If it made none of the shards, the manifest is not theirs."""
    strangers, look.strangers = sorted(look.strangers), []
    if found.manifest is None or not strangers:
        return
    if {shard for shard, _, _ in strangers} == set(look.shards[found.path]):
        problem = f"is not that of the shards, which were made by {strangers[0][2][:8]}"
        yield Violation(f"{found.path}/{MANIFEST}", problem, "put back the one that they were made with")
        return
    for shard, file, made_by in strangers:
        look.bad.add(file)
        yield remake(found.table, shard, file, f"was made by {made_by[:8]}, its table by {found.manifest.fingerprint[:8]}")


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
    elif found.problem and found.is_later:
        yield Violation(file, "was written by a later version of this program", LaterVersionError.remedy)
    elif found.problem:
        yield mend_or_move(table, MANIFEST, found.problem, afterwards=TAKES_OVER)
    elif manifest is None:
        yield Violation(file, "is missing: nothing says what made the shards", f"put it back, or start its stage: {TAKES_OVER}")
    elif not manifest.is_old and manifest.identity().fingerprint != manifest.fingerprint:
        problem = "was edited: its fingerprint is not that of its content"
        yield mend_or_move(table, MANIFEST, problem, afterwards=TAKES_OVER)
    for cause in stale:
        yield Violation(table.path, f"is stale: {cause}", REBUILD_ADVICE)


def _check_listing(found: FoundTable, shards: list[str], expected: list[str] | None, look: _Look) -> Iterator[Violation]:
    table, manifest = found.table, found.manifest
    refused = set(table.rejects().list_shards())
    for folder in (table, table.rejects()):
        for name in folder.list_files():
            if name.startswith("."):
                file = f"{folder.path}/{name}"
                yield move(table, (file,), file, "is a leftover of a writer that died")
    if expected is not None and found.path != IMAGES_PATH:
        source = _source_of(found, look.known)
        for shard in sorted(set(shards).difference(expected, look.due[source.path] if source else ())):
            files = (file_of(table, shard), file_of(table.rejects(), shard))
            yield move(table, files, files[0], "is about no shard of the table's inputs")
    if manifest is not None and manifest.complete and expected is not None:
        for shard in sorted(set(expected) - set(shards))[: max(manifest.num_shards - len(shards), 0)]:
            yield Violation(
                file_of(table, shard), "is missing, of a table that was complete", "run its stage again: it makes it"
            )
    for shard in shards:
        if shard not in refused:
            yield remake(table, shard, file_of(table.rejects(), shard), "is missing")


def _verify_shard(found: FoundTable, source: Table | None, shard: str, seen: SeenIds | None, look: _Look) -> _Shard:
    table, rejects = found.table, found.table.rejects()
    violations: list[Violation] = []
    kept = _read_through(found, table, shard, violations, look)
    refused = _read_through(found, rejects, shard, violations, look)
    if kept is None or refused is None:
        return _Shard(0, Counter(), violations, True)
    file, ids = file_of(table, shard), kept["id"]
    if doubled := {row_id for row_id, count in Counter(ids).items() if count > 1}:
        violations.append(remake(table, shard, file, f"holds {some(doubled)} more than once"))
    if seen is not None:
        seen.add(shard, [row_id for row_id in ids if ID.fullmatch(row_id)])
    elif source is not None and file_of(source, shard) not in look.bad:
        given = _ids_of(source, table, shard)
        violations += check_ids(table, shard, set(ids), set(refused["id"]), given, source.path) if given is not None else ()
    return _Shard(len(ids), Counter(refused["reject_reason"]), violations, False)


def _ids_of(source: Table, table: Table, shard: str) -> set[str] | None:
    """The ids of a source's shard that `table` is about, or None if it cannot be read: its own table's check reports that."""
    try:
        if (
            source.path == IMAGES_PATH and table.path.split("/")[0] in ABOUT_CAPTIONS
        ):  # about those images that came with a caption
            return set(read_captions(source.dataset_uri, ORIGINAL_CAPTIONER, shard))
        return set(source.read_shard(shard, ["id"])["id"].to_pylist())
    except (FileNotFoundError, ValueError):
        return None


def _read_through(
    found: FoundTable, table: Table, shard: str, violations: list[Violation], look: _Look
) -> dict[str, list[str]] | None:
    """Read a file to its end, add to `violations` and `look.strangers`, and return its columns of KEYS.

    None if it is damaged, missing, or was made by another identity than the table's.
    """
    file = file_of(table, shard)
    columns: dict[str, list[str]] = {name: [] for name in KEYS if name in table.schema.names}
    try:
        with table.open_shard(shard) as parquet:
            made_by = json.loads((parquet.metadata.metadata or {}).get(FACTS_KEY, b"{}")).get("fingerprint", "")
            if found.manifest is not None and made_by not in ("", found.manifest.fingerprint):
                look.strangers.append((shard, file, made_by))
                return None
            schema = parquet.metadata.schema.to_arrow_schema().remove_metadata()
            if not schema.equals(table.schema):
                violations.append(remake(found.table, shard, file, f"has other columns ({difference(schema, table.schema)})"))
                return None
            for batch in parquet.iter_batches(BATCH_ROWS):
                for name, values in columns.items():
                    values += batch[name].to_pylist()
                if found.path.split("/")[0] in ("scores", "image_scores") and (unfit := _not_finite(batch)):
                    problem = f"has scores that are not finite for {some(unfit)}"
                    violations.append(remake(found.table, shard, file, problem))
                if table.path == IMAGES_PATH and (changed := _changed_images(batch)):
                    problem = f"has other bytes than its id says for {some(changed)}"
                    violations.append(remake(found.table, shard, file, problem))
    except FileNotFoundError:
        return None
    except DamagedShardError as error:
        reason = str(error.__cause__).strip() or type(error.__cause__).__name__
        violations.append(remake(found.table, shard, file, f"is damaged ({reason})"))
        return None
    return columns


def _not_finite(batch: pa.RecordBatch) -> list[str]:
    """The ids of rows with a number that is not finite."""
    floats = [column for column in batch.columns if pa.types.is_floating(column.type)]
    bad = {row for column in floats for row in pc.indices_nonzero(pc.invert(pc.is_finite(column))).to_pylist()}
    return [batch["id"][row].as_py() for row in sorted(bad)]


def _changed_images(batch: pa.RecordBatch) -> list[str]:
    """The ids that are not the hash of their image's bytes."""
    pairs = zip(batch["id"].to_pylist(), batch["image_bytes"], strict=True)
    return [row_id for row_id, value in pairs if hashlib.sha256(value.as_buffer()).hexdigest() != row_id]
