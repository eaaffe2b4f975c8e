"""Models that stand in for a stage's own. An actor imports this module, and not what a job's driver needs (MLflow ...)."""

import time

import pyarrow as pa

from pipelines.stages.contract import ShardOutput


class SleepingModel:
    """A model that costs a fixed time for each row."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def process(self, table: pa.Table) -> ShardOutput:
        for _ in range(table.num_rows):
            time.sleep(self.seconds)
        return ShardOutput(table, [])


class NoModel:
    """A model that returns its input."""

    def process(self, table: pa.Table) -> ShardOutput:
        return ShardOutput(table, [])
