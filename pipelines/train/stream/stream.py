"""The training stream: latents, captions and scores -> micro-batches of one bucket, the same ones again after a resume.

Each rank reads its own endless stream, so no rank ever waits for another. `RowOrder` says in which order it comes to the rows;
each drawn sample is put into the buffer of its bucket, and a full buffer becomes a micro-batch. Samples in other buffers wait,
if need be until the next epoch. After a resume with another number of ranks they are dealt out among the new ones.

An epoch draws each sample as often as its table's weight says. A shard with weight 2.5 is read up to three times in an epoch;
each of these passes has its own place in the shuffled order, so that the draws of a sample are spread over the epoch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch

from pipelines.tables.chance import is_held_out
from pipelines.train.stream.config import StreamConfig
from pipelines.train.stream.mixture import Source
from pipelines.train.stream.order import OrderedTable, RowOrder, Window
from pipelines.train.stream.samples import Choice, MicroBatch, Sample, ShardRows, collate


class Draw(NamedTuple):
    """One draw of a row: `epoch` is its number, see `Source.draws`; `choice` is its caption."""

    rows: ShardRows
    row: int
    epoch: int
    choice: Choice


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
        self.prefetch = config.prefetch
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        dtypes = {source.manifest.config["dtype"] for source in self.sources}
        self._dtype = torch.float32 if len(dtypes) > 1 else None  # a micro-batch may mix tables, but not dtypes
        self._with_embeds = any(source.embeds is not None for source in self.sources)
        tables = [
            OrderedTable(source.table, source.manifest.fingerprint, source.weight, source.num_passes) for source in self.sources
        ]
        self._rows = RowOrder(tables, shuffle_shards=config.shuffle_shards, seed=seed, rank=rank, world_size=world_size)
        self._buffers: dict[str, list[Sample]] = {}
        self._draws = self._draw()

    @property
    def epoch(self) -> int:
        """See `RowOrder`."""
        return self._rows.epoch

    def _draw(self) -> Iterator[Draw]:
        return self._rows.draw(self._open, self._check_that_any_passes)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        while (bucket := self._full_bucket()) is None:
            draw = next(self._draws)
            sample = draw.rows.sample(draw.row, draw.epoch, draw.choice)
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
            **self._rows.state_dict(),
            "buffers": {
                bucket: [(sample.epoch, sample.place, sample.id) for sample in samples]
                for bucket, samples in self._buffers.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Shards that a table has gained since then are not drawn.

        Raises ValueError if the state is that of another rank or world size, or of other tables, weights or settings.
        """
        self._rows.load_state_dict(state)
        self._buffers = self._restore_buffers(state["buffers"])
        self._draws = self._draw()

    def load_all_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue a training from the states of all its ranks, in their order; the world size may differ.

        If it differs, unfinished windows are given to the new ranks in turn, and so are the samples that waited in buffers:
        no sample of an epoch is lost or drawn twice. Raises like `load_state_dict`.
        """
        if len(states) == self.world_size:
            self.load_state_dict(states[self.rank])
            return
        waiting: dict[str, list[tuple[int, int, str]]] = {}
        for state in states:
            for bucket, entries in state["buffers"].items():
                waiting.setdefault(bucket, []).extend(entries)
        mine = {bucket: entries[self.rank :: self.world_size] for bucket, entries in waiting.items()}
        self._rows.load_all_states(states)
        self._buffers = self._restore_buffers({bucket: entries for bucket, entries in mine.items() if entries})
        self._draws = self._draw()

    def _open(self, window: Window) -> list[Draw | None]:
        """Read the window's shards. Returns an entry for each row of each pass, in order: None if the row is not drawn."""
        passes = [self._rows.passes[index] for index in window.passes]
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
        source, shard = self._rows.places[place]
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
        for place in range(len(self._rows.places)):
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
