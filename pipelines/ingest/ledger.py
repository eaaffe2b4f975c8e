"""Finds exact duplicates across a whole dataset, while every image is read once.

Of equal images, the one that comes first in the order of the plan stays. Shards are read in parallel. Before a shard is passed
on, its ids are claimed in the order of the plan, so every shard learns what all earlier shards hold, even after kills, and no
shard is read twice for it. The ids lie in one actor on the driver's node, 20 bytes for each image (three times that for a
moment while they are merged): 2 GB for 100 million. Claiming takes about 1 ms per thousand images.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from pipelines.stages.placement import on_this_node

STALL = 120.0  # seconds without a claim; then a waiting task reads the missing shard itself: it may hold that task's slot
UNSEEN = -1


def to_digests(ids: Sequence[str]) -> np.ndarray:
    """The first 128 bits of hex ids: (N, 2) uint64."""
    return np.frombuffer(b"".join(bytes.fromhex(image[:32]) for image in ids), ">u8").reshape(-1, 2).astype(np.uint64)


class DigestSet:
    """Digests, each with the first shard that holds it, in sorted runs; each run is more than twice as long as the next."""

    def __init__(self) -> None:
        self.runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # high, low, shard; sorted by high

    def find(self, digests: np.ndarray) -> np.ndarray:
        """Look digests up: (N, 2) uint64 -> their first shards (N,) int32, UNSEEN for unknown digests."""
        found = np.full(len(digests), UNSEEN, np.int32)
        for high, low, shards in self.runs:
            rows = np.arange(len(digests))
            places = np.searchsorted(high, digests[:, 0])
            while len(rows):  # twice only where two digests share their first 64 bits
                there = places < len(high)
                there[there] = high[places[there]] == digests[rows[there], 0]
                rows, places = rows[there], places[there]
                equal = low[places] == digests[rows, 1]
                found[rows[equal]] = shards[places[equal]]
                rows, places = rows[~equal], places[~equal] + 1
        return found

    def add(self, digests: np.ndarray, shards: np.ndarray) -> None:
        """Add digests. None of them may be known yet, or occur twice."""
        if len(digests):
            self._append(digests[:, 0], digests[:, 1], shards.astype(np.int32))
        while len(self.runs) > 1 and len(self.runs[-2][0]) <= 2 * len(self.runs[-1][0]):
            last, before = self.runs.pop(), self.runs.pop()
            self._append(*(np.concatenate(columns) for columns in zip(before, last, strict=True)))

    def remove(self, shard: int) -> None:
        """Remove the digests whose first shard is this one."""
        others = [shards != shard for _, _, shards in self.runs]
        self.runs = [(high[rows], low[rows], shards[rows]) for (high, low, shards), rows in zip(self.runs, others, strict=True)]

    def _append(self, high: np.ndarray, low: np.ndarray, shards: np.ndarray) -> None:
        order = np.argsort(high, kind="stable")
        self.runs.append((high[order], low[order], shards[order]))


class Ledger:
    """Ray actor: records which images each shard holds. Shards claim their images in the order of the plan.

    Args:
        missing: numbers of the shards that will be claimed, in order.
        stall: seconds without progress, after which a waiting task is told which shard it waits for.
    """

    def __init__(self, missing: list[int], stall: float = STALL):
        self.seen, self.missing, self.num_passed = DigestSet(), missing, 0
        self.stall = stall
        self.expected = set(missing)
        self.claimed: set[int] = set()
        self.passed: set[int] = set()  # claimed or skipped: nobody waits for them
        self.stalled: set[int] = set()
        self.changed = asyncio.Condition()

    async def add_done(self, shard: int, digests: np.ndarray) -> None:
        """Record the images of a finished shard."""
        self._add(shard, digests)
        self.claimed.add(shard)

    async def claim(self, shard: int, digests: np.ndarray) -> np.ndarray | int:
        """Claim a shard's digests. Return for each the earlier shard that holds it, or UNSEEN: (N,) int32.

        A shard that is read again is claimed again, and may hold other images then, as downloads fail or succeed. Its last
        claim counts, since that is what is written. (An image that only its first reading held stays refused in other shards;
        here it is among the failed downloads.)

        Waits until all earlier shards are claimed or skipped. After `stall` seconds without progress it returns the number of
        the shard that everybody waits for; if there is none the next time either, that shard is skipped.
        """
        async with self.changed:
            while self._must_wait(shard):
                blocking = self.missing[self.num_passed]
                try:
                    await asyncio.wait_for(self.changed.wait(), self.stall)
                except TimeoutError:
                    if blocking not in self.stalled:
                        self.stalled.add(blocking)
                        return blocking
                    self._pass(blocking)
            if shard in self.claimed:
                self.seen.remove(shard)
            self._add(shard, digests)
            self.claimed.add(shard)
            self._pass(shard)
        places = self.seen.find(digests)
        places[places == shard] = UNSEEN
        return places

    def _must_wait(self, shard: int) -> bool:
        """Whether an earlier shard is still expected. A shard that was finished at the start and is made again never waits."""
        return shard in self.expected and shard not in self.passed and self.missing[self.num_passed] != shard

    async def skip(self, shard: int) -> None:
        """Stop waiting for a shard that cannot be read now. If it is claimed later, it comes after the shards that went on."""
        async with self.changed:
            self._pass(shard)

    def _pass(self, shard: int) -> None:
        self.passed.add(shard)
        while self.num_passed < len(self.missing) and self.missing[self.num_passed] in self.passed:
            self.num_passed += 1
        self.changed.notify_all()

    def _add(self, shard: int, digests: np.ndarray) -> None:
        new = np.unique(digests[self.seen.find(digests) == UNSEEN], axis=0)
        self.seen.add(new, np.full(len(new), shard))


def start_ledger(missing: list[int]) -> Any:
    """Start the ledger as an actor on this node. If the driver's node is lost, so is the job; the next one begins with the
    finished shards."""
    return ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=on_this_node()).remote(missing)


def claim(ledger: Any, shard: int, digests: np.ndarray, read_digests: Callable[[int], np.ndarray] | None) -> np.ndarray:
    """Call `Ledger.claim` from a task. If a shard is missing for too long, the task reads it itself: no task waits for ever.

    Args:
        read_digests: reads the digests of another shard. None: reading it twice may give other images; it is skipped then.
    """
    while True:
        answer = ray.get(ledger.claim.remote(shard, digests))
        if not isinstance(answer, int):
            return answer
        try:
            action = ledger.claim.remote(answer, read_digests(answer)) if read_digests else ledger.skip.remote(answer)
            ray.get(action)
        except Exception:  # the shard's own task reports why it cannot be read
            ray.get(ledger.skip.remote(answer))


@contextmanager
def skipping(ledger: Any, shard: int) -> Iterator[None]:
    """If the body fails, skip the shard, so that no other shard waits for it."""
    try:
        yield
    except Exception:
        ray.get(ledger.skip.remote(shard))
        raise
