"""The tables that a training draws from, and how often it draws each sample of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipelines.tables.chance import uniform
from pipelines.tables.identity import Manifest
from pipelines.tables.schema import CAPTION_EMBEDS, LATENTS, caption_embeds_path
from pipelines.tables.table import Table, absolute_uri
from pipelines.train.stream.config import UNIT, StreamConfig, ValidationConfig, WeightedTable


@dataclass(frozen=True)
class Source:
    """A latents table that samples are drawn from. `embeds`: the table of its dataset with what the text encoder made of the
    captions; None: captions are encoded when they are trained on."""

    table: Table
    weight: float = 1.0
    embeds: Table | None = None

    @cached_property
    def manifest(self) -> Manifest:
        """The table's. Raises MissingTableError."""
        return self.table.require()

    @property
    def num_passes(self) -> int:
        """How often its shards are read in an epoch: the n-th pass has the n-th draws of samples in it."""
        return -(-self._units // UNIT)

    def draws(self, sample_id: str, *, epoch: int, seed: int) -> range:
        """The draws of a sample that an epoch makes, by their numbers over the whole training.

        A sample is due whenever `weight` has added up to another 1, and begins at a point of its own: after n epochs it was
        drawn n * weight times, rounded up or down. With weight 1 the number of a draw is the epoch's.
        """
        begin = int(uniform(seed, sample_id, "weight") * UNIT) if self._units % UNIT else 0
        first, after = (epoch * self._units + begin) // UNIT, ((epoch + 1) * self._units + begin) // UNIT
        return range(first, after)

    @property
    def _units(self) -> int:
        return round(self.weight * UNIT)


def find_sources(
    dataset_uri: str, latents: str | Sequence[WeightedTable], *, caption_embeds: str | None = None
) -> list[Source]:
    """The tables that `latents` names: one, each of whose samples is drawn once in an epoch, or several with their weights.

    Args:
        caption_embeds: name of a table under caption_embeds/ of each dataset.

    Raises ValueError if none is named, or one more than once.
    """
    named = [WeightedTable(latents=latents)] if isinstance(latents, str) else latents
    sources = []
    for entry in named:
        uri = dataset_uri if entry.dataset_uri is None else absolute_uri(entry.dataset_uri)
        embeds = None if caption_embeds is None else Table(uri, caption_embeds_path(caption_embeds), CAPTION_EMBEDS)
        sources.append(Source(Table(uri, entry.latents, LATENTS), entry.weight, embeds))
    uris = [source.table.uri for source in sources]
    if not uris:
        raise ValueError("latents=[] names no table: give the path of one, or a list of tables with weights")
    if twice := {uri for uri in uris if uris.count(uri) > 1}:
        raise ValueError(f"latents names {min(twice)} more than once: give it one weight")
    return sources


def check_channels(sources: Sequence[Source], channels: int) -> None:
    """Raises ValueError, naming the table, if one holds latents of another number of channels."""
    for table in (source.table for source in sources):
        for shard in table.list_shards():
            if found := table.read_shard(shard, ["channels"])["channels"].unique().to_pylist():
                if found != [channels]:
                    raise ValueError(
                        f"{table.uri} holds latents of {found[0]} channels, the transformer takes {channels}: "
                        "they are not of this pipeline's autoencoder"
                    )
                break


def validation_sources(
    dataset_uri: str, sources: Sequence[Source], config: ValidationConfig, stream: StreamConfig, *, caption_embeds: str | None
) -> list[Source]:
    """The tables of the validation of a training on `sources`; none where there is no validation."""
    if config.latents is not None:
        return find_sources(dataset_uri, config.latents, caption_embeds=caption_embeds)
    return list(sources) if stream.held_out_share else []
