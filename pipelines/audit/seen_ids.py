"""Finds ids that occur more than once in a table of any size, with temporary files on this machine's disk.

The first 8 bytes of each id and the number of its shard are written to one of 256 files, chosen by the first byte. The files
are sorted one after another. Disk: 12 bytes an id. Memory: the content of one file, and twice that to sort it. A billion ids
take 12 GB of disk and 150 MB of memory.
"""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO

import numpy as np

NUM_PARTS = 256


class SeenIds:
    """Collects a table's ids and finds repeated ones. A context manager; `add` may be called from several threads."""

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
        """Record the ids of a shard. Each must have 64 hex digits."""
        records = np.empty(len(ids), self.record)
        records["head"] = [int(row_id[:16], 16) for row_id in ids]
        records["shard"] = self.numbers[shard]
        firsts = (records["head"] >> np.uint64(56)).astype(np.uint8)
        with self.lock:
            for first in np.unique(firsts):
                self.parts[first].write(records[firsts == first].tobytes())

    def suspects(self) -> Iterator[tuple[str, list[str]]]:
        """The first 16 digits that two or more ids share, each with the shards of those ids.

        Different ids may share them by chance, so the caller compares the whole ids.
        """
        for part in self.parts:
            part.flush()
            part.seek(0)
            records = np.sort(np.frombuffer(part.read(), self.record), order=["head", "shard"])
            heads, starts, counts = np.unique(records["head"], return_index=True, return_counts=True)
            for head, start, count in zip(heads[counts > 1], starts[counts > 1], counts[counts > 1], strict=True):
                numbers = sorted(set(records["shard"][start : start + count].tolist()))
                yield f"{int(head):016x}", [self.shards[number] for number in numbers]
