"""What the driver of a training hands to its workers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.tracking.runs import RunPlan
from pipelines.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What the driver hands to the workers.

    inputs: name and fingerprint of the tables. output_uri: folder on any fsspec file system. plan: the MLflow run; None: none.
    desk: handle of the actor that links workers and driver; None: nobody listens.
    """

    config: TrainConfig
    dataset_uri: str
    inputs: Mapping[str, str]
    output_uri: str
    plan: RunPlan | None = None
    desk: Any = None
