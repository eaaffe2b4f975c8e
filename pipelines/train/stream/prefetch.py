"""A training stream that is read ahead in a thread, so that the training seldom waits for samples."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

Batch = TypeVar("Batch")
Batches = TypeVar("Batches", covariant=True)


class SampleStream(Protocol[Batches]):
    """An endless stream of micro-batches that can continue where any number of ranks left off.

    prefetch: number of micro-batches to prepare ahead.
    """

    prefetch: int

    def __iter__(self) -> Iterator[Batches]: ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position, with its "epoch", as values for JSON."""

    def load_all_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue a training from the states of all its ranks, in their order; the number of ranks may differ."""


class PrefetchedStream(Generic[Batch]):
    """Micro-batches of `stream`, one for each `next`; up to `depth` of them are read ahead in a thread.

    `next` raises what the stream raises. `wait_seconds` is the total time that `next` has waited.
    """

    def __init__(self, stream: SampleStream[Batch], depth: int):
        self._stream = stream
        self._state = stream.state_dict()
        self._ready: queue.Queue[tuple[Batch, dict[str, Any]] | Exception] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="training-stream", daemon=True)
        self._thread.start()
        self.wait_seconds = 0.0

    def __next__(self) -> Batch:
        start = time.monotonic()
        ready = self._ready.get()
        self.wait_seconds += time.monotonic() - start
        if isinstance(ready, Exception):
            raise ready
        batch, self._state = ready
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's state after the last micro-batch that `next` returned; those read ahead do not count."""
        return self._state

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _read_ahead(self) -> None:
        try:
            for batch in self._stream:
                if not self._put((batch, self._stream.state_dict())):
                    return
        except Exception as error:  # `next` raises it again
            self._put(error)

    def _put(self, ready: tuple[Batch, dict[str, Any]] | Exception) -> bool:
        """Wait for room in the queue. Returns False if the stream was closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(ready, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
