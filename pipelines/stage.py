"""What the data stages share: shards go through Ray Data, rows that a stage refuses go to its rejects, and all is counted.

A row of the Ray dataset is a whole shard: however blocks are cut, batched and reordered, a shard stays together. Reading
(CPU), the stage's work (an actor pool) and writing overlap, and Ray Data holds back readers that run ahead of the workers.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import ray

from pipelines.schema import REJECTS
from pipelines.storage import remove_leftovers
from pipelines.tables import Identity, Manifest, ShardFacts, Table

Row = dict[str, Any]
LIGHT = 0.25  # CPUs of a task that only reads or writes: it waits for the network most of the time
NUM_THREADS = 32  # that wait for the storage
FIGURES = pa.map_(pa.string(), pa.float64())
COUNTS = pa.map_(pa.string(), pa.int64())


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


class ShardOutput(NamedTuple):
    """What a worker makes of a shard.

    `rows` are of the output table's schema, `rejects` as `reject` makes them. `figures` are facts about the shard, such as a
    PSNR: they stay in its file's footer, their mean and minimum over all shards in the manifest.
    """

    rows: list[Row] | pa.Table
    rejects: list[Row]
    figures: Mapping[str, float] = MappingProxyType({})


class ShardWorker(Protocol):
    """A stage's actor: loads its model once, then turns the rows of one shard after another into output rows and rejects."""

    def process(self, table: pa.Table) -> ShardOutput: ...


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
    figures: dict[str, list[float]] = field(default_factory=dict)  # by name, a value for each shard that has it
    new_rows: int = 0  # in and out of this run, rejects included
    seconds: float = 0.0

    def add_shard(self, num_rows: int, rejects_by_reason: Mapping[str, int], figures: Mapping[str, float]) -> None:
        self.num_rows += num_rows
        self.rejects_by_reason.update(rejects_by_reason)
        self.num_rejects += sum(rejects_by_reason.values())
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

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
    figures: dict[str, float]
    """"<figure>.mean" and "<figure>.min" over the shards."""
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
    manifest = output.claim(identity)
    remove_leftovers(output.uri)
    found = set(output.list_shards()) & set(shards)
    progress = Progress(len(shards), len(found), len(found))
    was_done = manifest.complete and manifest.num_shards == len(found) == len(shards)
    if was_done:
        progress.add_shard(manifest.num_rows, manifest.rejects_by_reason, {})
    else:
        _count_found(output, sorted(found), progress)
    on_progress(progress)
    if was_done:
        _check_rejects(output, progress, max_reject_share, final=True)
        return _result_of(output, manifest, len(found), time.monotonic() - start, 0.0)
    missing = [shard for shard in shards if shard not in found]
    for outcome in _stream(output, identity, missing, read_shard, make_worker, resources):
        rejects_by_reason = dict(outcome["rejects_by_reason"])
        progress.done_shards += 1
        progress.add_shard(outcome["num_rows"], rejects_by_reason, dict(outcome["figures"]))
        progress.new_rows += outcome["num_rows"] + sum(rejects_by_reason.values())
        progress.seconds = time.monotonic() - start
        on_progress(progress)
        _check_rejects(output, progress, max_reject_share)
    _check_rejects(output, progress, max_reject_share, final=True)
    return _complete(output, progress, start)


def _complete(output: Table, progress: Progress, start: float) -> StageResult:
    """Write what was counted into the manifest."""
    manifest = output.require()
    figures = {f"{name}.mean": sum(values) / len(values) for name, values in progress.figures.items()}
    figures |= {f"{name}.min": min(values) for name, values in progress.figures.items()}
    counted = replace(
        manifest,
        complete=True,
        num_shards=progress.num_shards,
        num_rows=progress.num_rows,
        num_rejects=progress.num_rejects,
        rejects_by_reason=dict(progress.rejects_by_reason),
        figures=figures,
    )
    if counted != manifest:
        output.write_manifest(counted)
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


def _count_found(output: Table, found: list[str], progress: Progress) -> None:
    """Count the shards that are there, by the footers of their files alone."""
    rejects = output.rejects()

    def read(shard: str) -> tuple[ShardFacts, ShardFacts]:
        return output.read_facts(shard), rejects.read_facts(shard)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for kept, refused in pool.map(read, found):
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


def _stream(
    output: Table,
    identity: Identity,
    shards: list[str],
    read_shard: ReadShard,
    make_worker: Callable[[], ShardWorker],
    resources: Resources,
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
    write = partial(_write, output=output, fingerprint=identity.fingerprint)
    dataset = dataset.map_batches(write, batch_size=1, batch_format="pyarrow", num_cpus=LIGHT)
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
        rows, rejects, figures = self.worker.process(_unpack(batch["rows"]))
        output = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, self.schema)
        refused = pa.Table.from_pylist(rejects, REJECTS)
        columns = {"rows": _pack(output), "rejects": _pack(refused), "figures": pa.array([list(figures.items())], FIGURES)}
        return pa.table({"shard": batch["shard"]} | columns)


def _write(batch: pa.Table, output: Table, fingerprint: str) -> pa.Table:
    """Rejects first: a shard that exists is a shard that is done."""
    shard = batch["shard"][0].as_py()
    rows, rejects, figures = _unpack(batch["rows"]), _unpack(batch["rejects"]), batch["figures"][0].as_py()
    output.rejects().write_shard(shard, rejects, fingerprint=fingerprint)
    output.write_shard(shard, rows, fingerprint=fingerprint, figures=dict(figures))
    reasons = Counter(rejects["reject_reason"].to_pylist())
    counts = {"num_rows": [rows.num_rows], "rejects_by_reason": pa.array([list(reasons.items())], COUNTS)}
    return pa.table(counts | {"figures": batch["figures"]})


def _pack(table: pa.Table) -> pa.Array:
    """A table as one large_binary value, in Arrow's stream format."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.array([sink.getvalue().to_pybytes()], pa.large_binary())


def _unpack(column: pa.ChunkedArray) -> pa.Table:
    return pa.ipc.open_stream(column[0].as_buffer()).read_all()
