"""Facts about the tables that a training will draw from: samples of an epoch, buckets, lengths of captions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.score.selection import Caption, caption_probabilities
from pipelines.tables.chance import is_held_out
from pipelines.tables.errors import MissingTableError, StaleTableError
from pipelines.train.config import TrainConfig
from pipelines.train.preflight.models import ModelShapes
from pipelines.train.stream.captions import check_caption_embeds
from pipelines.train.stream.mixture import Source, check_complete
from pipelines.train.stream.stream import TrainingStream
from sana_model.nn.text_encoder import TextEncoder

MAX_SHARDS_READ = 200
"""Shards of a table that are read at most, evenly spread over it; its other shards are taken to be alike."""
MAX_CAPTIONS_READ = 2000
"""Captions whose tokens are counted at most. Reading captions of a table ends with the shard that reaches this number."""


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """Facts about one latents table of a training.

    name: name of the table, seen from the training's dataset.
    weight: how often each sample is drawn in an epoch.
    rows, shards: how many it has.
    draws: estimate of the samples that an epoch draws from it: rows that are not held out and have a caption that the selection
        policy lets pass, times `weight`.
    channels: channels of its latents; 0 if it has no rows.
    buckets: draws of an epoch by (height, width) of the latents.
    captions: some of its captions.
    """

    name: str
    weight: float
    rows: int
    shards: int
    draws: float
    channels: int
    buckets: Counter[tuple[int, int]] = field(default_factory=Counter)
    captions: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """Facts about all tables of a training that exist already.

    caption_tokens: number of tokens of each caption that was looked at. truncated: how many of these captions the text encoder
    cuts.
    """

    tables: Sequence[TableFacts] = ()
    caption_tokens: Sequence[int] = ()
    truncated: int = 0

    @property
    def draws(self) -> int:
        """Number of samples that an epoch draws."""
        return round(sum(table.draws for table in self.tables))

    @property
    def buckets(self) -> Counter[tuple[int, int]]:
        """Number of samples that an epoch draws, by (height, width) of the latents."""
        return sum((table.buckets for table in self.tables), Counter())


def read_dataset(dataset_uri: str, training: TrainConfig, shapes: ModelShapes, problems: list[str]) -> DatasetFacts:
    """Read facts about the training's tables, and add what is wrong with them to `problems`.

    A training whose tables do not exist yet gives empty facts.
    """
    sources, tables = training.sources(dataset_uri), []
    for source in sources:
        try:
            check_complete(source)
        except (MissingTableError, StaleTableError) as error:
            problems.append(f"{error}; rows, buckets and captions of {source.table.uri} are not counted")
            continue
        except ValueError as error:
            problems.append(f"the training will refuse {source.table.uri} until this is mended: {error}")
        if source.embeds is not None:
            try:
                check_caption_embeds(source, text_encoder=shapes.text_encoder_path, prompts=shapes.prompts)
            except (ValueError, FileNotFoundError) as error:
                problems.append(str(error))
        tables.append(_read_table(source, source.table.name_in(dataset_uri), training))
    if len(tables) == len(sources):
        sizes = {"micro_batch_size": training.micro_batch_size, "world_size": training.num_workers}
        try:
            TrainingStream(sources, training.data, seed=training.seed, **sizes)
        except ValueError as error:
            problems.append(str(error))
    counter = shapes.caption_counter
    captions = [caption for table in tables for caption in table.captions[: MAX_CAPTIONS_READ // len(tables)]]
    tokens = counter.count_tokens(captions) if counter is not None and captions else []
    return DatasetFacts(tables=tables, caption_tokens=tokens, truncated=_count_truncated(tokens, counter))


def _count_truncated(tokens: Sequence[int], counter: TextEncoder | None) -> int:
    return sum(count > counter.config.max_tokens for count in tokens) if counter is not None else 0


def _read_table(source: Source, name: str, training: TrainConfig) -> TableFacts:
    shards = source.table.list_shards()
    rows = sum(source.table.read_facts(shard).num_rows for shard in shards)
    joined = sorted(set(shards).intersection(*(table.list_shards() for table in source.tables())))
    looked_at = joined[:: -(-len(joined) // MAX_SHARDS_READ)] if joined else []
    counted: Counter[tuple[int, int]] = Counter()
    channels, judged, passing, captions = 0, 0, 0, list[str]()
    for shard in looked_at:
        table = source.table.read_shard(shard, ["id", "channels", "height", "width"])
        counted.update((row["height"], row["width"]) for row in table.to_pylist())
        channels = table["channels"][0].as_py() if table.num_rows else channels
        if len(captions) < MAX_CAPTIONS_READ:
            contests = _contests(source, shard, table["id"].to_pylist())
            captions += [caption["caption"] for _, contest in contests for caption in contest]
            judged += table.num_rows
            passing += sum(
                any(caption_probabilities(contest, training.data.selection))
                and not is_held_out(row_id, training.data.held_out_share)
                for row_id, contest in contests
            )
    draws = source.weight * rows * passing / max(judged, 1)
    buckets = Counter({bucket: round(count * draws / counted.total()) for bucket, count in counted.items()})
    return TableFacts(
        name=name,
        weight=source.weight,
        rows=rows,
        shards=len(shards),
        draws=draws,
        channels=channels,
        buckets=buckets,
        captions=captions,
    )


def _contests(source: Source, shard: str, ids: Sequence[str]) -> list[tuple[str, list[Caption]]]:
    """The captions that compete for each of a shard's images, without the images that the filters keep out."""
    candidates = source.candidates.read(shard)
    admitted = source.filters.read(shard, ids) if source.filters else [True] * len(ids)
    return [(row_id, candidates.get(row_id, [])) for row_id, is_in in zip(ids, admitted, strict=True) if is_in]
