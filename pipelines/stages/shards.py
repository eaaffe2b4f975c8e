"""Shards through Ray Data: read (CPU tasks), worked on (an actor pool), written (CPU tasks), all three at the same time.

A row of the Ray dataset is a whole shard and a block holds one row: however blocks are batched, reordered and retried, a
shard stays together. An error of a shard is passed on in its row: it is reported by the shard's name and costs no other shard.

What is in memory is bounded: at most `READERS_PER_ACTOR` shards per actor are being read at once, two lie at each actor, and
Ray Data holds back readers while what they read fills its share of the object store. What Ray Data keeps of every block that it
has made, until its dataset ends, is bounded by `SHARDS_PER_ACTOR`.
"""

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.annotations import RayDeprecationWarning

from pipelines.stages.contract import Outcome, ReadShard, Resources, ShardOutput, ShardWorker
from pipelines.storage.errors import LeaseLostError, StorageError
from pipelines.storage.lease import Ticket
from pipelines.tables.errors import DamagedShardError, StageError, WrongInputError
from pipelines.tables.schema import Row
from pipelines.tables.table import Table, count_reasons

LIGHT = 0.25  # CPUs of a task that only reads or writes: it waits for the network most of the time
READERS_PER_ACTOR = 2
SHARDS_PER_ACTOR = 250
"""Shards per Ray dataset; for the next ones new actors start, with their models. Until it ends, a dataset keeps statistics of
each of its blocks (more blocks where shards are split into rows) and what was read ahead of the actors."""
MAX_FAILED_SHARDS = 5  # with more, what is wrong is not with the shards
RETRIES = 3  # of a shard whose process dies (out of memory, node lost) before it is left out
FIGURES = pa.map_(pa.string(), pa.float64())
COUNTS = pa.map_(pa.string(), pa.int64())
ERROR = pa.struct([("stops", pa.string()), ("message", pa.string())])


STOPS: dict[str, type[Exception]] = {
    "storage": StorageError,
    "stage": StageError,
    "lease": LeaseLostError,
    "input": WrongInputError,
}
"""Errors that end a stage at once, by their name in a shard's row."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """How the shards of a table are made. `fingerprint`: of the table's identity; `ticket`: of the lease to write it."""

    output: Table
    fingerprint: str
    ticket: Ticket
    read_shard: ReadShard
    make_worker: Callable[[], ShardWorker]
    resources: Resources


def stream_shards(job: ShardJob, shards: list[str], *, alone: bool) -> Iterator[Outcome]:
    """Yield the outcome of each shard when it is written. A shard whose process dies `RETRIES` + 1 times has none.

    Args:
        alone: no second shard waits at a busy actor, which would be blamed too if the actor dies.

    Raises:
        ray.exceptions.RayError: more than `MAX_FAILED_SHARDS` shards have none.
    """
    # Ray starts an actor that died again, and Ray Data keeps it in a cycle with the exception of its death. It would hold a GPU
    # until Python looks for cycles, which it may never do while the next actor waits for that GPU.
    gc.collect()
    parts = split_shards(shards, job.resources.num_actors)
    for row in chain.from_iterable(_plan(job, part, alone).iter_rows() for part in parts):
        yield to_outcome(row)


def stream_in_process(job: ShardJob, shards: list[str], *, alone: bool) -> Iterator[Outcome]:
    """The same in this process, one shard after another (`alone` or not), without actors: `job.resources` does not matter."""
    worker = _Worker(job.make_worker, job.output.schema)
    for shard in shards:
        batch = worker(_read(pa.table({"shard": [shard]}), job.read_shard))
        (row,) = _write(batch, job.output, job.fingerprint, job.ticket).to_pylist()
        yield to_outcome(row)


def to_outcome(row: Row) -> Outcome:
    """The outcome that a row of the Ray dataset's end tells."""
    error = row["error"] or {"stops": "", "message": None}
    return Outcome(
        shard=row["shard"],
        num_rows=row["num_rows"],
        rejects_by_reason=dict(row["rejects_by_reason"]),
        figures=dict(row["figures"]),
        error=error["message"],
        stops=error["stops"],
    )


def split_shards(shards: list[str], num_actors: int) -> list[list[str]]:
    """Split the shards into parts, each for one Ray dataset."""
    size = SHARDS_PER_ACTOR * num_actors
    return [shards[start : start + size] for start in range(0, len(shards), size)]


