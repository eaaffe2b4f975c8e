"""The task of a training, which the driver passes to all of its workers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pipelines.tracking.runs import RunRequest
from pipelines.train.loop.config import LoopConfig

Config = TypeVar("Config", bound=LoopConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class TrainTask(Generic[Config]):
    """A training for the workers to do.

    config: the training.
    dataset_uri: the dataset.
    inputs: name -> fingerprint of the tables that are read.
    output_uri: output folder, any fsspec URI.
    run_request: the MLflow run to log to; None: no MLflow.
    desk: handle of the desk (see `desk.py`); None: no driver listens.
    judge_every: steps between two checkpoints that the driver is asked to judge; the last step makes one too. None: it judges
        none.
    """

    config: Config
    dataset_uri: str
    inputs: Mapping[str, str]
    output_uri: str
    run_request: RunRequest | None = None
    desk: Any = None
    judge_every: int | None = None
