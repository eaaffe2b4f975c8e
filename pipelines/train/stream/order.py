"""The order in which a rank reads shards and their rows, epoch after epoch, and how it continues where any number left off.

In each epoch the passes over shards are dealt out anew among the ranks. A rank reads `shuffle_shards` of them at a time (a
window) and shuffles their rows. A training can resume with another number of ranks. The states of all old ranks say which
windows of the epochs that they had begun were not drawn yet. These are dealt out among the new ranks; whole epochs follow.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pipelines.tables.table import Table

Row = TypeVar("Row")


class OrderedTable(NamedTuple):
    """A table whose rows are drawn.

    fingerprint: its manifest's. weight: how often a row is drawn in an epoch. num_passes: how often an epoch reads each shard.
    """

    table: Table
    fingerprint: str
    weight: float
    num_passes: int


class Place(NamedTuple):
    """A shard of the training: index of its table, and its name."""

    table: int
    shard: str


@dataclass(frozen=True)
class Window:
    """Passes over shards that an epoch reads together and shuffles row by row.

    passes: their indices among all passes of an epoch. start: rows of the shuffled order that were drawn before.
    """

    epoch: int
    passes: tuple[int, ...]
    start: int = 0


def deal(num_passes: int, *, seed: int, epoch: int, rank: int, world_size: int) -> list[int]:
    """Return the indices of the passes that `rank` reads in `epoch`, in order. Each pass goes to exactly one rank.

    If the number of passes does not divide by `world_size`, some ranks read one more; which ones changes with the epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_passes)
    return order[(rank + epoch) % world_size :: world_size].tolist()