def _plan(job: ShardJob, shards: list[str], alone: bool) -> ray.data.Dataset:
    """The lazy Ray dataset that reads, works and writes."""
    context = ray.data.DataContext.get_current().copy()  # a copy: other datasets of this process must not lose blocks
    context.enable_progress_bars = False
    context.max_errored_blocks = MAX_FAILED_SHARDS  # blocks whose process died; exceptions are caught here and reported
    size = min(job.resources.num_actors, len(shards))
    light: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": LIGHT, "max_retries": RETRIES}
    light["compute"] = ray.data.TaskPoolStrategy(size=min(READERS_PER_ACTOR * size, len(shards)))
    with ray.data.DataContext.current(context), warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # Ray 2.60 has no other name for limits of retries
        names = [{"shard": shard} for shard in shards]
        dataset: ray.data.Dataset = ray.data.from_items(names, override_num_blocks=len(shards))
        dataset = dataset.map_batches(partial(_read, read_shard=job.read_shard), **light)
        dataset = dataset.map_batches(
            _Worker,
            fn_constructor_args=(job.make_worker, job.output.schema),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1 if alone else 2),
            num_cpus=job.resources.num_cpus,
            num_gpus=job.resources.num_gpus or None,
            resources=job.resources.custom or None,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        return dataset.map_batches(partial(_write, output=job.output, fingerprint=job.fingerprint, ticket=job.ticket), **light)


def _read(batch: pa.Table, read_shard: ReadShard) -> pa.Table:
    shard = batch["shard"][0].as_py()
    try:
        return _read_row(shard, _pack(read_shard(shard)), None)
    except Exception as error:
        return _read_row(shard, pa.nulls(1, pa.large_binary()), _describe(error))


def _read_row(shard: str, rows: pa.Array, error: Row | None) -> pa.Table:
    return pa.table({"shard": [shard], "rows": rows, "error": pa.array([error], ERROR)})


class _Worker:
    """The Ray Data actor around a stage's worker.

    The worker is made with the first shard: Ray would start an actor that dies in `__init__` (out of memory) again for ever.
    """

    def __init__(self, make_worker: Callable[[], ShardWorker], schema: pa.Schema):
        self.make_worker = make_worker
        self.worker: ShardWorker | None = None
        self.schema = schema

    def __call__(self, batch: pa.Table) -> pa.Table:
        shard, error = batch["shard"][0].as_py(), batch["error"][0].as_py()
        output = ShardOutput([], [])
        rows, refused = output.tables(self.schema)
        if error is None:
            try:
                self.worker = self.worker or self._make()
                output = self.worker.process(_unpack(batch["rows"]))
                rows, refused = output.tables(self.schema)
            except Exception as failure:
                if _has_lost_device(failure):
                    traceback.print_exc()
                    os._exit(1)  # Ray starts another process
                error = _describe(failure)
        figures = pa.array([list(output.figures.items())], FIGURES)
        return _read_row(shard, _pack(rows), error).append_column("rejects", _pack(refused)).append_column("figures", figures)

    def _make(self) -> ShardWorker:
        """Make the worker. Raises WrongInputError, which stops the stage, for what a user can mend."""
        try:
            return self.make_worker()
        except (FileNotFoundError, ValueError) as error:
            raise WrongInputError(str(error)) from error


def _has_lost_device(error: Exception) -> bool:
    """Whether this process has lost its GPU. Does not import torch: tasks that only read or write do without it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.AcceleratorError)


def _write(batch: pa.Table, output: Table, fingerprint: str, ticket: Ticket) -> pa.Table:
    shard, error, figures = (batch[name][0].as_py() for name in ("shard", "error", "figures"))
    rows, rejects = _unpack(batch["rows"]), _unpack(batch["rejects"])
    if error is None:
        try:
            write_output(output, shard, rows, rejects, dict(figures), fingerprint, ticket)
        except Exception as failure:
            error = _describe(failure)
    counts = pa.array([list(count_reasons(rejects).items())], COUNTS)
    return pa.table(
        {
            "shard": batch["shard"],
            "num_rows": [rows.num_rows],
            "rejects_by_reason": counts,
            "figures": batch["figures"],
            "error": pa.array([error], ERROR),
        }
    )


def write_output(
    output: Table,
    shard: str,
    rows: pa.Table,
    rejects: pa.Table,
    figures: Mapping[str, float],
    fingerprint: str,
    ticket: Ticket,
) -> None:
    """Write a shard, its rejects first: a shard that exists is done. Raises LeaseLostError, StorageError."""
    output.rejects().write_shard(shard, rejects, fingerprint=fingerprint, ticket=ticket)
    output.write_shard(shard, rows, fingerprint=fingerprint, figures=figures, ticket=ticket)


def _describe(error: Exception) -> Row:
    """An error as a row of ERROR. Storage that failed one shard after many tries would fail the others; a lost lease does."""
    known = isinstance(error, (DamagedShardError, *STOPS.values()))
    message = str(error) if known else "".join(traceback.format_exception(error)).strip()
    stops = next((name for name, kind in STOPS.items() if isinstance(error, kind)), "")
    return {"stops": stops, "message": message}


def _pack(table: pa.Table) -> pa.Array:
    """A table as one large_binary value, in Arrow's stream format; the stream is not copied."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    offsets = pa.py_buffer(np.array([0, content.size], np.int64))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])


def _unpack(column: pa.ChunkedArray) -> pa.Table:
    return pa.ipc.open_stream(column[0].as_buffer()).read_all()
