"""What the data stages share: shards go through Ray Data, rows that a stage refuses go to its rejects, and all is counted.

A row of the Ray dataset is a whole shard: however blocks are cut, batched and reordered, a shard stays together. Reading
(CPU), the stage's work (an actor pool) and writing overlap, and Ray Data holds back readers that run ahead of the workers.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
import ray

from pipelines.schema import REJECTS
from pipelines.tables import Identity, Table

Row = dict[str, Any]
LIGHT = 0.25  # CPUs of a task that only reads or writes: it waits for the network most of the time


class TooManyRejectsError(RuntimeError):
    """More rows were refused than the configuration lets pass."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What Ray reserves for a stage's actors.

    Args:
        num_actors: how many work side by side, each with a model of its own.
        num_cpus, num_gpus: of each; fractions share a device.
        custom: custom resources of each, such as {"L40S": 1}.
    """

    num_actors: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    custom: dict[str, float] = field(default_factory=dict)


class ShardWorker(Protocol):
    """A stage's actor: loads its model once, then turns the rows of one shard after another into output rows and rejects."""

    def process(self, table: pa.Table) -> tuple[list[Row], list[Row]]: ...


ReadShard = Callable[[str], pa.Table]
OnProgress = Callable[["Progress"], None]


@dataclass
class Progress:
    """How far a stage is. Rows are output rows; those of shards that were there before count as well."""

    num_shards: int
    done_shards: int
    found_shards: int
    num_rows: int = 0
    num_rejects: int = 0
    rejects_by_reason: Counter[str] = field(default_factory=Counter)
    new_rows: int = 0  # in and out of this run, rejects included
    seconds: float = 0.0

    @property
    def rows_per_second(self) -> float:
        return self.new_rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage did: `found_shards` of `num_shards` were there already. `inputs`: tables read, and fingerprints."""

    table: Table
    fingerprint: str
    inputs: dict[str, str]
    num_shards: int
    found_shards: int
    num_rows: int
    num_rejects: int
    rejects_by_reason: dict[str, int]
    seconds: float
    rows_per_second: float

    @property
    def was_done(self) -> bool:
        return self.found_shards == self.num_shards


def reject(row: Row, reason: str, detail: str) -> Row:
    """A row of the rejects table for a row that has (some of) id and source_uri."""
    return {"id": row.get("id"), "source_uri": row.get("source_uri"), "reject_reason": reason, "detail": detail}


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
) -> StageResult:
    """Make the shards of `output` that are absent.

    Raises:
        StaleTableError: `output` was made in another way.
        TooManyRejectsError: over `max_reject_share` of the rows were refused. The shards made until then stay.
    """
    start = time.monotonic()
    output.claim(identity)
    found = set(output.list_shards()) & set(shards)
    progress = Progress(len(shards), len(found), len(found))
    _count_found(output, sorted(found), progress)
    on_progress(progress)
    missing = [shard for shard in shards if shard not in found]
    for outcome in _stream(output, missing, read_shard, make_worker, resources):
        progress.done_shards += 1
        progress.num_rows += outcome["num_rows"]
        for reason, count in zip(outcome["reasons"], outcome["counts"], strict=True):
            progress.rejects_by_reason[reason] += int(count)
            progress.num_rejects += int(count)
        progress.new_rows += outcome["num_rows"] + sum(outcome["counts"])
        progress.seconds = time.monotonic() - start
        on_progress(progress)
        _check_rejects(output, progress, max_reject_share)
    _check_rejects(output, progress, max_reject_share, final=True)
    result = StageResult(
        table=output,
        fingerprint=identity.fingerprint,
        inputs=dict(identity.inputs),
        num_shards=progress.num_shards,
        found_shards=progress.found_shards,
        num_rows=progress.num_rows,
        num_rejects=progress.num_rejects,
        rejects_by_reason=dict(progress.rejects_by_reason),
        seconds=time.monotonic() - start,
        rows_per_second=progress.rows_per_second,
    )
    _complete(result)
    return result


def _complete(result: StageResult) -> None:
    manifest = result.table.require()
    counted = replace(
        manifest,
        complete=True,
        num_shards=result.num_shards,
        num_rows=result.num_rows,
        num_rejects=result.num_rejects,
        rejects_by_reason=result.rejects_by_reason,
    )
    if counted != manifest:
        result.table.write_manifest(counted)


def _count_found(output: Table, found: list[str], progress: Progress) -> None:
    rejects = output.rejects()
    for shard in found:
        progress.num_rows += output.read_shard(shard, ["id"]).num_rows
        reasons = Counter(rejects.read_shard(shard, ["reject_reason"])["reject_reason"].to_pylist())
        progress.rejects_by_reason += reasons
        progress.num_rejects += reasons.total()


def _check_rejects(output: Table, progress: Progress, max_share: float, *, final: bool = False) -> None:
    seen = progress.num_rows + progress.num_rejects
    if progress.num_rejects <= max_share * seen or (seen < 1000 and not final):
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in progress.rejects_by_reason.most_common())
    raise TooManyRejectsError(
        f"{progress.num_rejects} of {seen} rows were refused ({reasons}), more than max_reject_share={max_share:g}; "
        f"each is in {output.rejects().uri}"
    )


def _stream(
    output: Table, shards: list[str], read_shard: ReadShard, make_worker: Callable[[], ShardWorker], resources: Resources
) -> Iterator[Row]:
    """One row for each shard as it is written."""
    if not shards:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset: ray.data.Dataset = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    dataset = dataset.map_batches(partial(_read, read_shard=read_shard), batch_size=1, batch_format="pyarrow", num_cpus=LIGHT)
    dataset = dataset.map_batches(
        _Worker,
        fn_constructor_args=(make_worker, output.schema),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(resources.num_actors, len(shards))),
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus or None,
        resources=resources.custom or None,
    )
    dataset = dataset.map_batches(partial(_write, output=output), batch_size=1, batch_format="pyarrow", num_cpus=LIGHT)
    yield from dataset.iter_rows()


def _read(batch: pa.Table, read_shard: ReadShard) -> pa.Table:
    shard = batch["shard"][0].as_py()
    return pa.table({"shard": [shard], "rows": _pack(read_shard(shard))})


class _Worker:
    """The Ray Data actor around a stage's worker."""

    def __init__(self, make_worker: Callable[[], ShardWorker], schema: pa.Schema):
        self.worker = make_worker()
        self.schema = schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows, rejects = self.worker.process(_unpack(batch["rows"]))
        output, refused = pa.Table.from_pylist(rows, self.schema), pa.Table.from_pylist(rejects, REJECTS)
        return pa.table({"shard": batch["shard"], "rows": _pack(output), "rejects": _pack(refused)})


def _write(batch: pa.Table, output: Table) -> pa.Table:
    """Rejects first: a shard that exists is a shard that is done."""
    shard = batch["shard"][0].as_py()
    rows, rejects = _unpack(batch["rows"]), _unpack(batch["rejects"])
    output.rejects().write_shard(shard, rejects)
    output.write_shard(shard, rows)
    reasons = Counter(rejects["reject_reason"].to_pylist())
    return pa.table({"num_rows": [rows.num_rows], "reasons": [list(reasons)], "counts": [list(reasons.values())]})


def _pack(table: pa.Table) -> pa.Array:
    """A table as one large_binary value, in Arrow's stream format."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.array([sink.getvalue().to_pybytes()], pa.large_binary())


def _unpack(column: pa.ChunkedArray) -> pa.Table:
    return pa.ipc.open_stream(column[0].as_buffer()).read_all()
