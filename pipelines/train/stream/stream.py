"""The training stream: latents, captions and scores -> micro-batches of one bucket, the same ones again after a resume.

Each rank reads its own endless stream, so no rank ever waits for another. In each epoch the shards are dealt out anew among
the ranks. A rank reads `shuffle_shards` of them at a time (a window), shuffles their rows, and puts each drawn sample into the
buffer of its bucket; a full buffer becomes a micro-batch. Samples in other buffers wait, if need be until the next epoch.

An epoch draws each sample as often as its table's weight says. A shard with weight 2.5 is read up to three times in an epoch;
each of these passes has its own place in the shuffled order, so that the draws of a sample are spread over the epoch.

A training can resume with another number of ranks. The states of all old ranks say which windows of the epochs that they had
begun were not drawn yet, and which samples waited in buffers. These are dealt out among the new ranks; whole epochs follow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from pipelines.train.stream.config import StreamConfig
from pipelines.train.stream.mixture import Source
from pipelines.train.stream.samples import Choice, MicroBatch, Sample, ShardRows, collate, is_held_out


@dataclass(frozen=True)
class Window:
    """Passes over shards that an epoch reads together and shuffles row by row.

    passes: their indices among all passes of an epoch. start: rows of the shuffled order that were drawn before.
    """

    epoch: int
    passes: tuple[int, ...]
    start: int = 0


class Place(NamedTuple):
    """A shard of the training: index of its source, and its name."""

    source: int
    shard: str


class Draw(NamedTuple):
    """One draw of a row: `epoch` is its number, see `Source.draws`; `choice` is its caption."""

    rows: ShardRows
    row: int
    epoch: int
    choice: Choice


def deal(num_passes: int, *, seed: int, epoch: int, rank: int, world_size: int) -> list[int]:
    """Return the indices of the passes that `rank` reads in `epoch`, in order. Each pass goes to exactly one rank.

    If the number of passes does not divide by `world_size`, some ranks read one more; which ones changes with the epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_passes)
    return order[(rank + epoch) % world_size :: world_size].tolist()


