"""Rows of a latents table as samples: which caption a draw of one takes, and micro-batches of one bucket."""

from collections.abc import Iterable, Sequence
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
    """The caption that a draw takes; `dropped`: the null caption takes its place."""

    captioner: str
    caption: str
    dropped: bool


@dataclass(frozen=True)
class Sample:
    """A row as it was drawn.

    epoch: how often this sample was drawn before: where its table's weight is 1, the epoch. place: number of its shard.
    caption None is the null caption. embeds: of the caption (num_tokens, width); None where it is to be encoded, or null.
    """

    id: str
    epoch: int
    place: int
    table: str
    bucket: str
    latents: Tensor
    caption: str | None
    embeds: Tensor | None


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes: samples of one bucket.

    latents: (B, C, h, w), scaled, in the table's dtype. captions: None is the null caption. embeds: of the captions, each
    (num_tokens, width), None for the null caption; None as a whole where they are to be encoded. tables: URIs. An id of a table
    together with its epoch is drawn once.
    """

    bucket: str
    latents: Tensor
    captions: list[str | None]
    ids: list[str]
    epochs: list[int]
    tables: list[str]
    embeds: list[Tensor | None] | None = None


def collate(samples: Sequence[Sample], *, with_embeds: bool) -> MicroBatch:
    return MicroBatch(
        bucket=samples[0].bucket,
        latents=torch.stack([sample.latents for sample in samples]),
        captions=[sample.caption for sample in samples],
        ids=[sample.id for sample in samples],
        epochs=[sample.epoch for sample in samples],
        tables=[sample.table for sample in samples],
        embeds=[sample.embeds for sample in samples] if with_embeds else None,
    )


def is_held_out(sample_id: str, share: float) -> bool:
    """Whether a sample is kept from training: by its id alone, in every training alike."""
    return uniform("held out", sample_id) < share


class ShardRows:
    """A shard in memory, of which samples are made.

    Args:
        place: the shard's number among all of the training's.
        dtype: of the samples' latents; None: the table's.

    Raises as `Table.read_shard`.
    """

    def __init__(self, source: Source, shard: str, *, place: int = 0, dtype: torch.dtype | None = None):
        self.source = source
        self.shard = shard
        self.place = place
        self.dtype = dtype
        self.rows = source.table.read_shard(shard)
        self.ids: list[str] = self.rows["id"].to_pylist()
        self._embeds: dict[tuple[str, str], Tensor] = {}
        self._embedded = list_caption_embeds(source.embeds, shard) if source.embeds is not None else None

    def __len__(self) -> int:
        return len(self.ids)

    def choose(self, row: int, epoch: int, config: StreamConfig, *, seed: int) -> Choice | None:
        """The caption of a row in its epoch. None where the selection policy lets none pass, or none of them was embedded."""
        captions = self.rows["captions"][row].as_py()
        if self._embedded is not None:
            captions = [caption for caption in captions if (self.ids[row], caption["captioner"]) in self._embedded]
        chosen = choose_caption(captions, config.selection, seed=seed, epoch=epoch, sample_id=self.ids[row])
        if chosen is None:
            return None
        dropped = uniform(seed, epoch, self.ids[row], "caption_dropout") < config.caption_dropout
        return Choice(chosen["captioner"], chosen["caption"], dropped)

    def load_embeds(self, wanted: Iterable[tuple[int, Choice]]) -> None:
        """Have the embeddings of these rows' captions at hand, where the source has them."""
        if self.source.embeds is not None:
            keys = {(self.ids[row], choice.captioner) for row, choice in wanted if not choice.dropped}
            self._embeds |= read_caption_embeds(self.source.embeds, self.shard, keys)

    def sample(self, row: int, epoch: int, choice: Choice) -> Sample:
        names = ("latents", "channels", "height", "width", "bucket")
        values = {name: self.rows[name][row].as_py() for name in names}
        latents = read_latents(values, self.source.manifest.config["dtype"])
        has_embeds = self.source.embeds is not None and not choice.dropped
        return Sample(
            id=self.ids[row],
            epoch=epoch,
            place=self.place,
            table=self.source.table.uri,
            bucket=values["bucket"],
            latents=latents if self.dtype is None else latents.to(self.dtype),
            caption=None if choice.dropped else choice.caption,
            embeds=self._embeds[self.ids[row], choice.captioner] if has_embeds else None,
        )
