"""The evaluate stage: one metric judges pictures, and writes a table of its judgements."""

import json
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.evaluate.metric import Metric, metric_table
from pipelines.evaluate.metric_config import FIGURES, FIGURES_SETTINGS, MetricConfig
from pipelines.evaluate.pictures import Pictures
from pipelines.evaluate.registry import metric_class
from pipelines.stages.contract import OnProgress, ShardOutput, StageResult
from pipelines.stages.run import run_shards
from pipelines.storage.lease import DEFAULT_LEASE, LeaseConfig, Leases
from pipelines.tables.identity import Identity, value_settings
from pipelines.tables.rejects import RowRefused, reject
from pipelines.tables.schema import Row
from pipelines.tables.table import Table
from pipelines.workers.halving import run_halving
from pipelines.workers.prepare import iter_rows, prepare_ahead


def run_metric(
    dataset_uri: str,
    pictures: Pictures,
    metric: str,
    config: MetricConfig,
    *,
    on_progress: OnProgress = lambda _: None,
    leases: Leases | None = None,
    in_process: bool = False,
) -> StageResult:
    """Judge pictures by one metric, and write the judgements to `evaluations/<pictures.name>/<metric>`.

    `in_process`: see `run_shards`. Raises what the metric's `find_models` and `run_shards` raise.
    """
    found, versions = metric_class(metric).find_models(config)
    settings = {"metric": metric, **value_settings(config), **pictures.settings}
    return run_shards(
        metric_table(dataset_uri, pictures.name, metric),
        Identity("evaluate", settings, versions, dict(pictures.inputs)),
        pictures.shards,
        read_shard=pictures.read_shard,
        make_worker=partial(MetricWorker, metric, found),
        resources=config.resources,
        max_reject_share=config.max_reject_share,
        on_progress=on_progress,
        leases=leases,
        in_process=in_process,
    )


def write_figures(table: Table, metric: str, config: MetricConfig, *, lease: LeaseConfig = DEFAULT_LEASE) -> dict[str, float]:
    """Compute a metric's figures over its finished table, write them beside it as FIGURES, and return them.

    What they depend on besides the table is written as FIGURES_SETTINGS.
    """
    kind = metric_class(metric)
    figures = kind.summarize(table, config)
    with Leases(lease) as leases:
        ticket = leases.take(table.uri).ticket
        for name, content in ((FIGURES_SETTINGS, kind.figure_settings(table, config)), (FIGURES, figures)):
            table.write_file(name, (json.dumps(content, indent=2) + "\n").encode(), ticket=ticket)
    return figures


class MetricWorker:
    """Ray Data actor: pictures with their prompts -> a metric's judgements."""

    def __init__(self, metric: str, config: MetricConfig):
        self.config = config
        self.metric: Metric[Any] = metric_class(metric)(config)

    def process(self, table: pa.Table) -> ShardOutput:
        """Make one row for each picture, or a reject. Threads prepare pictures while the model judges the batch before."""
        rows: list[Row] = []
        rejects: list[Row] = []
        size = self.config.batch_size
        ready = prepare_ahead(iter_rows(table), self.metric.prepare, num_ahead=size, num_threads=self.config.prepare_threads)
        for batch in iter(lambda: list(islice(ready, size)), []):
            usable = [as_judged(row, picture) for row, picture in batch if not isinstance(picture, RowRefused)]
            answers = iter(run_halving(self.metric.judge, usable))
            for row, picture in batch:
                answer = picture if isinstance(picture, RowRefused) else next(answers)
                if not isinstance(answer, RowRefused):
                    answer = self._refuse_not_finite(answer)
                if isinstance(answer, RowRefused):
                    rejects.append(reject(row, answer))
                else:
                    rows.append({"id": row["id"], "prompt": row["prompt"], **answer})
        return ShardOutput(rows, rejects)

    def _refuse_not_finite(self, answer: Row) -> Row | RowRefused:
        for name, value in answer.items():
            if isinstance(value, (float, np.ndarray)) and not np.isfinite(value).all():
                told = f"{self.config.model} gives a {name} that is not finite, in {self.config.dtype}"
                return RowRefused("bad_score", f"{told}: take float32, or another copy of its weights")
        return answer


def as_judged(row: Row, picture: Any) -> Row:
    """A row as `Metric.judge` takes it."""
    metadata = row.get("metadata")
    kept = {name: value for name, value in row.items() if name != "image_bytes"}
    return kept | {"metadata": json.loads(metadata) if metadata else {}, "picture": picture}
