"""A worker of a metric whose process dies by SIGKILL when it judges a certain picture for the first time."""

import os
import signal
from pathlib import Path

from pipelines.evaluate.metric_config import MetricConfig
from pipelines.evaluate.run import MetricWorker
from pipelines.tables.rejects import RowRefused
from pipelines.tables.schema import Row


class DyingMetricWorker(MetricWorker):
    """Judges as `MetricWorker`, and dies once at each of the ids for which the folder holds no file yet: it then gets one."""

    def __init__(self, ids: tuple[str, ...], folder: str, metric: str, config: MetricConfig):
        super().__init__(metric, config)
        judge = self.metric.judge

        def judge_or_die(rows: list[Row]) -> list[Row | RowRefused]:
            for row in rows:
                died = Path(folder) / row["id"]
                if row["id"] in ids and not died.exists():
                    died.write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGKILL)
            return judge(rows)

        self.metric.judge = judge_or_die  # type: ignore[method-assign]
