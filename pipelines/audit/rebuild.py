"""Deleting a stale table, so that its stage makes it anew: all of it or, after a death in the middle, the rest of it.

A mark is written first and deleted last. While it is there, `Table.claim` refuses to write into the table, so that old and new
never mix, and the manifest goes right after it, so that no stage takes what is left for an input. Other tables are not
touched: those that were made from this one become stale, and their own stages rebuild them.
"""

from pipelines.audit.status import find_tables
from pipelines.storage.errors import LeaseHeldError
from pipelines.storage.files import find_files, remove_files
from pipelines.storage.lease import LEASE, Leases, read_lease, shared
from pipelines.storage.swap import LOCK_SUFFIX
from pipelines.tables.identity import MANIFEST
from pipelines.tables.table import REBUILD, Table

KEPT = (REBUILD, LEASE, LEASE + LOCK_SUFFIX)


def delete_table(table: Table, leases: Leases | None = None) -> None:
    """Delete a table with its rejects, report and plan, or go on where that was broken off.

    Args:
        leases: of the job that will make the table again; None: the table's lease is held for this call alone.

    Raises:
        LeaseHeldError: it is being written, or a table that is made from it is: that one reads what would be deleted.
        StorageError
    """
    with shared(leases) as held:
        held.take(table.uri)
        _refuse_while_read(table)
        if not table.deletion_begun():
            table.write_file(REBUILD, b"{}\n")
        remove_files([f"{table.uri}/{MANIFEST}"])
        rejects = table.rejects().uri
        remove_files([f"{rejects}/{name}" for name in find_files(rejects)])
        remove_files([f"{table.uri}/{name}" for name in find_files(table.uri) if name not in KEPT])
        remove_files([f"{table.uri}/{REBUILD}"])


def _refuse_while_read(table: Table) -> None:
    for reader in find_tables(table.dataset_uri):
        manifest = reader.manifest
        if manifest is None or table.path not in manifest.inputs:
            continue
        lease = read_lease(reader.table.uri)
        if lease is not None and lease.is_alive():
            raise LeaseHeldError(f"{table.uri} cannot be deleted now: {reader.path} is made from it by {lease.describe()}")
