"""Stages whose model takes single rows and may return them in any order, as `ray.data.llm` does.

A shard is split into rows, and is put together and written when the last of its rows has come back. Each row carries its shard
and its place. Images go from task to task through Ray's object store; the driver sees only the answers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.exceptions import RayError

from pipelines.stages.contract import Outcome, ReadShard, ShardOutput
from pipelines.stages.shards import LIGHT, STOPS, split_shards, write_output
from pipelines.storage.lease import Ticket
from pipelines.tables.errors import DamagedShardError
from pipelines.tables.schema import Row
from pipelines.tables.table import Table, count_reasons

ROWS_AT_A_TIME = 16
"""Rows turned into requests per block; bounds memory."""
MAX_WRITES = 8
"""Shards that are judged and written in parallel."""

MakeRow = Callable[[Row], Row]


class Finisher(Protocol):
    """Turns all of a shard's rows, in order and with the model's answers, into the shard's output."""

    def finish(self, rows: list[Row]) -> ShardOutput: ...


def stream_rows(
    output: Table,
    fingerprint: str,
    shards: list[str],
    ticket: Ticket,
    *,
    num_actors: int,
    read_shard: ReadShard,
    make_row: MakeRow,
    run_model: Callable[[ray.data.Dataset], ray.data.Dataset],
    make_finisher: Callable[[], Finisher],
) -> Iterator[Outcome]:
    """Yield the outcome of each shard when it is written.

    Args:
        ticket: checked before a shard is written.
        num_actors: actors of `run_model`, which is called for one part of the shards after another.
        make_row: turns a row of the input shard into a request; must not raise for a bad row, but note it in the request.
        run_model: must keep the columns "shard", "place" and "shard_rows" of every row, and lose no row.
        make_finisher: called once, in an actor.
    """
    ray.data.DataContext.get_current().enable_progress_bars = False
    take_apart = partial(_take_apart, read_shard=read_shard, make_row=make_row)

    def answer(part: list[str]) -> Iterator[tuple[str, list[Row]]]:
        dataset: ray.data.Dataset = ray.data.from_items([{"shard": shard} for shard in part], override_num_blocks=len(part))
        dataset = dataset.map_batches(take_apart, batch_size=1, batch_format="pyarrow", num_cpus=1)
        return _gather(run_model(dataset).iter_rows(), part, read_shard)

    actor: Any = ray.remote(_ShardWriter)
    lasting = actor.options(num_cpus=LIGHT, max_restarts=-1, max_task_retries=-1, max_concurrency=MAX_WRITES)
    writer = lasting.remote(output, fingerprint, ticket, make_finisher)
    writes: list[ray.ObjectRef] = []
    with _naming_the_cause():
        try:
            for shard, rows in chain.from_iterable(map(answer, split_shards(shards, num_actors))):
                writes.append(writer.write.remote(shard, rows))
                yield from _finished(writes, MAX_WRITES)
            yield from _finished(writes, 0)
        finally:  # whatever ends the stage, the rows that have come back are written
            if writes:
                ray.wait(writes, num_returns=len(writes))


def _finished(writes: list[ray.ObjectRef], limit: int) -> Iterator[Outcome]:
    """Yield the outcomes of finished writes; wait until at most `limit` writes are pending."""
    while writes:
        ready, rest = ray.wait(writes, num_returns=1, timeout=0 if len(writes) <= limit else None)
        if not ready:
            return
        writes[:] = rest
        yield ray.get(ready[0])


@contextmanager
def _naming_the_cause() -> Iterator[None]:
    """Raise the error of a task that is meant for people, without the layers that Ray puts around it."""
    try:
        yield
    except RayError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, (*STOPS.values(), DamagedShardError)) and not isinstance(cause, RayError):
                raise cause from None  # Ray's own is of both classes, and has all the layers in its message
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise


def _take_apart(batch: pa.Table, read_shard: ReadShard, make_row: MakeRow) -> Iterator[dict[str, list[Any]]]:
    shard = batch["shard"][0].as_py()
    table = read_shard(shard)
    for start in range(0, table.num_rows, ROWS_AT_A_TIME):
        rows = [
            {"shard": shard, "place": start + offset, "shard_rows": table.num_rows, **make_row(row)}
            for offset, row in enumerate(table.slice(start, ROWS_AT_A_TIME).to_pylist())
        ]
        yield {name: [row[name] for row in rows] for name in rows[0]}


def _gather(rows: Iterable[Row], shards: list[str], read_shard: ReadShard) -> Iterator[tuple[str, list[Row]]]:
    """Yield each shard with its rows in order as soon as all are there. A row that Ray made twice counts once."""
    waiting = set(shards)
    parts: dict[str, dict[int, Row]] = {}
    for row in rows:
        shard = row["shard"]
        if shard not in waiting:
            continue
        part = parts.setdefault(shard, {})
        part[row["place"]] = row
        if len(part) == row["shard_rows"]:
            waiting.remove(shard)
            del parts[shard]
            yield shard, [part[place] for place in sorted(part)]
    for shard in sorted(waiting):
        expected = read_shard(shard).num_rows
        if expected:
            raise RuntimeError(f"of shard {shard} only {len(parts.get(shard, {}))} of {expected} rows came back from the model")
        yield shard, []


class _ShardWriter:
    def __init__(self, output: Table, fingerprint: str, ticket: Ticket, make_finisher: Callable[[], Finisher]):
        self.output, self.fingerprint, self.ticket = output, fingerprint, ticket
        self.finisher = make_finisher()

    def write(self, shard: str, rows: list[Row]) -> Outcome:
        made = self.finisher.finish(rows)
        kept, refused = made.tables(self.output.schema)
        write_output(self.output, shard, kept, refused, made.figures, self.fingerprint, self.ticket)
        counts = {"num_rows": kept.num_rows, "rejects_by_reason": dict(count_reasons(refused)), "figures": dict(made.figures)}
        return Outcome(shard=shard, error=None, stops="", **counts)
