"""A replica: orders wait here, and are drawn in batches of equal settings."""

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace

from pipelines.serve.batches import Ticket, Waiting
from pipelines.serve.config import ServeConfig
from pipelines.serve.metrics import PainterMetrics
from pipelines.serve.orders import Abandoned, Accepted, Event, Finished, ModelFacts, Order, Refused

LOG = logging.getLogger("ray.serve")
BROKEN = "CUDA error"
"""In the message of an error after which CUDA does nothing more in its process."""


class SanaPainter:
    """Holds the model, and draws. All calls come from one event loop; the model runs in a thread of its own.

    A picture is the one that `jobs.draw` draws with its seed and settings, but for rounding in batches of another size.

    Raises as `BatchDrawer`.
    """

    def __init__(self, config: ServeConfig):
        from pipelines.serve.drawing import BatchDrawer  # loads torch, which the front, that knows this class, does not need

        self._config = config
        self._metrics = PainterMetrics(config.served_name)
        self._drawer = BatchDrawer(config, self._metrics)
        self._waiting = Waiting()
        self._at_work: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draws")
        self._broken: str | None = None

    async def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises. Raises RuntimeError if its GPU can draw nothing more."""
        if self._broken is not None:
            raise RuntimeError(f"this replica can draw no more: {self._broken}")

    async def describe(self) -> ModelFacts:
        """What the model draws where an order does not say."""
        return self._drawer.describe()

    async def draw(self, order: Order) -> list[bytes] | Refused:
        """Draw an order; its pictures as PNGs in the order of its seeds. If the call is cancelled, it gives up its place."""
        try:
            order = await self._settle(order)
        except ValueError as error:
            return Refused(400, str(error))
        async with self._queued(self._make_tickets(order)) as tickets:
            drawn = await asyncio.gather(*(ticket.done for ticket in tickets))
        refused = [outcome for outcome in drawn if isinstance(outcome, Refused)]
        return refused[0] if refused else [outcome for outcome in drawn if isinstance(outcome, bytes)]

    async def stream(self, order: Order) -> AsyncIterator[Event]:
        """Draw an order: Accepted, then previews and pictures as they come, or Refused. Cancelled, it gives up its place."""
        try:
            order = await self._settle(order)
        except ValueError as error:
            yield Refused(400, str(error))
            return
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_event(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        async with self._queued(self._make_tickets(order)) as tickets:
            for ticket in tickets:
                ticket.on_event = on_event
                ticket.done.add_done_callback(lambda done, index=ticket.index: on_event(_ended(index, done)))  # type: ignore[misc]
            yield Accepted()
            left = len(tickets)
            while left:
                yield (event := await events.get())
                left = 0 if isinstance(event, Refused) else left - isinstance(event, Finished)

    async def _settle(self, order: Order) -> Order:
        """The order with settled settings; in a thread, because pictures are decoded for it."""
        return replace(order, settings=await asyncio.to_thread(self._drawer.settle, order))

    def _make_tickets(self, order: Order) -> list[Ticket]:
        loop = asyncio.get_running_loop()
        return [Ticket(order, index, loop.create_future()) for index in range(len(order.seeds))]

    @asynccontextmanager
    async def _queued(self, tickets: list[Ticket]) -> AsyncIterator[list[Ticket]]:
        """Within, these pictures wait or are drawn; those that are not drawn at the end are given up."""
        self._waiting.add(tickets)
        self._metrics.set_waiting(len(self._waiting.tickets))
        if self._at_work is None or self._at_work.done():
            self._at_work = asyncio.get_running_loop().create_task(self._draw_batches())
        try:
            yield tickets
        finally:
            given_up = [ticket for ticket in tickets if not ticket.done.done() or ticket.done.cancelled()]
            self._waiting.abandon(given_up)
            self._metrics.count_pictures("abandoned", len(given_up))

    async def _draw_batches(self) -> None:
        """Draw until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._waiting.tickets:
            if not self._waiting.is_full(self._config.batch_size):
                await asyncio.sleep(self._config.batch_wait)
            batch = self._waiting.take(self._config.batch_size)
            if not batch:  # all were given up
                continue
            self._metrics.set_waiting(len(self._waiting.tickets))
            outcomes: list[bytes | Refused]
            try:
                outcomes = await loop.run_in_executor(self._thread, self._drawer.draw, batch)
            except Abandoned:
                continue
            except Exception as error:  # whatever it was, those who wait must hear of it
                LOG.exception("drawing failed")
                if BROKEN in str(error):
                    self._broken = str(error).partition("\n")[0]
                outcomes = [Refused(500, "drawing failed; the server's log says why", "drawing_failed")] * len(batch)
            for ticket, outcome in zip(batch, outcomes, strict=True):
                if not ticket.done.done():  # cancelled meanwhile
                    ticket.done.set_result(outcome)
                    self._metrics.count_pictures("drawn" if isinstance(outcome, bytes) else outcome.code or "refused", 1)


def _ended(index: int, done: "asyncio.Future[bytes | Refused]") -> Event:
    if done.cancelled():
        return Refused(499, "given up")
    outcome = done.result()
    return outcome if isinstance(outcome, Refused) else Finished(index, outcome)
