"""The training stream: a latents table -> micro-batches of one bucket, the same ones again after a resume.

Every rank goes its own way and never ends: each epoch the shards are dealt out among the ranks anew, and what a bucket has
left when its shards are read waits for the next epoch's samples. So no rank ever waits for another, whatever the buckets.

Another number of ranks goes on from the states of all the old ones: what these had not yet drawn of the epochs they had
begun, and the samples that waited in their buffers, is dealt out among the new ranks, and after that come whole epochs.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipelines.extract import read_latents
from pipelines.select import SelectionConfig, choose_caption, uniform
from pipelines.tables import Table


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Which samples are drawn, and with which captions.

    Args:
        selection: which of a sample's captions is drawn, anew in each epoch.
        caption_dropout: share of samples that get the null caption instead, for classifier-free guidance.
        held_out_share: share of the samples that are never drawn, by their ids: the loss on them tells what was learnt.
        shuffle_shards: shards that are read, and shuffled row by row, together; all of them are in memory at once.
        prefetch: micro-batches made ready ahead; changes no value.
    """

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    caption_dropout: float = 0.1
    held_out_share: float = 0.0
    shuffle_shards: int = 4
    prefetch: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be between 0 and 1")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share={self.held_out_share} must be at least 0 and below 1")
        for name in ("shuffle_shards", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True)
class Sample:
    """A row of the table as it was drawn in an epoch. `caption` None is the null caption."""

    id: str
    epoch: int
    shard: str
    bucket: str
    latents: Tensor
    caption: str | None


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes: samples of one bucket.

    latents: (B, C, h, w), scaled, in the table's dtype. captions: None is the null caption. An id together with its epoch
    is drawn once.
    """

    bucket: str
    latents: Tensor
    captions: list[str | None]
    ids: list[str]
    epochs: list[int]


@dataclass(frozen=True)
class Window:
    """Shards, by index, that are read and shuffled together in an epoch, from `start` on in their shuffled order."""

    epoch: int
    shards: tuple[int, ...]
    start: int = 0


def rank_shards(num_shards: int, *, seed: int, epoch: int, rank: int, world_size: int) -> list[int]:
    """Indices of the shards that a rank reads in an epoch, in its order: each shard is exactly one rank's.

    Where shards do not divide by ranks, the larger shares go round from epoch to epoch.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_shards)
    return order[(rank + epoch) % world_size :: world_size].tolist()


def is_held_out(sample_id: str, share: float) -> bool:
    """Whether a sample is kept from training: by its id alone, in every training alike."""
    return uniform("held out", sample_id) < share


