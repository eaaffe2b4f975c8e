"""How much memory the images of one shard may take while they are read, on their way and all together."""

import asyncio

from pipelines.tables.rejects import RowRefused

SHARD_FULL = "shard_full"
"""Reject reason of images that a shard had no room for. They can be tried again in new shards."""


class Memory:
    """Room for the images of one shard. Belongs to one event loop.

    Args:
        in_flight: bytes of contents that are not whole yet, all together.
        total: bytes of contents that are whole, all together.
    """

    def __init__(self, in_flight: int, total: int):
        self.in_flight, self.total = in_flight, total
        self.free, self.kept, self.is_full = in_flight, 0, False
        self.order = asyncio.Lock()  # who asks first is served first: a large content is not passed by small ones for ever
        self.changed = asyncio.Condition()

    async def take(self, count: int) -> int:
        """Wait until `count` more bytes may come; returns how many to give back. Who holds some must not take more, or all
        could wait for each other."""
        count = min(count, self.in_flight)
        async with self.order, self.changed:
            await self.changed.wait_for(lambda: self.free >= count)
            self.free -= count
        return count

    async def give_back(self, count: int) -> None:
        self.free += count
        async with self.changed:
            self.changed.notify_all()

    def keep(self, count: int) -> None:
        """Count a content that is whole. Raises RowRefused if there is no room for it."""
        if self.kept + count > self.total:
            self.is_full = True
        self.check()
        self.kept += count

    def check(self) -> None:
        """Raise RowRefused once something had no room, so that nothing more is fetched in vain."""
        if self.is_full:
            raise shard_full(self.total)


def shard_full(max_bytes: int) -> RowRefused:
    return RowRefused(
        SHARD_FULL,
        f"the images of its shard take more than max_shard_bytes={max_bytes}: --ingest.retry_rejects true gives those of a "
        "list shards of their own; rows_per_shard (and bytes_per_shard) of a new dataset should be smaller",
    )
