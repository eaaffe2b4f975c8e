"""The state of a dataset: which tables are complete, which are stale and why, what was refused, and the trainings.

Cost: the folders of every table and of its rejects are listed (an object store returns 1000 names a request, so a table of
100,000 shards takes 200 requests), and each manifest and the plan of ingest are read. No shard is opened unless `count_rows` is
set: then the footers of the shards of tables that are not complete are read (two small requests a shard).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipelines.ingest.plan import read_plan
from pipelines.storage.files import NUM_THREADS, list_folder, read_file
from pipelines.storage.lease import read_lease
from pipelines.tables.errors import DamagedFileError
from pipelines.tables.identity import LaterVersionError, Manifest
from pipelines.tables.schema import IMAGES_PATH, NESTED, TABLE_SCHEMAS, form_of, schema_of
from pipelines.tables.table import REBUILD, Table, is_elsewhere
from pipelines.train.loop.record import RECORD

SHORT = 8  # digits of a fingerprint that are shown


@dataclass(frozen=True, kw_only=True)
class FoundTable:
    """A table found in a dataset.

    `problem` says why its manifest cannot be read; None if it can be or is missing. `is_later`: a later version wrote it.
    """

    table: Table
    manifest: Manifest | None
    problem: str | None = None
    is_later: bool = False

    @property
    def path(self) -> str:
        return self.table.path


@dataclass(frozen=True, kw_only=True)
class TableStatus:
    """The state of a table.

    Args:
        num_shards: shards that exist.
        missing: names of shards that its inputs or the plan of ingest have and the table has not; None if the expected shards
            are unknown, as for pictures of a stage that has not ended.
        ended: whether its stage has ended with exactly these shards.
        num_rows, num_rejects: None if they are only in the shards' footers, and those were not read.
        num_bytes: of shards and rejects.
        fingerprint, stage, updated: of the manifest; empty without one.
        stale: why its stage would make another table now, one line for each cause.
        problems: what else is wrong with it.
        writer: who holds its lease now, or None.
    """

    path: str
    num_shards: int
    missing: list[str] | None
    ended: bool
    num_rows: int | None
    num_rejects: int | None
    rejects_by_reason: dict[str, int]
    num_bytes: int
    fingerprint: str
    stage: str
    updated: str
    stale: list[str]
    problems: list[str]
    writer: str | None

    @property
    def complete(self) -> bool:
        """Whether its stage has ended and every shard that its inputs have now exists."""
        return self.missing == [] and self.ended and not self.problems


@dataclass(frozen=True, kw_only=True)
class TrainingStatus:
    """The state of a training. `result` is None until it has ended; `inputs` are paths with fingerprints."""

    name: str
    inputs: dict[str, str]
    num_steps: int
    result: dict[str, Any] | None
    stale: list[str]


@dataclass(frozen=True, kw_only=True)
class DatasetStatus:
    """The state of all tables and trainings of a dataset."""

    dataset_uri: str
    tables: list[TableStatus]
    trainings: list[TrainingStatus]


def find_tables(dataset_uri: str) -> list[FoundTable]:
    """Find every table that has a manifest, shards or an unfinished deletion. Inputs come before what is made from them."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        groups = list(pool.map(lambda group: _find_paths(dataset_uri, group), TABLE_SCHEMAS))
        paths = [path for group in groups for path in group]
        found = [table for table in pool.map(lambda path: find_table(dataset_uri, path), paths) if table is not None]
    return _inputs_first(found)


def _inputs_first(tables: list[FoundTable]) -> list[FoundTable]:
    """The tables in their order, but each after its inputs: chosen pictures are made from other pictures' evaluations."""
    waiting = {table.path: table for table in tables}
    ordered: list[FoundTable] = []

    def add(path: str) -> None:
        table = waiting.pop(path, None)
        if table is not None:
            for source in table.manifest.inputs if table.manifest else ():
                add(source)
            ordered.append(table)

    for table in tables:
        add(table.path)
    return ordered