class TrainingStream:
    """Endless iterator over the micro-batches of one rank: a pure function of table, config, seed, rank and world size.

    Raises:
        MissingTableError: there is no such table.
        ValueError: the table is empty, or has fewer shards than there are ranks; while iterating, if the selection policy
            lets no sample pass.
    """

    def __init__(
        self, table: Table, config: StreamConfig, *, micro_batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ):
        self.table = table
        self.config = config
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.dtype = table.require().config["dtype"]
        self.shards = table.list_shards()
        if not self.shards:
            raise ValueError(f"{table.uri} is empty: there is nothing to train on")
        if len(self.shards) < world_size:
            raise ValueError(
                f"num_workers={world_size} need a shard each, and {table.uri} has {len(self.shards)}: "
                "train with fewer workers, or ingest into smaller shards"
            )
        self.epoch = 0  # the one whose windows are drawn; or, of `leftover`, the last that the old ranks had begun
        self._leftover: tuple[Window, ...] = ()  # of another world size's epochs: drawn before whole epochs go on
        self._window = 0  # of the windows of the epoch
        self._row = 0  # of the window, shuffled
        self._buffers: dict[str, list[Sample]] = {}
        self._samples = self._draw()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        while (bucket := self._full_bucket()) is None:
            sample = next(self._samples)
            self._buffers.setdefault(sample.bucket, []).append(sample)
        samples = self._buffers.pop(bucket)
        if rest := samples[self.micro_batch_size :]:
            self._buffers[bucket] = rest
        return _collate(samples[: self.micro_batch_size])

    def _full_bucket(self) -> str | None:
        return next((bucket for bucket, samples in self._buffers.items() if len(samples) >= self.micro_batch_size), None)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as plain numbers and strings: position, and the samples that wait for their bucket to fill."""
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "epoch": self.epoch,
            "leftover": [(window.epoch, window.shards, window.start) for window in self._leftover],
            "window": self._window,
            "row": self._row,
            "buffers": {
                bucket: [(sample.epoch, sample.shard, sample.id) for sample in samples]
                for bucket, samples in self._buffers.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if that was another rank or world size."""
        for name in ("rank", "world_size"):
            if state[name] != getattr(self, name):
                raise ValueError(f"the stream's state is of {name}={state[name]}, this is {name}={getattr(self, name)}")
        self.epoch, self._window, self._row = state["epoch"], state["window"], state["row"]
        self._leftover = tuple(Window(epoch, tuple(shards), start) for epoch, shards, start in state["leftover"])
        self._buffers = self._restore_buffers(state["buffers"])
        self._samples = self._draw()

    def load_all_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all ranks of a training, in the order of the ranks, that had any world size.

        At another world size than this stream's, windows that were not drawn to their end go to the ranks by turns, and so
        do the samples that waited: no sample of an epoch is lost, or drawn twice.
        """
        if len(states) == self.world_size:
            self.load_state_dict(states[self.rank])
            return
        last_epoch = max(state["epoch"] for state in states)
        windows = list(chain.from_iterable(self._left_of(state, last_epoch) for state in states))
        waiting: dict[str, list[tuple[int, str, str]]] = {}
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

    def _left_of(self, state: dict[str, Any], last_epoch: int) -> Iterator[Window]:
        """What the rank of `state` had still to draw of its epochs up to `last_epoch`."""
        rank, world_size, row = state["rank"], state["world_size"], state["row"]
        leftover = [Window(epoch, tuple(shards), start) for epoch, shards, start in state["leftover"]]
        for window in (leftover or self._plan_epoch(state["epoch"], rank, world_size))[state["window"] :]:
            yield replace(window, start=max(window.start, row))
            row = 0
        for epoch in range(state["epoch"] + 1, last_epoch + 1):
            yield from self._plan_epoch(epoch, rank, world_size)

    def _draw(self) -> Iterator[Sample]:
        """Every sample of the rank, epoch after epoch, from the current position on."""
        num_idle_epochs = 0
        while True:
            windows = self._leftover or self._plan_epoch(self.epoch, self.rank, self.world_size)
            num_drawn = self._window + self._row  # of an epoch that goes on, some were drawn before
            while self._window < len(windows):
                window = windows[self._window]
                rows = self._read_window(window.shards)
                order = np.random.default_rng([self.seed, window.epoch, *window.shards]).permutation(len(rows))
                self._row = max(self._row, window.start)
                while self._row < len(order):
                    row = int(order[self._row])
                    self._row += 1
                    if (sample := self._make_sample(rows, row, window.epoch)) is not None:
                        num_drawn += 1
                        yield sample
                self._window, self._row = self._window + 1, 0
            num_idle_epochs = 0 if num_drawn else num_idle_epochs + 1
            if num_idle_epochs > self.world_size:  # by then this rank has met the other shards too
                raise ValueError(
                    f"no sample of {self.table.uri} can be drawn: it has no rows, or {self.config.selection} lets none pass"
                )
            self.epoch, self._window, self._leftover = self.epoch + 1, 0, ()

    def _plan_epoch(self, epoch: int, rank: int, world_size: int) -> tuple[Window, ...]:
        shards = rank_shards(len(self.shards), seed=self.seed, epoch=epoch, rank=rank, world_size=world_size)
        size = self.config.shuffle_shards
        return tuple(Window(epoch, tuple(shards[start : start + size])) for start in range(0, len(shards), size))

    def _read_window(self, shards: tuple[int, ...]) -> pa.Table:
        return pa.concat_tables(self._read_shard(self.shards[index]) for index in shards).combine_chunks()

    def _read_shard(self, shard: str) -> pa.Table:
        rows = self.table.read_shard(shard)
        return rows.append_column("shard", pa.repeat(pa.scalar(shard), rows.num_rows))

    def _make_sample(self, rows: pa.Table, row: int, epoch: int) -> Sample | None:
        """None where the sample is held out, or the selection policy lets no caption pass."""
        sample_id = rows["id"][row].as_py()
        if is_held_out(sample_id, self.config.held_out_share):
            return None
        values = {name: rows[name][row].as_py() for name in rows.column_names}
        chosen = choose_caption(values["captions"], self.config.selection, seed=self.seed, epoch=epoch, sample_id=sample_id)
        if chosen is None:
            return None
        dropped = uniform(self.seed, epoch, sample_id, "caption_dropout") < self.config.caption_dropout
        return Sample(
            id=sample_id,
            epoch=epoch,
            shard=values["shard"],
            bucket=values["bucket"],
            latents=read_latents(values, self.dtype),
            caption=None if dropped else chosen["caption"],
        )

    def _restore_buffers(self, buffers: dict[str, list[tuple[int, str, str]]]) -> dict[str, list[Sample]]:
        places: dict[str, dict[str, int]] = {}
        shards: dict[str, pa.Table] = {}
        for shard in {shard for entries in buffers.values() for _, shard, _ in entries}:
            shards[shard] = self._read_shard(shard)
            places[shard] = {row_id: row for row, row_id in enumerate(shards[shard]["id"].to_pylist())}
        restored: dict[str, list[Sample]] = {}
        for bucket, entries in buffers.items():
            samples = [self._make_sample(shards[shard], places[shard][row_id], epoch) for epoch, shard, row_id in entries]
            restored[bucket] = [sample for sample in samples if sample is not None]
        return restored


def _collate(samples: list[Sample]) -> MicroBatch:
    return MicroBatch(
        bucket=samples[0].bucket,
        latents=torch.stack([sample.latents for sample in samples]),
        captions=[sample.caption for sample in samples],
        ids=[sample.id for sample in samples],
        epochs=[sample.epoch for sample in samples],
    )


class PrefetchedStream:
    """A `TrainingStream` that reads ahead in a thread. Its state is that of the micro-batches handed out, not of those read.

    `wait_seconds` sums up how long the caller was kept waiting. Raises what the stream raises. `close()` ends the thread.
    """

    def __init__(self, stream: TrainingStream, depth: int):
        self._stream = stream
        self._state = stream.state_dict()
        self._ready: queue.Queue[tuple[MicroBatch, dict[str, Any]] | Exception] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read_ahead, name="training-stream", daemon=True)
        self._thread.start()
        self.wait_seconds = 0.0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> MicroBatch:
        start = time.monotonic()
        ready = self._ready.get()
        self.wait_seconds += time.monotonic() - start
        if isinstance(ready, Exception):
            raise ready
        batch, self._state = ready
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _read_ahead(self) -> None:
        try:
            for batch in self._stream:
                if not self._put((batch, self._stream.state_dict())):
                    return
        except Exception as error:  # raised again where the batch is asked for
            self._put(error)

    def _put(self, ready: tuple[MicroBatch, dict[str, Any]] | Exception) -> bool:
        """False if the stream was closed meanwhile."""
        while not self._closed.is_set():
            try:
                self._ready.put(ready, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
