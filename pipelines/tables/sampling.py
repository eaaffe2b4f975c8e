"""Read a bounded part of a table, for reports and audits: a limited number of shards, however large the table."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.tables.schema import Row
from pipelines.tables.table import Table


@dataclass(frozen=True, kw_only=True)
class ReportScope:
    """How much of a table a report reads and shows.

    Args:
        num_images: pictures on a page.
        num_rejects: refused rows on a page, taken from every reason in turn.
        max_shards: the most shards that counts and histograms are computed over.
        picture_shards: shards that the pictures come from; these are read whole.
    """

    num_images: int = 24
    num_rejects: int = 24
    max_shards: int = 256
    picture_shards: int = 4


DEFAULT_SCOPE = ReportScope()


@dataclass(frozen=True)
class LightRows:
    """Some columns of (a part of) a table's shards."""

    rows: pa.Table
    num_shards: int
    total_shards: int

    @property
    def scope(self) -> str:
        """A sentence for people that says how much was read."""
        if self.num_shards == self.total_shards:
            return f"All {self.rows.num_rows:,} rows of {self.total_shards:,} shard{'s' * (self.total_shards != 1)} were read"
        return f"{self.rows.num_rows:,} rows were read: {self.num_shards:,} of {self.total_shards:,} shards, spread evenly"


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of range(count), evenly spaced."""
    return sorted({int(index) for index in np.linspace(0, count - 1, min(count, limit)).round()}) if count and limit else []


def read_light(table: Table, columns: list[str], config: ReportScope) -> LightRows:
    """Columns of all shards, or of `config.max_shards` of them."""
    shards = table.list_shards()
    chosen = [shards[index] for index in spread(len(shards), config.max_shards)]
    empty = pa.Table.from_pylist([], table.schema).select(columns)
    parts = [table.read_shard(shard, columns).cast(empty.schema) for shard in chosen]
    return LightRows(pa.concat_tables([empty, *parts]), len(chosen), len(shards))


def sample_rows(table: Table, config: ReportScope) -> list[tuple[str, Row]]:
    """`config.num_images` rows with their shards, evenly from `config.picture_shards` shards."""
    shards = table.list_shards()
    chosen = [shards[index] for index in spread(len(shards), config.picture_shards)]
    rows: list[tuple[str, Row]] = []
    for index, shard in enumerate(chosen):
        content = table.read_shard(shard)
        share = -(-(config.num_images - len(rows)) // (len(chosen) - index))
        rows += [(shard, row) for row in content.take(pa.array(spread(content.num_rows, share), pa.int64())).to_pylist()]
    return rows
