"""Checks the files that stages keep beside their shards: the plan of ingest, copied lists, generations, verdicts, counts."""

from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from typing import Any

import pyarrow as pa

from pipelines.audit.violations import Violation, maker_of, mend_or_move, move
from pipelines.ingest.plan import PLAN, to_plan
from pipelines.score.verdicts import GENERATIONS, to_generations
from pipelines.storage.files import read_file
from pipelines.storage.lease import LEASE
from pipelines.tables.errors import DamagedFileError
from pipelines.tables.identity import MANIFEST
from pipelines.tables.sealed import SealedFile
from pipelines.tables.table import REBUILD, Table

OTHERS = (MANIFEST, LEASE, REBUILD)
PARSERS: Mapping[str, Callable[[Any], object]] = {PLAN: to_plan, GENERATIONS: to_generations}
AFTER_PLAN = "then jobs.ingest plans anew, and refuses unless the source holds the same files as at first"
AFTER_GENERATIONS = "with its table, which jobs.duplicates then makes anew"
AFTER_COUNTS = "the table does without it"


def check_kept_files(table: Table, shards: list[str]) -> Iterator[Violation]:
    """Yield what is wrong with the files beside a table's shards, but for its manifest."""
    names = list(table.list_files())
    for name in names:
        if name[0] != "_" or name in OTHERS:
            continue
        if name.endswith(".json"):
            yield from _check_json(table, name, shards)
        elif name.endswith(".parquet"):
            yield from _check_parquet(table, name)


def _check_json(table: Table, name: str, shards: list[str]) -> Iterator[Violation]:
    try:
        content = table.read_json(name, PARSERS.get(name, dict))
    except DamagedFileError as error:
        problem = f"is damaged or was edited ({error.__cause__})"
        if name == GENERATIONS:  # which verdicts are about which shards is lost
            files = (f"{folder.path}/{file}" for folder in (table, table.rejects()) for file in folder.list_files())
            also = tuple(file for file in files if not file.rpartition("/")[2].startswith(LEASE))
            yield mend_or_move(table, name, problem, afterwards=AFTER_GENERATIONS, also=also)
        else:
            yield mend_or_move(table, name, problem, afterwards=AFTER_PLAN if name == PLAN else AFTER_COUNTS)
        return
    if name == PLAN:
        known = content.shards.keys()  # type: ignore[attr-defined]
        for shard in sorted(set(shards) - known):
            problem = f"does not plan shard {shard}, which exists"
            yield Violation(f"{table.path}/{name}", problem, "put back the plan with which the shard was made")


def _check_parquet(table: Table, name: str) -> Iterator[Violation]:
    folder, _, file = name.rpartition("/")
    try:
        SealedFile(
            BytesIO(read_file(f"{table.uri}/{name}")), folder=folder or table.path, name=file.removesuffix(".parquet")
        ).read()
    except (pa.ArrowException, OSError, ValueError) as error:
        maker = maker_of(table).rpartition(" ")[2]  # of two jobs the one named last keeps such files
        path = f"{table.path}/{name}"
        afterwards = f", and {maker} makes it again if it needs it"
        yield move(table, (path,), path, f"is damaged ({error})", afterwards=afterwards)
