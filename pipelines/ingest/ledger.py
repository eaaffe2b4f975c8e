"""Which images came before: exact duplicates across a whole dataset, while every image is read once.

Of equal images the one that comes first in the order of the plan stays. Shards are read side by side, and before a shard is
passed on, its ids are claimed, in the order of the plan: so every shard learns what all earlier ones hold, whatever is killed,
and nothing is read twice for it. The ids lie in one actor on the driver's node, 20 bytes for each image (three times that for
a moment while they are merged): 2 GB for 100 million. Claiming takes about 1 ms per thousand images.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from pipelines.stages.placement import on_this_node

STALL = 120.0  # seconds without a claim, after which who waits reads the shard that is missing: its task may wait for our slot
UNSEEN = -1


def to_digests(ids: Sequence[str]) -> np.ndarray:
    """The first 128 bits of hex ids: (N, 2) uint64."""
    return np.frombuffer(b"".join(bytes.fromhex(image[:32]) for image in ids), ">u8").reshape(-1, 2).astype(np.uint64)


class DigestSet:
    """Digests and the shard that each came first in, in sorted runs of which each is more than twice as long as the next."""

    def __init__(self) -> None:
        self.runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # high, low, shard; sorted by high

    def find(self, digests: np.ndarray) -> np.ndarray:
        """(N, 2) uint64 -> shards (N,) int32, UNSEEN where there is none."""
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
        """Digests that are not there yet, each once."""
        if len(digests):
            self._append(digests[:, 0], digests[:, 1], shards.astype(np.int32))
        while len(self.runs) > 1 and len(self.runs[-2][0]) <= 2 * len(self.runs[-1][0]):
            last, before = self.runs.pop(), self.runs.pop()
            self._append(*(np.concatenate(columns) for columns in zip(before, last, strict=True)))

    def remove(self, shard: int) -> None:
        """What came first in this shard."""
        others = [shards != shard for _, _, shards in self.runs]
        self.runs = [(high[rows], low[rows], shards[rows]) for (high, low, shards), rows in zip(self.runs, others, strict=True)]

    def _append(self, high: np.ndarray, low: np.ndarray, shards: np.ndarray) -> None:
        order = np.argsort(high, kind="stable")
        self.runs.append((high[order], low[order], shards[order]))


class Ledger:
    """Ray actor: what each shard holds, claimed in the order of the plan.

    Args:
        missing: numbers of the shards that will be claimed, in order.
        stall: seconds without progress, after which who waits is told for whom.
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
        """What a finished shard holds."""
        self._add(shard, digests)
        self.claimed.add(shard)

    async def claim(self, shard: int, digests: np.ndarray) -> np.ndarray | int:
        """For each digest the other shard that it came from before, or UNSEEN: (N,) int32.

        A shard that is claimed again was read again, and as downloads fail or succeed it may hold other images now: its last
        claim counts, for that is what is written. (What it held before and others were refused for stays away with them; it is
        among this shard's failed downloads.)

        Waits until all earlier shards are claimed or skipped; if that makes no progress for so long, returns the number
        of the shard that everybody waits for, once, and skips it the next time.
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
        """A shard that was there when the ledger was opened, and is made anew all the same, waits for nobody."""
        return shard in self.expected and shard not in self.passed and self.missing[self.num_passed] != shard

    async def skip(self, shard: int) -> None:
        """It cannot be read now: the others go on. When it is claimed after all, it comes after those that were not held up."""
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
    """The handle of an actor on this node: if the driver's node is lost, so is the job, and the next one begins with what is
    finished."""
    return ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=on_this_node()).remote(missing)


def claim(ledger: Any, shard: int, digests: np.ndarray, read_digests: Callable[[int], np.ndarray] | None) -> np.ndarray:
    """`Ledger.claim`, from a task that can read the digests of other shards: so none waits for ever.

    Args:
        read_digests: None: another reading may give other images; the shard that all wait for comes after them then.
    """
    while True:
        answer = ray.get(ledger.claim.remote(shard, digests))
        if not isinstance(answer, int):
            return answer
        try:
            action = ledger.claim.remote(answer, read_digests(answer)) if read_digests else ledger.skip.remote(answer)
            ray.get(action)
        except Exception:  # why it cannot be read is for its own task to say
            ray.get(ledger.skip.remote(answer))


@contextmanager
def skipping(ledger: Any, shard: int) -> Iterator[None]:
    """What fails within keeps no other shard waiting."""
    try:
        yield
    except Exception:
        ray.get(ledger.skip.remote(shard))
        raise
