"""Finds ids that come twice in a table of any size, on this machine's disk.

Of each id its first 8 bytes and its shard's number go to one of 256 temporary files, by the first byte; these are sorted one
after another. Disk: 12 bytes for each id. Memory: what one file holds, and twice that to sort it. A billion ids: 12 GB of disk
and 150 MB of memory.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO

import numpy as np

NUM_PARTS = 256


class SeenIds:
    """Which ids come more than once in a table? Used as a context manager; `add` may be called from several threads."""

    def __init__(self, shards: list[str]):
        self.shards = shards
        self.numbers = {shard: number for number, shard in enumerate(shards)}
        self.record = np.dtype([("head", ">u8"), ("shard", "<u4")])
        self.lock = threading.Lock()
        self.stack = ExitStack()
        self.parts: list[IO[bytes]] = []

    def __enter__(self) -> "SeenIds":
        self.parts = [self.stack.enter_context(tempfile.TemporaryFile()) for _ in range(NUM_PARTS)]  # noqa: SIM115
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def add(self, shard: str, ids: list[str]) -> None:
        """`ids`: of 64 hex digits."""
        records = np.empty(len(ids), self.record)
        records["head"] = [int(row_id[:16], 16) for row_id in ids]
        records["shard"] = self.numbers[shard]
        firsts = (records["head"] >> np.uint64(56)).astype(np.uint8)
        with self.lock:
            for first in np.unique(firsts):
                self.parts[first].write(records[firsts == first].tobytes())

    def suspects(self) -> Iterator[tuple[str, list[str]]]:
        """The first 16 digits of ids that come more than once, and in which shards. Two ids may agree in them by chance."""
        for part in self.parts:
            part.flush()
            part.seek(0)
            records = np.sort(np.frombuffer(part.read(), self.record), order=["head", "shard"])
            heads, starts, counts = np.unique(records["head"], return_index=True, return_counts=True)
            for head, start, count in zip(heads[counts > 1], starts[counts > 1], counts[counts > 1], strict=True):
                numbers = sorted(set(records["shard"][start : start + count].tolist()))
                yield f"{int(head):016x}", [self.shards[number] for number in numbers]
