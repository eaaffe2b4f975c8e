"""Run a data stage: the missing shards go through Ray Data, refused rows become rejects, and everything is counted."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from ray.exceptions import RayError, RayTaskError

from pipelines.stages.contract import OnProgress, Outcome, Progress, ReadShard, Resources, ShardWorker, StageResult
from pipelines.stages.shards import MAX_FAILED_SHARDS, RETRIES, STOPS, ShardJob, stream_in_process, stream_shards
from pipelines.storage.files import NUM_THREADS, remove_leftovers
from pipelines.storage.lease import Lease, Leases, Ticket, shared
from pipelines.tables.errors import DamagedShardError, ShardError, TooManyRejectsError
from pipelines.tables.identity import Identity, Manifest
from pipelines.tables.table import REMAKE, ShardFacts, Table

DIED = (
    f"its process died {RETRIES + 1} times, and again when it was tried alone. Did it run out of memory? Ray's logs say more "
    "(ray logs, or /tmp/ray/session_latest/logs)."
)

COUNT = "num_"
"""Figures whose names begin so are counts: they are summed over the shards."""

Stream = Callable[[list[str], Ticket], Iterator[Outcome]]
"""Makes shards, checking the ticket before each write, and yields the outcome of each shard when it is written."""


def run_shards(
    output: Table,
    identity: Identity,
    shards: list[str],
    *,
    read_shard: ReadShard,
    make_worker: Callable[[], ShardWorker],
    resources: Resources,
    max_reject_share: float,
    on_progress: OnProgress = lambda progress: None,
    leases: Leases | None = None,
    in_process: bool = False,
) -> StageResult:
    """Make the missing shards of `output`, each by one call of a worker.

    Args:
        in_process: work in this process, without actors: it has reserved what the worker needs.

    Raises as `run_stream`; and ShardError if some shards could not be made (all others are), or more than a few failed.
    """

    def stream(missing: list[str], ticket: Ticket) -> Iterator[Outcome]:
        job = ShardJob(
            output=output,
            fingerprint=identity.fingerprint,
            ticket=ticket,
            read_shard=read_shard,
            make_worker=make_worker,
            resources=resources,
        )
        return _make_shards(job, missing, in_process)

    return run_stream(
        output, identity, shards, stream, max_reject_share=max_reject_share, on_progress=on_progress, leases=leases
    )


def run_stream(
    output: Table,
    identity: Identity,
    shards: list[str],
    stream: Stream,
    *,
    max_reject_share: float,
    on_progress: OnProgress = lambda progress: None,
    leases: Leases | None = None,
) -> StageResult:
    """Have `stream` make the missing shards of `output`; it yields the outcome of each shard that it has written.

    Args:
        stream: checks the ticket that it is given before it writes a shard.
        leases: of the calling job; None: the lease of `output` is held for this call alone.

    Raises:
        StaleTableError: `output` was made with another identity.
        TooManyRejectsError: over `max_reject_share` of the rows were refused. The shards made so far stay.
        StorageError: the storage refused, or did not answer for long.
        StageError: a worker found that no shard can be made now.
        LeaseHeldError, LeaseLostError: another writer holds `output`, or has taken it over.
    """
    with shared(leases) as held:
        return _run(output, identity, shards, stream, held.take(output.uri), max_reject_share, on_progress)


def _run(
    output: Table,
    identity: Identity,
    shards: list[str],
    stream: Stream,
    lease: Lease,
    max_reject_share: float,
    on_progress: OnProgress,
) -> StageResult:
    start = time.monotonic()
    manifest = output.claim(identity, ticket=lease.ticket)
    for table in (output, output.rejects()):
        remove_leftovers(table.uri)
    found = set(output.list_shards()) & set(shards)
    progress = Progress(len(shards), len(found), len(found))
    was_done = manifest.complete and manifest.num_shards == len(found) == len(shards)
    if was_done and manifest.num_bytes in (None, output.count_bytes(shards)):  # else a file was changed since: look at all
        progress.add_shard(manifest.num_rows, manifest.rejects_by_reason, {})
    else:
        was_done = False
        _count_found(output, manifest.fingerprint, sorted(found), progress)
    on_progress(progress)
    if was_done:
        _check_rejects(output, progress, max_reject_share, final=True)
        return _result_of(output, manifest, len(found), time.monotonic() - start, 0.0)
    missing = [shard for shard in shards if shard not in found]
    for outcome in stream(missing, lease.ticket) if missing else ():
        lease.check()
        progress.done_shards += 1
        progress.add_shard(outcome.num_rows, outcome.rejects_by_reason, outcome.figures)
        progress.new_rows += outcome.num_rows + sum(outcome.rejects_by_reason.values())
        progress.seconds = time.monotonic() - start
        on_progress(progress)
        _check_rejects(output, progress, max_reject_share)
    _check_rejects(output, progress, max_reject_share, final=True)
    lease.check()
    return _complete(output, shards, progress, start, lease.ticket)


def _make_shards(job: ShardJob, missing: list[str], in_process: bool) -> Iterator[Outcome]:
    """Yield the outcome of each shard when it is written. Failed shards are tried once more, by new actors, after all others.

    Raises StorageError, StageError, LeaseLostError, ShardError.
    """
    failed: dict[str, str] = {}
    stream_part = stream_in_process if in_process else stream_shards
    for again in (False, True):
        failed = dict.fromkeys(missing, DIED)
        try:
            for outcome in stream_part(job, missing, alone=again) if missing else ():
                if outcome.error is None:
                    del failed[outcome.shard]
                    yield outcome
                    continue
                if outcome.stops:
                    raise STOPS[outcome.stops](outcome.error)
                failed[outcome.shard] = outcome.error
                if sum(error != DIED for error in failed.values()) > MAX_FAILED_SHARDS:
                    raise ShardError(_describe_failures(job.output, failed))
        except RayTaskError:
            raise
        except RayError as error:
            raise ShardError(
                f"{job.output.uri}: over {MAX_FAILED_SHARDS} shards ended their process. The last: {error}"
            ) from error
        missing = sorted(failed)
    if missing:
        raise ShardError(_describe_failures(job.output, failed))


def _describe_failures(output: Table, failed: dict[str, str]) -> str:
    told = {shard: error for shard, error in failed.items() if error != DIED} or failed
    shards = ", ".join(sorted(told)[: MAX_FAILED_SHARDS + 1])
    first = min(told)
    return f"{output.uri}: shards {shards} could not be made. Shard {first}: {told[first]}"


def _complete(output: Table, shards: list[str], progress: Progress, start: float, ticket: Ticket) -> StageResult:
    """Write the counts into the manifest."""
    manifest = output.require()
    figures: dict[str, float] = {}
    for name, values in progress.figures.items():
        if name.startswith(COUNT):
            figures[name] = sum(values)
        else:
            figures |= {f"{name}.mean": sum(values) / len(values), f"{name}.min": min(values)}
    counted = replace(
        manifest,
        complete=True,
        num_shards=progress.num_shards,
        num_rows=progress.num_rows,
        num_rejects=progress.num_rejects,
        num_bytes=output.count_bytes(shards),
        rejects_by_reason=dict(progress.rejects_by_reason),
        figures=figures,
    )
    if counted != manifest:
        output.write_manifest(counted, ticket=ticket)
    return _result_of(output, counted, progress.found_shards, time.monotonic() - start, progress.rows_per_second)


def _result_of(output: Table, manifest: Manifest, found_shards: int, seconds: float, rows_per_second: float) -> StageResult:
    return StageResult(
        table=output,
        fingerprint=manifest.fingerprint,
        inputs=manifest.inputs,
        num_shards=manifest.num_shards,
        found_shards=found_shards,
        num_rows=manifest.num_rows,
        num_rejects=manifest.num_rejects,
        rejects_by_reason=manifest.rejects_by_reason,
        figures=manifest.figures,
        seconds=seconds,
        rows_per_second=rows_per_second,
    )


def _count_found(output: Table, fingerprint: str, found: list[str], progress: Progress) -> None:
    """Count the existing shards, reading only the footers of their files.

    Raises DamagedShardError if a file is damaged or gone, or was made by another identity.
    """
    rejects = output.rejects()

    def read(table: Table, shard: str) -> ShardFacts:
        try:
            facts = table.read_facts(shard)
        except FileNotFoundError as error:
            raise DamagedShardError(f"{table.shard_uri(shard)} is gone, and its shard is there: {REMAKE}") from error
        if facts.fingerprint not in ("", fingerprint):
            raise DamagedShardError(f"{table.shard_uri(shard)} was made with other settings, models or inputs: {REMAKE}")
        return facts

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for kept, refused in zip(pool.map(partial(read, output), found), pool.map(partial(read, rejects), found), strict=True):
            progress.add_shard(kept.num_rows, refused.rejects_by_reason, kept.figures)


def _check_rejects(output: Table, progress: Progress, max_share: float, *, final: bool = False) -> None:
    seen = progress.num_rows + progress.num_rejects
    if progress.num_rejects <= max_share * seen or (seen < 1000 and not final):
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in progress.rejects_by_reason.most_common())
    raise TooManyRejectsError(
        f"{progress.num_rejects} of {seen} rows were refused ({reasons}), more than max_reject_share={max_share:g}; "
        f"each is in {output.rejects().uri}"
    )
