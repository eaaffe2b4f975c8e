"""The queue of a replica: pictures that wait, taken out in batches of equal settings."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pipelines.serve.orders import Event, Order, Refused


@dataclass(eq=False)
class Ticket:
    """One picture of an order. done: its PNG, or why there is none. on_event: told of previews, from any thread."""

    order: Order
    index: int
    done: "asyncio.Future[bytes | Refused]"
    on_event: Callable[[Event], None] | None = None
    abandoned: bool = field(default=False)

    @property
    def seed(self) -> int:
        return self.order.seeds[self.index]


class Waiting:
    """Pictures in the order in which they came."""

    def __init__(self) -> None:
        self.tickets: list[Ticket] = []

    def add(self, tickets: list[Ticket]) -> None:
        self.tickets += tickets

    def abandon(self, tickets: list[Ticket]) -> None:
        """Nobody wants these any more: those that wait give up their place, those being drawn are marked."""
        for ticket in tickets:
            ticket.abandoned = True
        self.tickets = [ticket for ticket in self.tickets if not ticket.abandoned]

    def is_full(self, size: int) -> bool:
        """Whether the next batch would have `size` pictures."""
        return len(self._next(size)) == size

    def take(self, size: int) -> list[Ticket]:
        """The picture that has waited longest, and others of its settings, at most `size` in all; they wait no longer."""
        batch = self._next(size)
        taken = set(map(id, batch))
        self.tickets = [ticket for ticket in self.tickets if id(ticket) not in taken]
        return batch

    def _next(self, size: int) -> list[Ticket]:
        if not self.tickets:
            return []
        settings = self.tickets[0].order.settings
        return [ticket for ticket in self.tickets if ticket.order.settings == settings][:size]
