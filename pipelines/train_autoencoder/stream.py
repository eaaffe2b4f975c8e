"""The training's stream of crops: images tables -> micro-batches of crops of one size, the same ones again after a resume.

`RowOrder` says in which order a rank comes to the rows of its shards. Each step has one size of crops, which is drawn by chance
for all ranks alike; rows whose image is too small for it are passed over. Crops are cut in processes, several micro-batches
ahead of the one that is asked for.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipelines.score.candidates import Filters
from pipelines.tables.chance import is_held_out, uniform
from pipelines.tables.identity import Manifest
from pipelines.tables.schema import IMAGES, IMAGES_PATH
from pipelines.tables.table import Table, absolute_uri
from pipelines.train.stream.mixture import check_finished, check_inputs
from pipelines.train.stream.order import OrderedTable, RowOrder, Window
from pipelines.train_autoencoder.config import CropConfig
from pipelines.train_autoencoder.crops import CropJob, fits
from pipelines.train_autoencoder.decoders import Decoders

COLUMNS = ["id", "width", "height", "image_bytes"]


@dataclass(frozen=True)
class CropSource:
    """An images table that crops are drawn from. `times`: how often each image is drawn in an epoch."""

    table: Table
    times: int
    filters: Filters | None = None

    @cached_property
    def manifest(self) -> Manifest:
        """Raises MissingTableError if there is no such table."""
        return self.table.require()

    def check_complete(self) -> list[tuple[Table, Manifest]]:
        """The tables with their manifests, once they are checked as `check_complete` checks those of latents. Raises as it."""
        found = check_finished(self.tables())
        check_inputs(found)
        return found

    def tables(self) -> list[Table]:
        """The tables that are read, the images first."""
        return [self.table, *(self.filters.tables() if self.filters is not None else [])]

    def chosen(self, shard: str, ids: Sequence[str], *, held_out_share: float, held_out: bool = False) -> list[bool]:
        """Which of these images of a shard are drawn: those that their scores let in and that are not held out.

        `held_out`: those that are.
        """
        admitted = self.filters.read(shard, ids) if self.filters is not None else [True] * len(ids)
        return [
            let_in and is_held_out(row_id, held_out_share) == held_out for row_id, let_in in zip(ids, admitted, strict=True)
        ]


def find_sources(dataset_uri: str, config: CropConfig) -> list[CropSource]:
    """The images tables that a training draws from. Raises ValueError if one is named twice."""
    uris = [absolute_uri(source.dataset_uri or dataset_uri) for source in config.all_sources]
    if twice := next((uri for uri in uris if uris.count(uri) > 1), None):
        raise ValueError(f"data.sources names {twice} twice: name it once, with a larger times")
    return [
        CropSource(
            Table(uri, IMAGES_PATH, IMAGES),
            source.times,
            Filters(uri, dict(config.image_filters)) if config.image_filters else None,
        )
        for uri, source in zip(uris, config.all_sources, strict=True)
    ]


def shorter_sides(rows: pa.Table) -> list[int]:
    """The shorter side in pixels of each image, from the columns width and height."""
    return pc.min_element_wise(rows["width"], rows["height"]).to_pylist()


class Draw(NamedTuple):
    """One draw of an image: `number` counts its draws over the whole training."""

    table: str
    id: str
    number: int
    shorter: int
    image_bytes: bytes


@dataclass(frozen=True)
class CropBatch:
    """B crops of one size.

    images: (B, 3, size, size) uint8. ids, epochs, tables: id, number of the draw and table of each. num_refused: how many
    images could not be decoded; another crop of the batch stands in the place of each.
    """

    images: Tensor
    ids: list[str]
    epochs: list[int]
    tables: list[str]
    num_refused: int = 0


Pending = tuple[list[Draw], list[Future[np.ndarray | str]], dict[str, Any]]
"""The draws of a micro-batch, its crops as they will be, and the stream's state after it."""


