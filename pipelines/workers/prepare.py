"""Rows made ready (decoded, resized) in threads, ahead of the model that takes them, so that it waits for none of it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

import pyarrow as pa

from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row

Prepared = TypeVar("Prepared")


def iter_rows(table: pa.Table) -> Iterator[Row]:
    """A table's rows as dicts, a few at a time: those that hold images are large."""
    for batch in table.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def prepare_ahead(
    rows: Iterable[Row], prepare: Callable[[Row], Prepared], *, num_ahead: int, num_threads: int
) -> Iterator[tuple[Row, Prepared | RowRefused]]:
    """Each row with what `prepare` makes of it, in order; with the RowRefused where it raises one.

    Pillow and torch release Python's lock, so the threads work while the caller's model does.

    Args:
        num_ahead: rows that are in work or wait, ready, for the caller; memory is bounded by them. To overlap with a model,
            at least one batch of it.

    Raises:
        ValueError: num_ahead or num_threads is below 1. Any other error of `prepare`, when its row's turn comes.
    """
    if num_ahead < 1 or num_threads < 1:
        raise ValueError(f"num_ahead={num_ahead} and num_threads={num_threads} must be at least 1")
    source = iter(rows)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="prepare")
    waiting: deque[tuple[Row, Future[Prepared]]] = deque()

    def refill() -> None:
        waiting.extend((row, pool.submit(prepare, row)) for row in islice(source, num_ahead - len(waiting)))

    try:
        refill()
        while waiting:
            row, future = waiting.popleft()
            wait([future])
            refill()  # before the caller's model takes its time
            try:
                ready: Prepared | RowRefused = future.result()
            except RowRefused as error:
                ready = error.bare()
            yield row, ready
    finally:
        pool.shutdown(cancel_futures=True)
