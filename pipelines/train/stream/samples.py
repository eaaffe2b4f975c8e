"""Samples: rows of a latents table with the caption that was drawn for them, and micro-batches of samples of one bucket."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.extract.run import read_latents
from pipelines.score.selection import choose_caption
from pipelines.tables.chance import uniform
from pipelines.train.stream.captions import list_caption_embeds, read_caption_embeds
from pipelines.train.stream.config import StreamConfig
from pipelines.train.stream.mixture import Source


@dataclass(frozen=True)
class Choice:
    """The caption chosen for one draw of a row. `dropped`: train on the null caption instead."""

    captioner: str
    caption: str
    dropped: bool


@dataclass(frozen=True)
class Sample:
    """A row with one of its captions, as drawn.

    epoch: how often this row was drawn before; with a table of weight 1 that is the epoch.
    place: number of its shard among all shards of the training.
    table: URI of the latents table.
    bucket: size of the image, "HxW" in pixels.
    latents: (C, h, w), scaled.
    caption: the chosen one. dropped: train on the null caption in its place.
    embeds: stored embeddings of the caption, (num_tokens, width); None if it is still to be encoded.
    """

    id: str
    epoch: int
    place: int
    table: str
    bucket: str
    latents: Tensor
    caption: str
    dropped: bool
    embeds: Tensor | None


@dataclass(frozen=True)
class MicroBatch:
    """B samples of one bucket, for one forward pass. Over a whole training each (table, id, epoch) occurs once.

    bucket: size of the images, "HxW" in pixels.
    latents: (B, C, h, w), scaled, in the table's dtype (float32 if the training's tables differ in it).
    captions, dropped, ids, epochs, tables: of each sample, see `Sample`.
    embeds: stored embeddings of each caption, (num_tokens, width); None instead of the list if captions are still to be
        encoded.
    """

    bucket: str
    latents: Tensor
    captions: list[str]
    dropped: list[bool]
    ids: list[str]
    epochs: list[int]
    tables: list[str]
    embeds: list[Tensor] | None = None


def collate(samples: Sequence[Sample], *, with_embeds: bool) -> MicroBatch:
    """Make a micro-batch of samples of one bucket. `with_embeds`: captions were embedded before."""
    return MicroBatch(
        bucket=samples[0].bucket,
        latents=torch.stack([sample.latents for sample in samples]),
        captions=[sample.caption for sample in samples],
        dropped=[sample.dropped for sample in samples],
        ids=[sample.id for sample in samples],
        epochs=[sample.epoch for sample in samples],
        tables=[sample.table for sample in samples],
        embeds=[sample.embeds for sample in samples if sample.embeds is not None] if with_embeds else None,
    )


class ShardRows:
    """The rows of one shard, in memory, and the samples made of them. Raises like `Table.read_shard`.

    Args:
        source: the table.
        shard: name of the shard.
        place: number of the shard among all shards of the training.
        dtype: dtype of the samples' latents; None: that of the table.
    """

    def __init__(self, source: Source, shard: str, *, place: int = 0, dtype: torch.dtype | None = None):
        self.source = source
        self.shard = shard
        self.place = place
        self.dtype = dtype
        with ThreadPoolExecutor(3) as pool:  # on an object store reading is waiting
            candidates = pool.submit(source.candidates.read, shard)
            embedded = pool.submit(list_caption_embeds, source, shard)
            self.rows = source.table.read_shard(shard)
            self.ids: list[str] = self.rows["id"].to_pylist()
            self._admitted = source.filters.read(shard, self.ids) if source.filters else [True] * len(self.ids)
            self._candidates, self._embedded = candidates.result(), embedded.result()
        self._embeds: dict[tuple[str, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def choose(self, row: int, epoch: int, config: StreamConfig, *, seed: int) -> Choice | None:
        """Choose the caption for a draw of a row: `epoch` is the number of the draw.

        Returns None if the image's own scores do not let it in, it has no caption, the selection policy lets none of its
        captions pass, or none of them was embedded.
        """
        if not self._admitted[row]:
            return None
        captions = self._candidates.get(self.ids[row], [])
        if self._embedded is not None:
            captions = [caption for caption in captions if (self.ids[row], caption["captioner"]) in self._embedded]
        chosen = choose_caption(captions, config.selection, seed=seed, epoch=epoch, sample_id=self.ids[row])
        if chosen is None:
            return None
        dropped = uniform(seed, epoch, self.ids[row], "caption_dropout") < config.caption_dropout
        return Choice(chosen["captioner"], chosen["caption"], dropped)

    def load_embeds(self, wanted: Iterable[tuple[int, Choice]]) -> None:
        """Read the stored embeddings of these (row, choice) into memory, if the source has any; call before `sample`."""
        if self.source.embeds is not None:
            keys = {(self.ids[row], choice.captioner) for row, choice in wanted}
            self._embeds |= read_caption_embeds(self.source, self.shard, keys)

    def sample(self, row: int, epoch: int, choice: Choice) -> Sample:
        """Make the sample of a row from its choice of caption, which `load_embeds` has seen. `epoch`: see `choose`."""
        names = ("latents", "channels", "height", "width", "bucket")
        values = {name: self.rows[name][row].as_py() for name in names}
        latents = read_latents(values, self.source.manifest.config["dtype"])
        return Sample(
            id=self.ids[row],
            epoch=epoch,
            place=self.place,
            table=self.source.table.uri,
            bucket=values["bucket"],
            latents=latents if self.dtype is None else latents.to(self.dtype),
            caption=choice.caption,
            dropped=choice.dropped,
            embeds=None if self.source.embeds is None else self._embeds[self.ids[row], choice.captioner],
        )
