"""Progress of running jobs for Prometheus. Ray exports these metrics from the driver's node, with `ray_` before their names.

Every series has the tag `dataset`; those of a stage also `stage` ("caption llava"), those of a training `training`, its name.

Only gauges are used, also for what is counted: a counter of Ray cannot start at 0, so Prometheus' `increase` would miss
its first value, and Ray exports a counter for as long as the node lives, long after its job.
"""

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

from ray.util.metrics import Gauge

from pipelines.stages.contract import Progress
from sana_model.files.redact import redact

PROGRESS = "progress_timestamp_seconds"
"""The gauge that every stage and training has: seconds since 1970."""
SET_EVERY = 5.0
"""Seconds. Ray exports a gauge only if it was set within the report interval, which is 10 s by default."""


class LiveGauges:
    """Gauges that Prometheus sees from `__enter__` to `__exit__` (and up to half a minute longer), however rarely they change.

    Ray stops exporting a gauge that nobody sets, so a thread sets each to its last value every SET_EVERY seconds.

    Args:
        prefix: of the names.
        descriptions: of the gauges, by name.
        tags: of every gauge.
        further_tags: names of the tags that a gauge has besides, by the name of the gauge.
    """

    def __init__(
        self,
        prefix: str,
        descriptions: Mapping[str, str],
        tags: Mapping[str, str],
        further_tags: Mapping[str, str] | None = None,
    ):
        self._gauges: dict[str, Gauge] = {}
        for name, description in {**descriptions, PROGRESS: "When it last made progress, or started"}.items():
            further = (further_tags or {}).get(name)
            self._gauges[name] = Gauge(f"{prefix}_{name}", description, (*tags, *([further] if further else [])))
            self._gauges[name].set_default_tags(dict(tags))
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name=f"{prefix}-gauges", daemon=True)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Give a gauge a value, which it has until the next call."""
        self._values[name, tuple(tags.items())] = value
        self._gauges[name].set(value, tags)

    def progressed(self) -> None:
        """Note that there is progress now."""
        self.set(PROGRESS, time.time())

    def _keep_alive(self) -> None:
        while not self._ended.wait(SET_EVERY):
            for (name, tags), value in list(self._values.items()):
                self._gauges[name].set(value, dict(tags))

    def __enter__(self) -> Self:
        self.progressed()
        self._thread.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._ended.set()
        self._thread.join()


class StageMetrics(LiveGauges):
    """Rows, rejects, shards and speed of one stage, and when it last wrote a shard. Rows of earlier runs are not counted."""

    def __init__(self, dataset_uri: str, stage: str):
        descriptions = {
            "rows": "Rows that this run has written and refused",
            "rejects": "Rows that this run has refused, by reason",
            "shards": "Shards, done and missing",
            "rows_per_second": "Rows in and out of this run",
        }
        further_tags = {"rows": "state", "rejects": "reason", "shards": "state"}
        super().__init__("sana_stage", descriptions, {"dataset": redact(dataset_uri), "stage": stage}, further_tags)
        self._found_rows: int | None = None
        self._found_rejects: Counter[str] = Counter()

    def update(self, progress: Progress) -> None:
        """Show the progress. The first call must come before the run has made anything."""
        if self._found_rows is None:
            self._found_rows, self._found_rejects = progress.num_rows, progress.rejects_by_reason.copy()
        new_rejects = progress.rejects_by_reason - self._found_rejects
        self.set("rows", progress.num_rows - self._found_rows, state="written")
        self.set("rows", new_rejects.total(), state="refused")
        for reason, count in new_rejects.items():
            self.set("rejects", count, reason=reason)
        self.set("shards", progress.done_shards, state="done")
        self.set("shards", progress.num_shards - progress.done_shards, state="missing")
        self.set("rows_per_second", progress.rows_per_second)
        self.progressed()


class TrainMetrics(LiveGauges):
    """Loss, speed and waiting of a training, and the times of its last report and checkpoint."""

    def __init__(self, dataset_uri: str, training: str):
        descriptions = {
            "step": "Optimizer steps that are done",
            "num_steps": "Optimizer steps of the whole training",
            "loss": "Mean loss since the last report",
            "images_per_second": "Training samples a second, all workers",
            "data_wait_share": "Of the time, in which workers waited for samples",
            "checkpoint_timestamp_seconds": "Of the last checkpoint, or of the start",
        }
        super().__init__("sana_train", descriptions, {"dataset": redact(dataset_uri), "training": training})

    def update(
        self,
        *,
        step: int,
        num_steps: int,
        loss: float,
        samples_per_second: float,
        data_wait_share: float,
        checkpoint_time: float,
    ) -> None:
        """Set the gauges; the figures are those of `pipelines.train.loop.desk.TrainProgress`."""
        self.set("step", step)
        self.set("num_steps", num_steps)
        self.set("loss", loss)
        self.set("images_per_second", samples_per_second)
        self.set("data_wait_share", data_wait_share)
        self.progressed()
        self.set("checkpoint_timestamp_seconds", checkpoint_time)