def _find_paths(dataset_uri: str, group: str) -> list[str]:
    """The folders of a group that may be tables: those in it, and in `NESTED` groups those one floor deeper too."""
    if group == IMAGES_PATH:
        return [group]
    paths = [f"{group}/{name}" for name in _subfolders(f"{dataset_uri}/{group}")]  # a report may lie beside the tables
    if group not in NESTED:
        return paths
    # A table of an old form lies above its successors.
    return [path for outer in paths for path in (outer, *(f"{outer}/{name}" for name in _subfolders(f"{dataset_uri}/{outer}")))]


def _subfolders(uri: str) -> list[str]:
    return [name for name in list_folder(uri, with_files=False) if name[0] not in "._"]


def find_table(dataset_uri: str, path: str) -> FoundTable | None:
    """Find one table; None if it does not exist. Raises ValueError if `path` cannot be the path of a table."""
    group = path.split("/")[0]
    if group not in TABLE_SCHEMAS or (path == IMAGES_PATH) != (group == IMAGES_PATH):
        raise ValueError(
            f"{path!r} is not the path of a table: give {IMAGES_PATH}, or such as captions/llava ({', '.join(TABLE_SCHEMAS)})"
        )
    table = Table(dataset_uri, path, TABLE_SCHEMAS[group])
    try:
        manifest = table.read_manifest()
    except DamagedFileError as error:
        is_later = isinstance(error.__cause__, LaterVersionError)
        return FoundTable(table=table, manifest=None, problem=str(error), is_later=is_later)
    if manifest is not None:
        table = Table(dataset_uri, path, schema_of(path, manifest.config))
    if manifest is None and not table.list_shards() and REBUILD not in list_folder(table.uri):
        return None
    return FoundTable(table=table, manifest=manifest)


def dataset_status(dataset_uri: str, *, count_rows: bool = False) -> DatasetStatus:
    """The state of a dataset. Raises ValueError if there is neither a table nor a training.

    Args:
        count_rows: also count the rows of unfinished tables, from the footers of their shards.
    """
    tables = find_tables(dataset_uri)
    trainings = dict(find_trainings(dataset_uri))
    if not tables and not trainings:
        raise ValueError(f"there is no dataset at {dataset_uri}: none of its folders holds a table (jobs.ingest begins one)")
    stale = find_stale(tables)
    shards: dict[str, list[str]] = {}
    statuses = []
    for found in tables:
        status, shards[found.path] = _table_status(found, shards, stale[found.path], count_rows)
        statuses.append(status)
    return DatasetStatus(
        dataset_uri=dataset_uri,
        tables=statuses,
        trainings=[_training_status(name, record, tables, stale) for name, record in sorted(trainings.items())],
    )


def _table_status(
    found: FoundTable, known: Mapping[str, list[str]], stale: list[str], count_rows: bool
) -> tuple[TableStatus, list[str]]:
    """The status of a table, and the names of its shards."""
    table, manifest = found.table, found.manifest
    files, refused = table.list_files(), table.rejects().list_files()
    shards = [name.removesuffix(".parquet") for name in files if name.endswith(".parquet") and name[0] not in "._"]
    expected = expected_shards(found, known)
    counted = manifest is not None and manifest.complete and manifest.num_shards == len(shards)
    rows, reasons = (manifest.num_rows, manifest.rejects_by_reason) if manifest is not None and counted else (None, {})
    if rows is None and count_rows:
        rows, reasons = _count(table, shards)
    lease = read_lease(table.uri)
    status = TableStatus(
        path=table.path,
        num_shards=len(shards),
        missing=None if expected is None else sorted(set(expected) - set(shards)),
        ended=counted,
        num_rows=rows,
        num_rejects=None if rows is None else sum(reasons.values()),
        rejects_by_reason=dict(sorted(reasons.items(), key=lambda item: -item[1])),
        num_bytes=sum(files[f"{shard}.parquet"] for shard in shards) + sum(refused.values()),
        fingerprint=manifest.fingerprint if manifest else "",
        stage=manifest.stage if manifest else "",
        updated=manifest.updated if manifest else "",
        stale=stale,
        problems=_problems(found, files, expected),
        writer=lease.describe() if lease is not None and lease.is_alive() else None,
    )
    return status, shards