class TrainingStream:
    """Endless iterator over the micro-batches of one rank, which tables, config, seed, rank and world size fully determine.

    Args:
        sources: the tables to draw from.
        config: which samples and captions are drawn.
        micro_batch_size: samples of a micro-batch.
        seed: seed of the order of samples and of the choice of captions.
        rank: this rank, from 0.
        world_size: number of ranks.

    Raises:
        MissingTableError: a table does not exist.
        ValueError: a table is empty, or an epoch has fewer passes over shards than there are ranks. While iterating: no sample
            of any table can be drawn.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: StreamConfig,
        *,
        micro_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.sources = tuple(sources)
        self.config = config
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        dtypes = {source.manifest.config["dtype"] for source in self.sources}
        self._dtype = torch.float32 if len(dtypes) > 1 else None  # a micro-batch may mix tables, but not dtypes
        self._with_embeds = any(source.embeds is not None for source in self.sources)
        self._set_shards([source.table.list_shards() for source in self.sources])
        if len(self._passes) < world_size:
            names = ", ".join(source.table.uri for source in self.sources)
            raise ValueError(
                f"num_workers={world_size} need a shard each, and {names} has {len(self._passes)}: "
                "train with fewer workers, or ingest into smaller shards"
            )
        self.epoch = 0  # the current epoch; while `_leftover` is drawn, the last epoch that the old ranks had begun
        self._leftover: tuple[Window, ...] = ()  # windows that ranks of another world size left over; drawn first
        self._window = 0  # index of the current window
        self._row = 0  # rows of the current window that are done, in its shuffled order
        self._buffers: dict[str, list[Sample]] = {}
        self._samples = self._draw()

    def _set_shards(self, shards: Sequence[Sequence[str]]) -> None:
        """Draw from these shards of each source. Raises ValueError if a source has none."""
        for source, names in zip(self.sources, shards, strict=True):
            if not names:
                raise ValueError(f"{source.table.uri} is empty: there is nothing to train on")
        self._num_shards = [len(names) for names in shards]
        self.places = [Place(index, name) for index, names in enumerate(shards) for name in names]
        self._passes = [  # (index in `places`, number of the pass over that shard)
            (place, number)
            for index, source in enumerate(self.sources)
            for number in range(source.num_passes)
            for place in range(sum(self._num_shards[:index]), sum(self._num_shards[: index + 1]))
        ]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        while (bucket := self._full_bucket()) is None:
            sample = next(self._samples)
            self._buffers.setdefault(sample.bucket, []).append(sample)
        samples = self._buffers.pop(bucket)
        if rest := samples[self.micro_batch_size :]:
            self._buffers[bucket] = rest
        return collate(samples[: self.micro_batch_size], with_embeds=self._with_embeds)

    def _full_bucket(self) -> str | None:
        return next((bucket for bucket, samples in self._buffers.items() if len(samples) >= self.micro_batch_size), None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the samples that wait in buffers, as numbers, strings and containers for JSON."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "order": self._order(),
            "epoch": self.epoch,
            "leftover": [(window.epoch, window.passes, window.start) for window in self._leftover],
            "window": self._window,
            "row": self._row,
            "buffers": {
                bucket: [(sample.epoch, sample.place, sample.id) for sample in samples]
                for bucket, samples in self._buffers.items()
            },
        }

    def _order(self) -> dict[str, Any]:
        """Return all that determines the order of samples, as part of the state."""
        tables = zip(self.sources, self._num_shards, strict=True)
        return {
            "seed": self.seed,
            "shuffle_shards": self.config.shuffle_shards,
            "tables": [[source.manifest.fingerprint, source.weight, num_shards] for source, num_shards in tables],
        }

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
        self._buffers = self._restore_buffers(state["buffers"])
        self._samples = self._draw()

    def load_all_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue a training from the states of all its ranks, in their order; the world size may differ.

        If it differs, unfinished windows are given to the new ranks in turn, and so are the samples that waited in buffers:
        no sample of an epoch is lost or drawn twice. Raises like `load_state_dict`.
        """
        if len(states) == self.world_size:
            self.load_state_dict(states[self.rank])
            return
        self._take_order(states[0]["order"])
        last_epoch = max(state["epoch"] for state in states)
        windows = list(chain.from_iterable(self._unfinished(state, last_epoch) for state in states))
        waiting: dict[str, list[tuple[int, int, str]]] = {}
        for state in states:
            for bucket, entries in state["buffers"].items():
                waiting.setdefault(bucket, []).extend(entries)
        mine = {bucket: entries[self.rank :: self.world_size] for bucket, entries in waiting.items()}
        self.epoch, self._window, self._row = last_epoch, 0, 0
        self._leftover = tuple(windows[self.rank :: self.world_size])
        if not self._leftover:
            self.epoch += 1
        self._buffers = self._restore_buffers({bucket: entries for bucket, entries in mine.items() if entries})
        self._samples = self._draw()

    def _take_order(self, order: dict[str, Any]) -> None:
        """Draw from the shards that `order`, part of a state, was made from.

        Raises ValueError if another seed, other settings or other tables determine this stream's order, or shards are missing.
        """
        ours = self._order()
        without_counts = [{**one, "tables": [table[:2] for table in one["tables"]]} for one in (order, ours)]
        if without_counts[0] != without_counts[1]:
            before, now = without_counts
            told = "; ".join(f"{name}: {before[name]} -> {now[name]}" for name in now if before[name] != now[name])
            raise ValueError(f"the checkpoint's samples come in another order ({told}): put it back, or begin a new training")
        shards = []
        for source, (*_, num_shards) in zip(self.sources, order["tables"], strict=True):
            names = source.table.list_shards()
            if len(names) < num_shards:
                raise ValueError(
                    f"{source.table.uri} has {len(names)} shards, and had {num_shards} when the training began: put the "
                    "missing ones back, or begin a new training"
                )
            shards.append(names[:num_shards])
        self._set_shards(shards)

    def _unfinished(self, state: dict[str, Any], last_epoch: int) -> Iterator[Window]:
        """Yield the windows that the rank of `state` had not drawn to their end, up to and with `last_epoch`."""
        rank, world_size, row = state["rank"], state["world_size"], state["row"]
        leftover = [Window(epoch, tuple(passes), start) for epoch, passes, start in state["leftover"]]
        for window in (leftover or self._list_windows(state["epoch"], rank, world_size))[state["window"] :]:
            yield replace(window, start=max(window.start, row))
            row = 0
        for epoch in range(state["epoch"] + 1, last_epoch + 1):
            yield from self._list_windows(epoch, rank, world_size)

    def _draw(self) -> Iterator[Sample]:
        """Yield the samples of this rank, epoch after epoch, from the current position on."""
        found_any = False
        while True:
            windows = self._leftover or self._list_windows(self.epoch, self.rank, self.world_size)
            while self._window < len(windows):
                window = windows[self._window]
                draws = self._open(window)
                order = np.random.default_rng([self.seed, window.epoch, *window.passes]).permutation(len(draws))
                self._row = max(self._row, window.start)
                while self._row < len(order):
                    draw = draws[int(order[self._row])]
                    self._row += 1
                    if draw is not None:
                        found_any = True
                        yield draw.rows.sample(draw.row, draw.epoch, draw.choice)
                self._window, self._row = self._window + 1, 0
            if not found_any:
                self._check_that_any_passes()
                found_any = True
            self.epoch, self._window, self._leftover = self.epoch + 1, 0, ()

    def _list_windows(self, epoch: int, rank: int, world_size: int) -> tuple[Window, ...]:
        """Return the windows that a rank draws in an epoch, in order."""
        passes = deal(len(self._passes), seed=self.seed, epoch=epoch, rank=rank, world_size=world_size)
        size = self.config.shuffle_shards
        return tuple(Window(epoch, tuple(passes[start : start + size])) for start in range(0, len(passes), size))

    def _open(self, window: Window) -> list[Draw | None]:
        """Read the window's shards. Returns an entry for each row of each pass, in order: None if the row is not drawn."""
        passes = [self._passes[index] for index in window.passes]
        read = {place: self._read(place) for place in dict.fromkeys(place for place, _ in passes)}
        draws = [
            self._find_draw(read[place], row, window.epoch, number)
            for place, number in passes
            for row in range(len(read[place]))
        ]
        for rows in read.values():
            rows.load_embeds((draw.row, draw.choice) for draw in draws if draw is not None and draw.rows is rows)
        return draws

    def _read(self, place: int) -> ShardRows:
        source, shard = self.places[place]
        return ShardRows(self.sources[source], shard, place=place, dtype=self._dtype)

    def _find_draw(self, rows: ShardRows, row: int, epoch: int, number: int) -> Draw | None:
        """Return the draw of a row in pass `number` of its shard in an epoch.

        Returns None if the row is held out or not due in this pass, or the selection policy lets none of its captions pass.
        """
        sample_id = rows.ids[row]
        due = rows.source.draws(sample_id, epoch=epoch, seed=self.seed)[number : number + 1]
        if not due or is_held_out(sample_id, self.config.held_out_share):
            return None
        choice = rows.choose(row, due[0], self.config, seed=self.seed)
        return Draw(rows, row, due[0], choice) if choice is not None else None

    def _check_that_any_passes(self) -> None:
        """Raise ValueError if no sample of any table can ever be drawn."""
        for place in range(len(self.places)):
            rows = self._read(place)
            for row, sample_id in enumerate(rows.ids):
                held_out = is_held_out(sample_id, self.config.held_out_share)
                if not held_out and rows.choose(row, 0, self.config, seed=self.seed) is not None:
                    return
        names = ", ".join(source.table.uri for source in self.sources)
        captioners = ", ".join(dict.fromkeys(captioner for source in self.sources for captioner in source.captioners))
        raise ValueError(
            f"no sample of {names} can be drawn: it has no rows, or none has a caption of {captioners}, or "
            f"{self.config.selection} or image_filters={self.config.image_filters} let none pass, or all are held out "
            f"(held_out_share={self.config.held_out_share:g}); look at the tables, or loosen these settings"
        )

    def _restore_buffers(self, buffers: dict[str, list[tuple[int, int, str]]]) -> dict[str, list[Sample]]:
        """Read the samples that waited for their bucket to fill: bucket -> (epoch, place, id) of each, as in the state."""
        read = {place: self._read(place) for place in {place for entries in buffers.values() for _, place, _ in entries}}
        rows_of = {place: {sample_id: row for row, sample_id in enumerate(rows.ids)} for place, rows in read.items()}
        drawn: dict[str, list[Draw]] = {}
        for bucket, entries in buffers.items():
            for epoch, place, sample_id in entries:
                rows, row = read[place], rows_of[place][sample_id]
                if (choice := rows.choose(row, epoch, self.config, seed=self.seed)) is not None:
                    drawn.setdefault(bucket, []).append(Draw(rows, row, epoch, choice))
        for rows in read.values():
            rows.load_embeds((draw.row, draw.choice) for draws in drawn.values() for draw in draws if draw.rows is rows)
        return {
            bucket: [draw.rows.sample(draw.row, draw.epoch, draw.choice) for draw in draws] for bucket, draws in drawn.items()
        }
