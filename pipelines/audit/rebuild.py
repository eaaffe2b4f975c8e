"""Deletes a stale table, so that its stage can make it again. A deletion that was interrupted is resumed.

A mark (the file REBUILD) is written first and deleted last. While it exists, `Table.claim` refuses to write to the table, so
that old and new shards never mix. The manifest is deleted right after the mark is written, so that no stage uses the remaining
shards as an input. Other tables are not touched: those made from this one become stale, and their own stages rebuild them.
"""

from collections.abc import Container

from pipelines.audit.status import find_tables
from pipelines.storage.errors import LeaseHeldError
from pipelines.storage.files import remove_files
from pipelines.storage.lease import LEASE, Leases, read_lease, shared
from pipelines.storage.swap import LOCK_SUFFIX
from pipelines.tables.identity import MANIFEST
from pipelines.tables.table import REBUILD, Table

KEPT = (REBUILD, LEASE, LEASE + LOCK_SUFFIX)
"""Files that stay while the others are deleted: the mark, and the lease that this deletion holds."""


def delete_table(table: Table, leases: Leases | None = None) -> None:
    """Delete a table with its rejects, report and plan, or resume a deletion that was interrupted.

    Args:
        leases: of the job that will make the table again; None: the table's lease is held for this call alone.

    Raises:
        LeaseHeldError: the table is being written; or a table made from it is, whose stage reads what would be deleted.
        StorageError: a file could not be deleted.
    """
    with shared(leases) as held:
        ticket = held.take(table.uri).ticket
        refuse_while_read(table)
        if not table.deletion_begun():
            table.write_file(REBUILD, b"{}\n", ticket=ticket)
        remove_files([f"{table.uri}/{MANIFEST}"])
        rejects = table.rejects()
        ticket.check()
        remove_files([f"{rejects.uri}/{name}" for name in rejects.list_files()])
        names = table.list_files()
        ticket.check()
        remove_files([f"{table.uri}/{name}" for name in names if name not in KEPT])
        remove_files([f"{table.uri}/{REBUILD}"])


def refuse_while_read(table: Table, *, but: Container[str] = ()) -> None:
    """Raise LeaseHeldError while a table that is made from this one is being written. `but`: paths that do not count."""
    for reader in find_tables(table.dataset_uri):
        manifest = reader.manifest
        if manifest is None or table.path not in manifest.inputs or reader.path in but:
            continue
        lease = read_lease(reader.table.uri)
        if lease is not None and lease.is_alive():
            raise LeaseHeldError(f"{table.uri} cannot be changed now: {reader.path} is made from it by {lease.describe()}")
