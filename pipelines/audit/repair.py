"""Does what a verification proposes: moves damaged files aside, mends flipped bits, and lets tables be counted anew.

What is moved lies in `_damaged/<time>/` of the dataset, under the paths that it had, with `repair.json`, which says why. The
stages then make again what is missing, and nothing is deleted before a verification finds all to be well (`remove_aside`).

The leases of all tables are held from before the verification until the end, so no writer changes them in between.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from pipelines.audit.rebuild import refuse_while_read
from pipelines.audit.status import find_tables
from pipelines.audit.verify import OnVerifyProgress, verify_dataset
from pipelines.audit.violations import Action, Violation
from pipelines.storage.files import find_files, move_file, read_file, remove_files, write_file
from pipelines.storage.lease import Leases, Ticket
from pipelines.tables.hashed_json import mend
from pipelines.tables.table import Table

ASIDE = "_damaged"
REASONS = "repair.json"


@dataclass(frozen=True)
class Done:
    """What was done about a violation: `did` is empty if nothing was safe to do."""

    violation: Violation
    did: str


def repair_dataset(
    dataset_uri: str,
    leases: Leases,
    *,
    paths: Sequence[str] = (),
    num_threads: int = 8,
    on_progress: OnVerifyProgress = lambda progress: None,
) -> Iterator[Done]:
    """Verify tables, do what is proposed, and yield what was done about each violation.

    Args:
        leases: those of the tables are taken from it.
        paths: the tables; all unless given.

    Raises:
        LeaseHeldError: one of the tables is being written, or one that is made from it.
        ValueError, StorageError: as `verify_dataset`.
    """
    tables = {found.path: found.table for found in find_tables(dataset_uri) if not paths or found.path in paths}
    for table in tables.values():
        leases.take(table.uri)
        refuse_while_read(table, but=tables)
    found = list(verify_dataset(dataset_uri, paths=paths, num_threads=num_threads, on_progress=on_progress))
    repair = _Repair(dataset_uri, f"{ASIDE}/{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    for violation in found:
        if (action := violation.action) is None:
            yield Done(violation, "")
            continue
        table = tables[action.table]
        ticket = leases.take(table.uri).ticket
        ticket.check()
        yield Done(violation, repair.act(table, action, violation, ticket))


class _Repair:
    """One repair of a dataset. `aside`: the folder for what it moves, relative to the dataset."""

    def __init__(self, dataset_uri: str, aside: str):
        self.dataset_uri, self.aside = dataset_uri, aside
        self.reasons: dict[str, list[str]] = {}

    def act(self, table: Table, action: Action, violation: Violation, ticket: Ticket) -> str:
        """Do it, and say what was done."""
        if action.kind == "recount":
            table.write_manifest(replace(table.require(), complete=False), ticket=ticket)
            return "is counted anew when its stage runs"
        self.reasons.setdefault(violation.file, []).append(violation.problem)
        write_file(f"{self.dataset_uri}/{self.aside}/{REASONS}", (json.dumps(self.reasons, indent=2) + "\n").encode())
        if action.kind == "mend":
            return self._mend(action.files[0])
        moved = [file for file in action.files if self._move(file)]
        return f"moved to {self.aside}: {', '.join(moved)}" if moved else f"is in {self.aside} already"

    def _mend(self, file: str) -> str:
        content = read_file(f"{self.dataset_uri}/{file}")
        mended = mend(content)
        assert mended is not None
        write_file(f"{self.dataset_uri}/{self.aside}/{file}", content)
        write_file(f"{self.dataset_uri}/{file}", mended)
        return f"one bit was set right; as it was, it is in {self.aside}"

    def _move(self, file: str) -> bool:
        try:
            move_file(f"{self.dataset_uri}/{file}", f"{self.dataset_uri}/{self.aside}/{file}")
        except FileNotFoundError:
            return False
        return True


def remove_aside(dataset_uri: str) -> int:
    """Delete all that was moved aside; returns the number of files. Call it after a verification that found nothing."""
    files = list(find_files(f"{dataset_uri}/{ASIDE}"))
    remove_files([f"{dataset_uri}/{ASIDE}/{name}" for name in files])
    return len(files)
