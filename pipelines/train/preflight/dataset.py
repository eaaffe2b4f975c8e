"""What a training will find in its tables: samples of an epoch, buckets, captions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.score.selection import caption_probabilities
from pipelines.tables.errors import MissingTableError
from pipelines.train.config import TrainConfig
from pipelines.train.preflight.models import ModelShapes
from pipelines.train.stream.captions import check_caption_embeds
from pipelines.train.stream.mixture import Source
from pipelines.train.stream.samples import is_held_out
from pipelines.train.stream.stream import TrainingStream
from sana_model.nn.text_encoder import TextEncoder

MOST_SHARDS = 200  # whose buckets are counted; of a longer table, as many spread over it, and the rest by their share
MOST_CAPTIONS = 2000


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """A table as the training draws from it.

    draws: about how many samples an epoch draws of it: those that are not held out and that the selection policy lets pass,
    each as often as `weight` says. channels: of its latents, 0 if it has no row. buckets: draws by (height, width) of the
    latents. captions: some of them.
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
    """What there is to train on; no table yet, and the sizes are those of the square image.

    caption_tokens: of each of the captions. truncated: how many of those the text encoder cuts.
    """

    tables: Sequence[TableFacts] = ()
    caption_tokens: Sequence[int] = ()
    truncated: int = 0

    @property
    def draws(self) -> int:
        """Samples of an epoch."""
        return round(sum(table.draws for table in self.tables))

    @property
    def buckets(self) -> Counter[tuple[int, int]]:
        """The samples of an epoch by (height, width) of the latents."""
        return sum((table.buckets for table in self.tables), Counter())


def read_dataset(dataset_uri: str, training: TrainConfig, shapes: ModelShapes, problems: list[str]) -> DatasetFacts:
    """What is in those of the training's tables that are there."""
    sources, tables = training.sources(dataset_uri), []
    for source in sources:
        try:
            complete = source.manifest.complete
        except MissingTableError:
            problems.append(f"{source.table.uri} is not there yet: its rows, buckets and captions are not counted")
            continue
        if not complete:
            problems.append(f"{source.table.uri} is not complete: the training will refuse it until its stage has finished")
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
    captions = [caption for table in tables for caption in table.captions[: MOST_CAPTIONS // len(tables)]]
    tokens = counter.count_tokens(captions) if counter is not None and captions else []
    return DatasetFacts(tables=tables, caption_tokens=tokens, truncated=_count_truncated(tokens, counter))


def _count_truncated(tokens: Sequence[int], counter: TextEncoder | None) -> int:
    return sum(count > counter.config.max_tokens for count in tokens) if counter is not None else 0


def _read_table(source: Source, name: str, training: TrainConfig) -> TableFacts:
    shards = source.table.list_shards()
    rows = sum(source.table.read_facts(shard).num_rows for shard in shards)
    looked_at = shards[:: -(-len(shards) // MOST_SHARDS)] if shards else []
    counted: Counter[tuple[int, int]] = Counter()
    channels, judged, passing, captions = 0, 0, 0, list[str]()
    for shard in looked_at:
        with_captions = len(captions) < MOST_CAPTIONS
        columns = ["id", "channels", "height", "width"] + (["captions"] if with_captions else [])
        for row in source.table.read_shard(shard, columns).to_pylist():
            counted[row["height"], row["width"]] += 1
            channels = row["channels"]
            if with_captions:
                captions += [caption["caption"] for caption in row["captions"]]
                judged += 1
                passing += any(caption_probabilities(row["captions"], training.data.selection)) and not is_held_out(
                    row["id"], training.data.held_out_share
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
