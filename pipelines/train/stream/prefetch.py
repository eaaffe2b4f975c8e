"""Reading a training stream ahead, in a thread."""

import queue
import threading
import time
from typing import Any, Self

from pipelines.train.stream.samples import MicroBatch
from pipelines.train.stream.stream import TrainingStream


class PrefetchedStream:
    """A `TrainingStream` that reads ahead in a thread. Its state is that of the micro-batches handed out, not of those read.

    `wait_seconds` sums up how long the caller was kept waiting. Raises what the stream raises. `close()` ends the thread.
    """

    def __init__(self, stream: TrainingStream, depth: int):
        self._stream = stream
        self._state = stream.state_dict()
        self._ready: queue.Queue[tuple[MicroBatch, dict[str, Any]] | Exception] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="training-stream", daemon=True)
        self._thread.start()
        self.wait_seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        start = time.monotonic()
        ready = self._ready.get()
        self.wait_seconds += time.monotonic() - start
        if isinstance(ready, Exception):
            raise ready
        batch, self._state = ready
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _read_ahead(self) -> None:
        try:
            for batch in self._stream:
                if not self._put((batch, self._stream.state_dict())):
                    return
        except Exception as error:  # raised again where the batch is asked for
            self._put(error)

    def _put(self, ready: tuple[MicroBatch, dict[str, Any]] | Exception) -> bool:
        """False if the stream was closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(ready, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
