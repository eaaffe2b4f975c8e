"""The tables that a training draws from, and how often it draws each sample of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pipelines.score.candidates import Candidates, Filters
from pipelines.tables.captions import IMPORT_STAGE
from pipelines.tables.chance import uniform
from pipelines.tables.identity import Manifest
from pipelines.tables.schema import CAPTION_EMBEDS, LATENTS, SCORES, caption_embeds_path
from pipelines.tables.table import Table, absolute_uri
from pipelines.train.stream.config import UNIT, StreamConfig, ValidationConfig, WeightedTable


@dataclass(frozen=True)
class Source:
    """A latents table that samples are drawn from, and the tables of its dataset that say with which captions.

    table: the latents. candidates: the captions that compete. weight: how often each sample is drawn in an epoch, see
    `WeightedTable`. filters: limits on the images. embeds: name of the folder under caption_embeds/ with the stored embeddings
    of the captions; None: captions are encoded during the step.
    """

    table: Table
    candidates: Candidates
    weight: float = 1.0
    filters: Filters | None = None
    embeds: str | None = None

    @cached_property
    def manifest(self) -> Manifest:
        """Manifest of the latents table. Raises MissingTableError if there is no such table."""
        return self.table.require()

    @property
    def captioners(self) -> tuple[str, ...]:
        return self.candidates.captioners

    def embeds_table(self, captioner: str) -> Table:
        """The stored embeddings of a captioner's captions."""
        assert self.embeds is not None
        return Table(self.table.dataset_uri, caption_embeds_path(self.embeds, captioner), CAPTION_EMBEDS)

    def tables(self) -> list[Table]:
        """All tables that samples are made of, the latents first."""
        embeds = [self.embeds_table(captioner) for captioner in self.captioners] if self.embeds is not None else []
        return [*self.joined_tables(), *embeds]

    def joined_tables(self) -> list[Table]:
        """The tables whose rows are joined by id, the latents first: all but the stored embeddings."""
        return [self.table, *self.candidates.tables(), *(self.filters.tables() if self.filters else [])]

    @property
    def num_passes(self) -> int:
        """Number of times that an epoch reads each shard: `weight` rounded up. The n-th pass makes a sample's n-th draw."""
        return -(-self._units // UNIT)

    def draws(self, sample_id: str, *, epoch: int, seed: int) -> range:
        """Return the draws of a sample in `epoch`, numbered from 0 over the whole training.

        Each epoch adds `weight` to the sample's account, and each whole 1 in it is one draw. The account starts at a random
        fraction, derived from seed and id, so that samples are not all due in the same epoch. After n epochs a sample was
        drawn n * weight times, rounded up or down. With weight 1 the number of the draw is the epoch.
        """
        begin = int(uniform(seed, sample_id, "weight") * UNIT) if self._units % UNIT else 0
        first, after = (epoch * self._units + begin) // UNIT, ((epoch + 1) * self._units + begin) // UNIT
        return range(first, after)

    @property
    def _units(self) -> int:
        return round(self.weight * UNIT)


def find_sources(
    dataset_uri: str, latents: str | Sequence[WeightedTable], stream: StreamConfig, *, caption_embeds: str | None = None
) -> list[Source]:
    """Return a source for each table that `latents` names.

    Args:
        dataset_uri: the training's dataset.
        latents: path of one table, with weight 1, or several tables with their weights.
        stream: whose captions compete, and which images are let in.
        caption_embeds: name of the stored embeddings under caption_embeds/ of each dataset; None: none are stored.

    Raises ValueError if no table is named, or one is named more than once.
    """
    named = [WeightedTable(latents=latents)] if isinstance(latents, str) else latents
    sources = []
    for entry in named:
        uri = dataset_uri if entry.dataset_uri is None else absolute_uri(entry.dataset_uri)
        candidates = Candidates(uri, entry.captioners or stream.captioners, stream.clip)
        filters = Filters(uri, stream.image_filters) if stream.image_filters else None
        sources.append(Source(Table(uri, entry.latents, LATENTS), candidates, entry.weight, filters, caption_embeds))
    uris = [source.table.uri for source in sources]
    if not uris:
        raise ValueError("latents=[] names no table: give the path of one, or a list of tables with weights")
    if twice := {uri for uri in uris if uris.count(uri) > 1}:
        raise ValueError(f"latents names {min(twice)} more than once: give it one weight")
    return sources


def check_complete(source: Source) -> list[tuple[Table, Manifest]]:
    """Check that a training can draw all samples of a source, and goes on drawing the same ones.

    Returns the source's tables with their manifests, in the order of `Source.tables`.

    Raises MissingTableError if a table is missing; ValueError, naming it, if its stage has not finished, it lacks a shard, or
    it was not made from the tables that it is joined with.
    """
    found = check_finished(source.tables())
    check_inputs(found[: len(source.joined_tables())])
    scores = {made.stage == IMPORT_STAGE: table for table, made in found if table.schema == SCORES}
    if len(scores) > 1:
        raise ValueError(
            f"{scores[True].uri} came with imported captions, and cannot be compared with {scores[False].uri}: delete it, "
            "and let jobs.score make it"
        )
    return found


def check_finished(tables: Sequence[Table]) -> list[tuple[Table, Manifest]]:
    """Return these tables of a dataset with their manifests.

    Raises MissingTableError if one is missing; ValueError, naming it, if its stage has not finished, or it lacks a shard that
    the first one has.
    """
    shards = tables[0].list_shards()
    found = [(table, table.require()) for table in tables]
    for table, manifest in found:
        if not manifest.complete:
            raise ValueError(f"{table.uri} is not complete: let its stage finish first, or samples would come and go")
        if missing := set(shards).difference(table.list_shards()):
            raise ValueError(f"{table.uri} has no shard {min(missing)}, which {tables[0].uri} has: run its stage again")
    return found


def check_inputs(tables: Sequence[tuple[Table, Manifest]]) -> None:
    """Raise ValueError if two tables of a dataset were made from different versions of a third, or of one of the two.

    Scores would be those of captions that are no longer there, or captions would lie in another shard than their images.
    """
    known = {table.path: (made.fingerprint, "the one that is there now") for table, made in tables}
    for table, made in tables:
        for path, fingerprint in made.inputs.items():
            first, whose = known.setdefault(path, (fingerprint, table.uri))
            if fingerprint != first:
                raise ValueError(
                    f"{table.uri} was made from another {path} than {whose}: let the stage of the older table make it anew "
                    "with --on_stale rebuild"
                )


def check_channels(sources: Sequence[Source], channels: int) -> None:
    """Raise ValueError, naming the table, if a table's latents do not have this number of channels."""
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
    """Return the tables to validate a training on `sources` with; empty if there is no validation."""
    if config.latents is not None:
        return find_sources(dataset_uri, config.latents, stream, caption_embeds=caption_embeds)
    return list(sources) if stream.held_out_share else []
