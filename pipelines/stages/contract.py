"""What a stage gives and gets: its resources, its worker, a shard's output, progress and result. See pipelines/README.md."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

import pyarrow as pa

from pipelines.tables.schema import REJECTS, Row
from pipelines.tables.table import Table

ReadShard = Callable[[str], pa.Table]
OnProgress = Callable[["Progress"], None]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What Ray reserves for a stage's actors.

    Args:
        num_actors: how many work side by side, each with a model of its own.
        num_cpus, num_gpus: of each; fractions share a device.
        custom: custom resources of each, such as {"L40S": 1}.
    """

    num_actors: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    custom: dict[str, float] = field(default_factory=dict)


class ShardOutput(NamedTuple):
    """What a worker makes of a shard.

    `rows` have the output table's schema; `rejects` are made by `pipelines.tables.rejects.reject`. `figures` are facts about
    the shard, such as a PSNR: the shard's file keeps them in its footer, the manifest their mean and minimum over all shards.
    """

    rows: list[Row] | pa.Table
    rejects: list[Row]
    figures: Mapping[str, float] = MappingProxyType({})

    def tables(self, schema: pa.Schema) -> tuple[pa.Table, pa.Table]:
        """Rows and rejects."""
        rows = self.rows if isinstance(self.rows, pa.Table) else pa.Table.from_pylist(self.rows, schema)
        return rows, pa.Table.from_pylist(self.rejects, REJECTS)


class ShardWorker(Protocol):
    """A stage's actor: loads its model once, then turns the rows of one shard after another into output rows and rejects."""

    def process(self, table: pa.Table) -> ShardOutput: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A shard that is written, or that failed: then `error` says why.

    `stops` is not empty if every other shard would fail likewise: a key of STOPS.
    """

    shard: str
    num_rows: int
    rejects_by_reason: dict[str, int]
    figures: dict[str, float]
    error: str | None
    stops: str


@dataclass
class Progress:
    """How far a stage is. Rows are output rows; those of shards that were there before count as well."""

    num_shards: int
    done_shards: int
    found_shards: int
    num_rows: int = 0
    num_rejects: int = 0
    rejects_by_reason: Counter[str] = field(default_factory=Counter)
    figures: dict[str, list[float]] = field(default_factory=dict)  # by name, a value for each shard that has it
    new_rows: int = 0  # in and out of this run, rejects included
    seconds: float = 0.0

    def add_shard(self, num_rows: int, rejects_by_reason: Mapping[str, int], figures: Mapping[str, float]) -> None:
        self.num_rows += num_rows
        self.rejects_by_reason.update(rejects_by_reason)
        self.num_rejects += sum(rejects_by_reason.values())
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    @property
    def rows_per_second(self) -> float:
        return self.new_rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage did: `found_shards` of `num_shards` were there already. `inputs`: tables read, and fingerprints."""

    table: Table
    fingerprint: str
    inputs: dict[str, str]
    num_shards: int
    found_shards: int
    num_rows: int
    num_rejects: int
    rejects_by_reason: dict[str, int]
    figures: dict[str, float]
    """"<figure>.mean" and "<figure>.min" over the shards."""
    seconds: float
    rows_per_second: float

    @property
    def was_done(self) -> bool:
        return self.found_shards == self.num_shards