def _problems(found: FoundTable, files: Mapping[str, int], expected: list[str] | None) -> list[str]:
    """The table's problems, apart from being stale."""
    if REBUILD in files:
        return ["its deletion was begun and not ended: start its stage again"]
    if found.problem:
        return [found.problem]
    if found.manifest is None:
        return ["it has shards and no manifest: nothing says what made them"]
    try:
        if found.path == IMAGES_PATH and expected is None:
            read_plan(found.table)
    except DamagedFileError as error:
        return [str(error)]
    return []


def expected_shards(found: FoundTable, known: Mapping[str, list[str]]) -> list[str] | None:
    """The shards that a table should have, or None if unknown. `known` has the shards of the tables before it, by path."""
    try:
        if found.path == IMAGES_PATH and (plan := read_plan(found.table)) is not None:
            return list(plan.shards)
    except DamagedFileError:
        return None
    manifest = found.manifest
    source = manifest.rows_of or next(iter(manifest.inputs), "") if manifest else ""
    if source in known:
        return known[source]
    if manifest is None or manifest.inputs or not manifest.complete:
        return None
    return [f"{number:05d}" for number in range(manifest.num_shards)]


def _count(table: Table, shards: list[str]) -> tuple[int, dict[str, int]]:
    """Count rows, and rejects by reason, from the footers of the shards."""
    rejects = table.rejects()
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        rows = sum(facts.num_rows for facts in pool.map(table.read_facts, shards))
        reasons: Counter[str] = Counter()
        for facts in pool.map(rejects.read_facts, shards):
            reasons.update(facts.rejects_by_reason)
    return rows, dict(reasons)


def find_stale(tables: list[FoundTable]) -> dict[str, list[str]]:
    """The causes, by path of each table, for which its stage would make another table now; empty if it would not."""
    stale: dict[str, list[str]] = {}
    for found in tables:  # inputs come before what is made from them
        manifest = found.manifest
        causes = stale_inputs(manifest.inputs, tables, stale) if manifest else []
        if manifest and manifest.is_old:
            causes.append(f"it is of form {manifest.schema_version}, this program writes form {form_of(manifest.stage)}")
        stale[found.path] = causes
    return stale


def stale_inputs(inputs: Mapping[str, str], tables: list[FoundTable], stale: Mapping[str, list[str]]) -> list[str]:
    """One line for each input that was made anew, is gone, or is stale itself.

    Args:
        inputs: path and fingerprint of each table that was read.
        tables: the tables of the dataset now.
        stale: the causes for the tables that come before, by path.
    """
    present = {found.path: found.manifest for found in tables}
    causes = []
    for path, fingerprint in inputs.items():
        manifest = present.get(path)
        if manifest is None:
            causes.append(f"{path} is gone")
        elif manifest.fingerprint != fingerprint:
            causes.append(f"{path} was made anew ({fingerprint[:SHORT]} -> {manifest.fingerprint[:SHORT]})")
        elif stale.get(path):
            causes.append(f"{path} is stale")
    return causes


def find_trainings(dataset_uri: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of the folder and the record of each training in a dataset."""
    for name in list_folder(dataset_uri, with_files=False):
        if name in TABLE_SCHEMAS or name[0] in "._":
            continue
        try:
            yield name, json.loads(read_file(f"{dataset_uri}/{name}/{RECORD}"))
        except FileNotFoundError:
            continue


def _training_status(
    name: str, record: dict[str, Any], tables: list[FoundTable], stale: Mapping[str, list[str]]
) -> TrainingStatus:
    return TrainingStatus(
        name=name,
        inputs=record["inputs"],
        num_steps=record["config"]["num_steps"],
        result=record["result"],
        stale=stale_inputs({name: value for name, value in record["inputs"].items() if not is_elsewhere(name)}, tables, stale),
    )
