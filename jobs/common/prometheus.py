"""Progress of jobs for Prometheus. Ray exports these metrics from the driver's node, with `ray_` before their names.

A counter's exported name ends in `_total`. Every series has the tag `dataset`, those of a stage also `stage` ("caption llava").
"""

import time
from collections import Counter

from ray.util.metrics import Counter as PrometheusCounter
from ray.util.metrics import Gauge

from pipelines.stages.contract import Progress
from sana_model.files.redact import redact


class StageMetrics:
    """Rows, rejects, shards and speed of one stage. Rows and rejects of earlier runs are not counted again."""

    def __init__(self, dataset_uri: str, stage: str):
        tags = {"dataset": redact(dataset_uri), "stage": stage}
        keys = tuple(tags)
        self._rows = PrometheusCounter("sana_stage_rows", "Output rows of the stage", keys).set_default_tags(tags)
        self._rejects = PrometheusCounter(
            "sana_stage_rejects", "Rows that the stage refused", (*keys, "reason")
        ).set_default_tags(tags)
        self._shards = Gauge("sana_stage_shards", "Shards, done and missing", (*keys, "state")).set_default_tags(tags)
        self._speed = Gauge("sana_stage_rows_per_second", "Rows in and out of this run", keys).set_default_tags(tags)
        self._counted_rows: int | None = None
        self._counted_rejects: Counter[str] = Counter()

    def update(self, progress: Progress) -> None:
        """Count what is new since the last call. The first call must come before the run has made anything."""
        if self._counted_rows is not None:
            if new_rows := progress.num_rows - self._counted_rows:
                self._rows.inc(new_rows)
            for reason, count in (progress.rejects_by_reason - self._counted_rejects).items():
                self._rejects.inc(count, {"reason": reason})
        self._counted_rows, self._counted_rejects = progress.num_rows, progress.rejects_by_reason.copy()
        self._shards.set(progress.done_shards, {"state": "done"})
        self._shards.set(progress.num_shards - progress.done_shards, {"state": "missing"})
        self._speed.set(progress.rows_per_second)


class TrainMetrics:
    """Loss, speed and waiting of a training, and the times of its last report and checkpoint."""

    def __init__(self, dataset_uri: str):
        self._tags = {"dataset": redact(dataset_uri)}
        self._step = self._gauge("step", "Optimizer steps that are done")
        self._num_steps = self._gauge("num_steps", "Optimizer steps of the whole training")
        self._loss = self._gauge("loss", "Mean loss since the last report")
        self._speed = self._gauge("images_per_second", "Training samples a second, all workers")
        self._data_wait = self._gauge("data_wait_share", "Of the time, in which workers waited for samples")
        self._progress_time = self._gauge("progress_timestamp_seconds", "When the training last reported")
        self._checkpoint_time = self._gauge("checkpoint_timestamp_seconds", "Of the last checkpoint, or of the start")

    def _gauge(self, name: str, description: str) -> Gauge:
        gauge = Gauge(f"sana_train_{name}", description, tuple(self._tags))
        gauge.set_default_tags(self._tags)
        return gauge

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
        self._step.set(step)
        self._num_steps.set(num_steps)
        self._loss.set(loss)
        self._speed.set(samples_per_second)
        self._data_wait.set(data_wait_share)
        self._progress_time.set(time.time())
        self._checkpoint_time.set(checkpoint_time)
