"""The contract of a metric: a class that judges pictures on an actor, and turns its table into figures on the driver.

A metric is one file with one subclass of `Metric`; README.md in this folder says how to add one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.evaluate.metric_config import MetricConfig
from pipelines.evaluate.pictures import Pictures
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import METRIC_COLUMNS, Row, evaluations_path, evaluations_schema
from pipelines.tables.table import Table

Config = TypeVar("Config", bound=MetricConfig)


class Metric(ABC, Generic[Config]):
    """One way to judge pictures. Its module loads neither torch nor transformers when it is imported.

    `name` is that of its table `evaluations/<pictures>/<name>`, whose columns are in METRIC_COLUMNS of
    `pipelines/tables/schema.py`, and of its section in `MetricsConfig`.
    """

    name: ClassVar[str]
    more_models: ClassVar[tuple[str, ...]] = ()
    """Settings that name further models, or None; the revision of each stands under its name with `_revision`."""

    @abstractmethod
    def __init__(self, config: Config):
        """Load the models, on the actor. `config` is what `find_models` returned.

        Raises FileNotFoundError or ValueError, with one clear sentence, for a model or setting that will not do.
        """

    @classmethod
    def find_models(cls, config: Config) -> tuple[Config, dict[str, str]]:
        """Find the models, on the driver: the configuration that names these very versions, and the version of each by a name.

        The versions are part of the table's fingerprint. Raises as `find_model`.
        """
        from pipelines.workers.models import find_model

        pinned: dict[str, Any] = {}
        versions: dict[str, str] = {}
        for name in ("model", *cls.more_models):
            if (path := getattr(config, name)) is None:
                continue
            revision = "revision" if name == "model" else f"{name}_revision"
            found = find_model(path, getattr(config, revision))
            pinned |= {name: found.path, revision: found.revision}
            versions[name] = found.version
        return replace(config, **pinned), versions

    @classmethod
    def reference(cls, dataset_uri: str, config: Config) -> Pictures | None:
        """The pictures that the judged ones are compared with, if there are such: they are judged too, before `summarize`.

        Called on the driver, before anything is judged. Raises ValueError or FileNotFoundError if they are not there.
        """
        return None

    def prepare(self, row: Row) -> Any:
        """Turn a picture into what `judge` finds in `row["picture"]`: by default an RGB PIL image.

        Called in threads, while the model judges the batch before. Raises RowRefused for a picture that cannot be used.
        """
        from pipelines.workers.images import decode

        return decode(row["image_bytes"])

    @abstractmethod
    def judge(self, rows: list[Row]) -> list[Row | RowRefused]:
        """Judge a batch of at most `config.batch_size` pictures, in one call of the model.

        Args:
            rows: "id", "prompt", "metadata" (a dict: what the prompt set or the image's source says), "picture" (what `prepare`
                returned), and further columns of the pictures' table, such as "seed".

        Returns for each row, in order, the metric's own columns (floats, or numpy arrays for a column of lists), or the refusal
        of the row. A value that is not finite becomes a refusal by itself. Where memory is not enough, the batch is halved.
        """

    @classmethod
    def summarize(cls, table: Table, config: Config) -> dict[str, float]:
        """The metric's figures by name, over its finished table, in bounded memory: one shard at a time. Without torch.

        Names are unique among all metrics: they are the names in MLflow. This gives the mean of each column of numbers, under
        the column's name; empty for a table without rows.
        """
        names = cls.numbers()
        sums, count = np.zeros(len(names)), 0
        for shard in iter_shards(table, names):
            sums += [np.sum(shard[name].to_numpy(), dtype=np.float64) for name in names]
            count += shard.num_rows
        return dict(zip(names, (sums / count).tolist(), strict=True)) if count else {}

    @classmethod
    def figure_settings(cls, table: Table, config: Config) -> dict[str, Any]:
        """What `summarize` goes by besides the table, in JSON's types; it is written beside the figures. By default nothing."""
        return {}

    @classmethod
    def scores(cls, table: Table) -> Iterator[tuple[str, str, float]]:
        """Figure, prompt and value of each picture, for the figures that are means over pictures: they get intervals.

        Values are in the unit of the figure. By default as in `summarize`: each column of numbers.
        """
        for shard in iter_shards(table, ["prompt", *cls.numbers()]):
            for row in shard.to_pylist():
                yield from ((name, row["prompt"], row[name]) for name in cls.numbers())

    @classmethod
    def means_of(cls, figures: Iterable[str]) -> dict[str, list[str]]:
        """Figures that are the mean of several of those of `scores`, whose prompts are others: they get intervals too."""
        return {}

    @classmethod
    def rank(cls, row: Row) -> tuple[float, ...]:
        """How good a picture is, by its row in the table: of several, the one with the largest tuple is the best.

        By default its columns of numbers. A metric that compares sets of pictures has none: `best_of` does not take it.
        """
        return tuple(row[name] for name in cls.numbers())

    @classmethod
    def describe(cls, row: Row) -> list[str]:
        """What the metric says of a picture, by its row in the table, in lines for people. By default its numbers."""
        return [f"{name} {row[name]:.4g}" for name in cls.numbers()]

    @classmethod
    def numbers(cls) -> list[str]:
        """The names of its columns of numbers."""
        return [column.name for column in METRIC_COLUMNS[cls.name] if pa.types.is_floating(column.type)]


def metric_table(dataset_uri: str, pictures: str, metric: str) -> Table:
    """The table of a metric's judgements of the pictures of that name."""
    return Table(dataset_uri, evaluations_path(pictures, metric), evaluations_schema(metric))


def iter_shards(table: Table, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a table's shards, in the order of their names, one at a time."""
    for shard in table.list_shards():
        yield table.read_shard(shard, columns)
