"""The types of a stage: resources, worker, the output of a shard, progress and result. See pipelines/README.md."""

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
        num_actors: actors that run in parallel, each with its own model.
        num_cpus: logical CPUs of each actor; a fraction lets actors share one.
        num_gpus: GPUs of each actor; a fraction lets actors share one.
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
    A figure whose name begins with "num_" is a count: the manifest has its sum, under the same name.
    """

    rows: list[Row] | pa.Table
    rejects: list[Row]
    figures: Mapping[str, float] = MappingProxyType({})

    def tables(self, schema: pa.Schema) -> tuple[pa.Table, pa.Table]:
        """Rows and rejects as Arrow tables."""
        rows = self.rows if isinstance(self.rows, pa.Table) else pa.Table.from_pylist(self.rows, schema)
        return rows, pa.Table.from_pylist(self.rejects, REJECTS)


class ShardWorker(Protocol):
    """The inside of a stage's actor: loads its model once, then turns one shard after another into output rows and rejects."""

    def process(self, table: pa.Table) -> ShardOutput: ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A shard that was written, or that failed with `error`.

    `stops` is a key of STOPS if every other shard would fail in the same way, else empty.
    """

    shard: str
    num_rows: int
    rejects_by_reason: dict[str, int]
    figures: dict[str, float]
    error: str | None
    stops: str


@dataclass
class Progress:
    """Progress of a stage. Rows are output rows, including those of shards that existed before."""

    num_shards: int
    done_shards: int
    found_shards: int
    num_rows: int = 0
    num_rejects: int = 0
    rejects_by_reason: Counter[str] = field(default_factory=Counter)
    figures: dict[str, list[float]] = field(default_factory=dict)  # by name, one value per shard
    new_rows: int = 0  # rows and rejects made by this run
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
    """Result of a stage: `found_shards` of `num_shards` existed before. `inputs`: fingerprints of the input tables."""

    table: Table
    fingerprint: str
    inputs: dict[str, str]
    num_shards: int
    found_shards: int
    num_rows: int
    num_rejects: int
    rejects_by_reason: dict[str, int]
    figures: dict[str, float]
    """"<figure>.mean" and "<figure>.min" over the shards, and the sums of counts."""
    seconds: float
    rows_per_second: float

    @property
    def was_done(self) -> bool:
        return self.found_shards == self.num_shards
