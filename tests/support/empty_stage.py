"""A stage without Ray and without work: its shards are made in this process, and are empty."""

from collections.abc import Callable, Iterator

import pyarrow as pa

from pipelines.stages.contract import OnProgress, Outcome, StageResult
from pipelines.stages.run import run_stream
from pipelines.stages.shards import write_output
from pipelines.storage.lease import Leases, Ticket
from pipelines.tables.identity import Identity
from pipelines.tables.schema import REJECTS
from pipelines.tables.table import Table


def empty_stage(table: Table, identity: Identity) -> Callable[..., StageResult]:
    """The `run_stage` of `track_stage` that makes shard 00000 of a table, without a row."""

    def stream(missing: list[str], ticket: Ticket) -> Iterator[Outcome]:
        for shard in missing:
            empty = (pa.Table.from_pylist([], schema) for schema in (table.schema, REJECTS))
            write_output(table, shard, *empty, {}, identity.fingerprint, ticket)
            yield Outcome(shard=shard, num_rows=0, rejects_by_reason={}, figures={}, error=None, stops="")

    def stage(on_progress: OnProgress, leases: Leases | None = None) -> StageResult:
        return run_stream(table, identity, ["00000"], stream, max_reject_share=1.0, on_progress=on_progress, leases=leases)

    return stage
