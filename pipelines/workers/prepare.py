"""Prepare rows (decode, resize) in threads ahead of the model, so that the model does not wait."""

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
    """Yield a table's rows as dicts, converting a few at a time: rows with images are large."""
    for batch in table.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def prepare_ahead(
    rows: Iterable[Row], prepare: Callable[[Row], Prepared], *, num_ahead: int, num_threads: int
) -> Iterator[tuple[Row, Prepared | RowRefused]]:
    """Yield each row with what `prepare` returns for it, or with the RowRefused that it raises, in order.

    Pillow and torch release Python's lock, so the threads run while the caller's model runs.

    Args:
        num_ahead: rows that are being prepared or are ready for the caller; bounds memory. To overlap with a model, give at
            least its batch size.

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
            refill()  # before the caller runs its model
            try:
                ready: Prepared | RowRefused = future.result()
            except RowRefused as error:
                ready = error.bare()
            yield row, ready
    finally:
        pool.shutdown(cancel_futures=True)
