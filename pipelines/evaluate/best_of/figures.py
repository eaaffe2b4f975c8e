"""What choosing gains: every figure over the pictures that would be kept of 1, 2, 4 ... candidates of a prompt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.evaluate.best_of.choose import Rank, choose
from pipelines.evaluate.best_of.config import BestOfConfig
from pipelines.evaluate.best_of.run import num_candidates, prompt_number
from pipelines.evaluate.metric import iter_shards, metric_table
from pipelines.evaluate.registry import metric_class
from pipelines.tables.schema import SAMPLES, samples_path
from pipelines.tables.table import Table


@dataclass(frozen=True)
class ChosenRows(Table):
    """A table of judgements of which only the rows of some pictures are read, so that a metric can summarize these."""

    ids: frozenset[str]

    def read_shard(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        rows = super().read_shard(shard, None if columns is None else ["id", *(name for name in columns if name != "id")])
        chosen = rows.filter(pc.is_in(rows["id"], pa.array(self.ids, pa.string())))
        return chosen if columns is None else chosen.select(columns)


def best_of_figures(dataset_uri: str, candidates: str, config: BestOfConfig) -> dict[int, dict[str, float]]:
    """The figures of the judge and of all further metrics, by the number of candidates that were chosen among.

    For n candidates, the candidates of each prompt are taken in groups of n, and the kept pictures of all groups count: so
    that n = 1 is the mean over all pictures, and as many pictures are seen for every n as there are. Needs no model.
    """
    each = num_candidates(Table(dataset_uri, samples_path(candidates), SAMPLES).require())
    judged = read_ranks(metric_table(dataset_uri, candidates, config.judge), config.judge)
    figures: dict[int, dict[str, float]] = {}
    for size in group_sizes(each, config.keep):
        ids = frozenset(chosen_ids(judged, each, size, config))
        figures[size] = {}
        for metric, settings in config.chosen.items():
            table = metric_table(dataset_uri, candidates, metric)
            chosen = ChosenRows(table.dataset_uri, table.path, table.schema, ids)
            figures[size] |= metric_class(metric).summarize(chosen, settings)
    return figures


def group_sizes(each: int, keep: int) -> list[int]:
    """1, and the powers of two between `keep` and `each`, and `each`."""
    powers = [2**power for power in range(each.bit_length())]
    return sorted({1, each, *(size for size in powers if keep <= size <= each)})


def read_ranks(table: Table, judge: str) -> Mapping[str, Rank]:
    """The rank of each judged picture, by its id."""
    kind = metric_class(judge)
    return {row["id"]: kind.rank(row) for shard in iter_shards(table) for row in shard.to_pylist()}


def chosen_ids(judged: Mapping[str, Rank], each: int, size: int, config: BestOfConfig) -> Iterator[str]:
    """The pictures kept of every whole group of `size` candidates, drawn one after the other for one prompt."""
    for _, own in groupby(sorted(judged, key=int), lambda picture: prompt_number(picture, each)):
        by_place = {int(picture) % each: picture for picture in own}
        for start in range(0, each - size + 1, size):
            group: Sequence[str | None] = [by_place.get(place) for place in range(start, start + size)]
            ranks = [None if picture is None else judged[picture] for picture in group]
            keep = min(config.keep, size)
            yield from (picture for place in choose(ranks, keep, config.choice) if (picture := group[place]) is not None)