class CropStream:
    """Endless iterator over the micro-batches of one rank, which tables, config, seed, rank and world size fully determine.

    Args:
        sources: the tables to draw from.
        config: which crops are drawn.
        micro_batch_size: crops of a micro-batch.
        grad_accum_steps: micro-batches of a step.
        seed: seed of the order of images and of their crops.
        rank: this rank, from 0.
        world_size: number of ranks.

    Raises:
        MissingTableError: a table does not exist.
        ValueError: a table is empty, there are more ranks than shards, or no image is large enough.
    """

    def __init__(
        self,
        sources: Sequence[CropSource],
        config: CropConfig,
        *,
        micro_batch_size: int,
        grad_accum_steps: int = 1,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.sources = tuple(sources)
        self.config = config
        self.prefetch = config.prefetch
        self.micro_batch_size = micro_batch_size
        self.grad_accum_steps = grad_accum_steps
        self.seed = seed
        tables = [
            OrderedTable(source.table, source.manifest.fingerprint, source.times, source.times) for source in self.sources
        ]
        self._rows = RowOrder(tables, shuffle_shards=config.shuffle_shards, seed=seed, rank=rank, world_size=world_size)
        self._check_sizes()
        self._step = 0  # steps whose micro-batches were all returned
        self._state = self._position(0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last micro-batch that was returned, as values for JSON."""
        return self._state

    def _position(self, step: int) -> dict[str, Any]:
        return {**self._rows.state_dict(), "step": step}

    def load_all_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue a training from the states of all its ranks, in their order, taken between steps; see `RowOrder`."""
        self._rows.load_all_states(states)
        self._step = states[0]["step"]
        self._state = self._position(self._step)

    def __iter__(self) -> Iterator[CropBatch]:
        draws = self._rows.draw(self._open, lambda: None)  # `_check_sizes` found an image, perhaps of other ranks in this epoch
        with Decoders(self.config.decode_processes) as decoders:
            waiting: deque[Pending] = deque()
            made = 0  # micro-batches since the step at which this iterator began
            first = self._step
            while True:
                while len(waiting) <= (self.config.prefetch if self.config.decode_processes else 0):
                    step = first + made // self.grad_accum_steps
                    made += 1
                    waiting.append(self._begin(draws, decoders, step, first + made // self.grad_accum_steps))
                drawn, crops, state = waiting.popleft()
                batch = _collate(drawn, [crop.result() for crop in crops])
                self._step, self._state = state["step"], state
                yield batch

    def _begin(self, draws: Iterator[Draw], decoders: Decoders, step: int, next_step: int) -> Pending:
        """Draw the images of a micro-batch and have its crops cut. `next_step`: the step of the micro-batch after it."""
        size = step_size(self.config, self.seed, step)
        drawn: list[Draw] = []
        while len(drawn) < self.micro_batch_size:
            draw = next(draws)
            if self._fits(draw.shorter, size):
                drawn.append(draw)
        crops = [decoders.submit(self._job(draw, size)) for draw in drawn]
        return drawn, crops, self._position(next_step)

    def _fits(self, shorter: int, size: int) -> bool:
        return fits(shorter, size, largest=self.config.scale[1], max_upscale=self.config.max_upscale)

    def _job(self, draw: Draw, size: int) -> CropJob:
        config = self.config
        least = max(config.scale[0], size / (draw.shorter * config.max_upscale))
        key = f"{self.seed}/{draw.number}/{draw.id}"
        return CropJob(draw.image_bytes, size, min(least, config.scale[1]), config.scale[1], config.flip, key)

    def _open(self, window: Window) -> list[Draw | None]:
        """Read the window's shards. Returns an entry for each row of each pass, in order: None if the row is not drawn."""
        passes = [self._rows.passes[index] for index in window.passes]
        read = {place: self._read(place) for place in dict.fromkeys(place for place, _ in passes)}
        return [
            None if draw is None else draw._replace(number=window.epoch * self._source(place).times + number)
            for place, number in passes
            for draw in read[place]
        ]

    def _source(self, place: int) -> CropSource:
        return self.sources[self._rows.places[place].table]

    def _read(self, place: int) -> list[Draw | None]:
        source, shard = self._source(place), self._rows.places[place].shard
        rows = source.table.read_shard(shard, COLUMNS)
        ids, smallest = rows["id"].to_pylist(), min(self.config.sizes)
        chosen = source.chosen(shard, ids, held_out_share=self.config.held_out_share)
        return [
            Draw(source.table.uri, row_id, 0, shorter, image_bytes.as_py()) if drawn and self._fits(shorter, smallest) else None
            for row_id, shorter, image_bytes, drawn in zip(ids, shorter_sides(rows), rows["image_bytes"], chosen, strict=True)
        ]

    def _check_sizes(self) -> None:
        """Raise ValueError if no image that is drawn is large enough for the largest crops."""
        largest = 0
        for table, shard in self._rows.places:
            source = self.sources[table]
            rows = source.table.read_shard(shard, COLUMNS[:3])
            chosen = source.chosen(shard, rows["id"].to_pylist(), held_out_share=self.config.held_out_share)
            drawn = (shorter for shorter, one in zip(shorter_sides(rows), chosen, strict=True) if one)
            largest = max(largest, *drawn, 0)
            if self._fits(largest, max(self.config.sizes)):
                return
        names = ", ".join(source.table.uri for source in self.sources)
        if not largest:
            raise ValueError(f"{names} has no image to train on: none, or all are held out or kept back by data.image_filters")
        raise ValueError(
            f"no image of {names} is large enough for crops of {max(self.config.sizes)} pixels: the largest has a shorter side "
            f"of {largest}, of which data.scale takes {self.config.scale[1]:g} and data.max_upscale allows "
            f"{self.config.max_upscale:g} times as many pixels; take smaller data.sizes, or a larger data.max_upscale"
        )


def step_size(config: CropConfig, seed: int, step: int) -> int:
    """The side of a step's crops in pixels, the same on all ranks."""
    return config.sizes[int(uniform(seed, step, "size") * len(config.sizes))]


def _collate(drawn: Sequence[Draw], crops: Sequence[np.ndarray | str]) -> CropBatch:
    """A micro-batch; a crop that could not be cut is replaced by the next one that could.

    Raises ValueError if none could, with the reason of the first.
    """
    good = [index for index, crop in enumerate(crops) if not isinstance(crop, str)]
    if not good:
        raise ValueError(f"no image of a micro-batch can be decoded: {drawn[0].table}, {drawn[0].id}: {crops[0]}")
    taken = [next((place for place in good if place >= index), good[0]) for index in range(len(crops))]
    images = torch.from_numpy(np.stack([np.asarray(crops[index]) for index in taken])).permute(0, 3, 1, 2)
    return CropBatch(
        images=images.contiguous(),
        ids=[drawn[index].id for index in taken],
        epochs=[drawn[index].number for index in taken],
        tables=[drawn[index].table for index in taken],
        num_refused=len(crops) - len(good),
    )