class RowOrder:
    """The rows of one rank in order, which tables, seed, rank and world size fully determine.

    Args:
        tables: the tables.
        shuffle_shards: passes of a window.
        seed: seed of the order.
        rank: this rank, from 0.
        world_size: number of ranks.

    epoch: the current epoch; while windows that others left over are drawn, the last epoch that the old ranks had begun.
    places: all shards. passes: (index in `places`, number of the pass over that shard) of each pass of an epoch.

    Raises ValueError if a table is empty, or an epoch has fewer passes over shards than there are ranks.
    """

    def __init__(self, tables: Sequence[OrderedTable], *, shuffle_shards: int, seed: int, rank: int, world_size: int):
        self.tables = tuple(tables)
        self.shuffle_shards = shuffle_shards
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._set_shards([entry.table.list_shards() for entry in self.tables])
        if len(self.passes) < world_size:
            names = ", ".join(entry.table.uri for entry in self.tables)
            raise ValueError(
                f"num_workers={world_size} need a shard each, and {names} has {len(self.passes)}: "
                "train with fewer workers, or ingest into smaller shards"
            )
        self.epoch = 0
        self._leftover: tuple[Window, ...] = ()  # windows that ranks of another world size left over; drawn first
        self._window = 0  # index of the current window
        self._row = 0  # rows of the current window that are done, in its shuffled order

    def _set_shards(self, shards: Sequence[Sequence[str]]) -> None:
        """Draw from these shards of each table. Raises ValueError if a table has none."""
        for entry, names in zip(self.tables, shards, strict=True):
            if not names:
                raise ValueError(f"{entry.table.uri} is empty: there is nothing to train on")
        self._num_shards = [len(names) for names in shards]
        self.places = [Place(index, name) for index, names in enumerate(shards) for name in names]
        self.passes = [
            (place, number)
            for index, entry in enumerate(self.tables)
            for number in range(entry.num_passes)
            for place in range(sum(self._num_shards[:index]), sum(self._num_shards[: index + 1]))
        ]

    def _order(self) -> dict[str, Any]:
        """Return all that determines the order of rows, as part of the state."""
        tables = zip(self.tables, self._num_shards, strict=True)
        return {
            "seed": self.seed,
            "shuffle_shards": self.shuffle_shards,
            "tables": [[entry.fingerprint, entry.weight, num_shards] for entry, num_shards in tables],
        }

    def _take_order(self, order: dict[str, Any]) -> None:
        """Draw from the shards that `order`, part of a state, was made from.

        Raises ValueError if another seed, other settings or other tables determine this order, or shards are missing.
        """
        ours = self._order()
        without_counts = [{**one, "tables": [table[:2] for table in one["tables"]]} for one in (order, ours)]
        if without_counts[0] != without_counts[1]:
            before, now = without_counts
            told = "; ".join(f"{name}: {before[name]} -> {now[name]}" for name in now if before[name] != now[name])
            raise ValueError(f"the checkpoint's samples come in another order ({told}): put it back, or begin a new training")
        shards = []
        for entry, (*_, num_shards) in zip(self.tables, order["tables"], strict=True):
            names = entry.table.list_shards()
            if len(names) < num_shards:
                raise ValueError(
                    f"{entry.table.uri} has {len(names)} shards, and had {num_shards} when the training began: put the "
                    "missing ones back, or begin a new training"
                )
            shards.append(names[:num_shards])
        self._set_shards(shards)

    def state_dict(self) -> dict[str, Any]:
        """Return the position as numbers and containers for JSON."""
        return {
            "order": self._order(),
            "rank": self.rank,
            "world_size": self.world_size,
            "epoch": self.epoch,
            "leftover": [(window.epoch, window.passes, window.start) for window in self._leftover],
            "window": self._window,
            "row": self._row,
        }

    def load_all_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the states of all ranks, in their order; the world size may differ: no row is lost or comes twice.

        Raises like `load_state_dict`.
        """
        if len(states) == self.world_size:
            self.load_state_dict(states[self.rank])
            return
        self._take_order(states[0]["order"])
        last_epoch = max(state["epoch"] for state in states)
        windows = list(chain.from_iterable(self._unfinished(state, last_epoch) for state in states))
        self.epoch, self._window, self._row = last_epoch, 0, 0
        self._leftover = tuple(windows[self.rank :: self.world_size])
        if not self._leftover:
            self.epoch += 1

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Shards that a table has gained since then are not drawn.

        Raises ValueError if the state is that of another rank or world size, or of other tables, weights or settings.
        """
        for name in ("rank", "world_size"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the stream's state is of {name}={state[name]}, this is {name}={getattr(self, name)}")
        self._take_order(state["order"])
        self.epoch, self._window, self._row = state["epoch"], state["window"], state["row"]
        self._leftover = tuple(Window(epoch, tuple(passes), start) for epoch, passes, start in state["leftover"])

    def _unfinished(self, state: dict[str, Any], last_epoch: int) -> Iterator[Window]:
        """Yield the windows that the rank of `state` had not drawn to their end, up to and with `last_epoch`."""
        rank, world_size, row = state["rank"], state["world_size"], state["row"]
        leftover = [Window(epoch, tuple(passes), start) for epoch, passes, start in state["leftover"]]
        for window in (leftover or self._list_windows(state["epoch"], rank, world_size))[state["window"] :]:
            yield replace(window, start=max(window.start, row))
            row = 0
        for epoch in range(state["epoch"] + 1, last_epoch + 1):
            yield from self._list_windows(epoch, rank, world_size)

    def draw(self, open_window: Callable[[Window], Sequence[Row | None]], if_none: Callable[[], None]) -> Iterator[Row]:
        """Yield rows, epoch after epoch, from the current position on, which is after the row when it is yielded.

        Args:
            open_window: returns an entry for each row of each pass of a window, in order: None if the row is not drawn.
            if_none: called once if a whole epoch, or what was left of it, had no row to draw.
        """
        found_any = False
        while True:
            windows = self._leftover or self._list_windows(self.epoch, self.rank, self.world_size)
            while self._window < len(windows):
                window = windows[self._window]
                rows = open_window(window)
                order = np.random.default_rng([self.seed, window.epoch, *window.passes]).permutation(len(rows))
                self._row = max(self._row, window.start)
                while self._row < len(order):
                    row = rows[int(order[self._row])]
                    self._row += 1
                    if row is not None:
                        found_any = True
                        yield row
                self._window, self._row = self._window + 1, 0
            if not found_any:
                if_none()
                found_any = True
            self.epoch, self._window, self._leftover = self.epoch + 1, 0, ()

    def _list_windows(self, epoch: int, rank: int, world_size: int) -> tuple[Window, ...]:
        """Return the windows that a rank draws in an epoch, in order."""
        passes = deal(len(self.passes), seed=self.seed, epoch=epoch, rank=rank, world_size=world_size)
        size = self.shuffle_shards
        return tuple(Window(epoch, tuple(passes[start : start + size])) for start in range(0, len(passes), size))
