"""`python -m jobs.plan --images 100_000_000`: what a dataset of that size takes: GPU hours, storage, objects, memory, dollars.

Arithmetic on the rates of `configs/plan.yaml`; each rate says where it comes from. It starts no Ray and reads no dataset.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jobs.common.job import parse_command
from jobs.common.text_table import format_table

RATES = Path(__file__).parent / "configs/plan.yaml"
MIB = 2**20
OBJECTS_PER_LISTING = 1000
"""Names that S3 returns in one LIST request."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A figure and where it comes from.

    Args:
        value: the figure; the name of the setting says the unit.
        source: "measured" and how, "published" and where, or "assumed" and why; it is printed with what depends on it.
    """

    value: float
    source: str

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise ValueError(f"a rate of {self.value} ({self.source}) must be positive")
        if self.source.split(",")[0] not in ("measured", "published", "assumed"):
            raise ValueError(f"source={self.source!r} must begin with measured, published or assumed, and a comma")


@dataclass(frozen=True, kw_only=True)
class StageRates:
    """Rates of one stage.

    Args:
        images_per_second: of one accelerator, or of one CPU core where `accelerator` is "CPU core".
        accelerator: what one unit of it is.
        dollars_per_hour: price of one unit.
        times: how often the stage passes over the images.
    """

    images_per_second: Rate
    accelerator: str
    dollars_per_hour: Rate
    times: int = 1


@dataclass(frozen=True, kw_only=True)
class TableRates:
    """Rates of one kind of table.

    Args:
        bytes_per_row: size of a row in its Parquet files.
        times: how many tables of this kind there are.
    """

    bytes_per_row: Rate
    times: int = 1


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Configuration of an estimate.

    Args:
        images: number of raw images; underscores are allowed, as in 100_000_000.
        rows_per_shard: rows in a shard of every table.
        train_steps: optimizer steps of the training.
        global_batch_size: samples of one training step.
        keep_share: share of the images that no stage refuses.
        days: days within which each stage must end; this decides the number of accelerators.
        stages: rates by name, in their order. The training's images are the samples of its steps.
        tables: rates by name.
        driver_bytes_per_shard: the driver's memory for each shard of the running stage.
        dollars_per_gb_month: price of storage.
        dollars_per_1000_lists: price of LIST requests.
        dollars_per_1000_puts: price of PUT requests.
    """

    images: int
    rows_per_shard: int = 1000
    train_steps: int
    global_batch_size: int
    keep_share: Rate
    days: float = 7.0
    stages: dict[str, StageRates]
    tables: dict[str, TableRates]
    driver_bytes_per_shard: Rate
    dollars_per_gb_month: Rate
    dollars_per_1000_lists: Rate
    dollars_per_1000_puts: Rate

    def __post_init__(self) -> None:
        for name in ("images", "rows_per_shard", "train_steps", "global_batch_size", "days"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


@dataclass(frozen=True)
class StagePlan:
    """`hours` on a single accelerator; `count` accelerators finish within the configured days."""

    images: int
    hours: float
    count: int
    dollars: float
    rates: StageRates


@dataclass(frozen=True)
class TablePlan:
    """Bytes of all tables of one kind, and of one shard."""

    total_bytes: float
    shard_bytes: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimate. `listing_requests` list the shards of one table once."""

    stages: Mapping[str, StagePlan] = field(default_factory=dict)
    tables: Mapping[str, TablePlan] = field(default_factory=dict)
    shards: int
    objects: int
    listing_requests: int
    listing_dollars: float
    put_dollars: float
    storage_dollars_per_month: float
    driver_bytes: float

    @property
    def dollars(self) -> float:
        """Price of running all stages once; storage is paid by the month on top."""
        return sum(stage.dollars for stage in self.stages.values()) + self.put_dollars


def make_plan(config: PlanConfig) -> Plan:
    """Compute the estimate. Every table, and the rejects of each, has one object for each shard of `images`."""
    shards = math.ceil(config.images / config.rows_per_shard)
    kept = config.images * config.keep_share.value
    tables: dict[str, TablePlan] = {}
    for name, rates in config.tables.items():
        rows = config.images if name == "images" else kept
        size = rows * rates.bytes_per_row.value
        tables[name] = TablePlan(size * rates.times, size / shards)
    num_tables = sum(rates.times for rates in config.tables.values())
    objects = 2 * num_tables * shards
    requests = math.ceil(shards / OBJECTS_PER_LISTING)
    total = sum(table.total_bytes for table in tables.values())
    return Plan(
        stages={name: _plan_stage(name, rates, config, kept) for name, rates in config.stages.items()},
        tables=tables,
        shards=shards,
        objects=objects,
        listing_requests=requests,
        listing_dollars=requests / 1000 * config.dollars_per_1000_lists.value,
        put_dollars=objects / 1000 * config.dollars_per_1000_puts.value,
        storage_dollars_per_month=total / 1e9 * config.dollars_per_gb_month.value,
        driver_bytes=shards * config.driver_bytes_per_shard.value,
    )


def _plan_stage(name: str, rates: StageRates, config: PlanConfig, kept: float) -> StagePlan:
    if name == "train":
        images = config.train_steps * config.global_batch_size
    else:
        images = round((config.images if name == "ingest" else kept) * rates.times)
    hours = images / rates.images_per_second.value / 3600
    count = math.ceil(hours / (24 * config.days))
    return StagePlan(images, hours, count, hours * rates.dollars_per_hour.value, rates)


def print_plan(config: PlanConfig, plan: Plan) -> None:
    """Print the tables, and below them the source of every rate."""
    rows = [
        [name, f"{stage.images:,}", stage.rates.accelerator, f"{stage.hours:,.0f}", f"{stage.count:,}", f"{stage.dollars:,.0f}"]
        for name, stage in plan.stages.items()
    ]
    print(f"{config.images:,} images, every stage within {config.days:g} days\n")
    print(format_table(["stage", "images", "on", "hours of one", "at once", "dollars"], rows))
    print(f"\n  all stages {plan.dollars:,.0f} dollars, {plan.put_dollars:,.0f} of them for PUT requests\n")
    sizes = [
        [name, f"{table.total_bytes / 1e9:,.1f}", f"{table.shard_bytes / MIB:,.1f}", str(config.tables[name].times)]
        for name, table in plan.tables.items()
    ]
    print(format_table(["table", "GB", "MiB a shard", "tables"], sizes))
    print(f"\n  storage          {plan.storage_dollars_per_month:,.0f} dollars a month")
    print(f"  shards           {plan.shards:,} in every table, {plan.objects:,} objects in all")
    print(f"  one listing      {plan.listing_requests:,} requests, {plan.listing_dollars:.4f} dollars")
    print(f"  driver's memory  {plan.driver_bytes / MIB:,.0f} MiB for the shards of a stage\n")
    for place, rate in rates_of(config).items():
        print(f"  {place} = {rate.value:g}: {rate.source}")


def rates_of(config: PlanConfig) -> dict[str, Rate]:
    """Every rate by its dotted name in the configuration."""
    found = {name: value for name, value in vars(config).items() if isinstance(value, Rate)}
    for part in ("stages", "tables"):
        for name, rates in getattr(config, part).items():
            found |= {f"{part}.{name}.{key}": value for key, value in vars(rates).items() if isinstance(value, Rate)}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.split("=")[0] == "--config" for argument in arguments):
        arguments = ["--config", str(RATES), *arguments]
    config = parse_command(PlanConfig, arguments, name="plan")
    print_plan(config, make_plan(config))
    return 0


if __name__ == "__main__":
    sys.exit(main())
