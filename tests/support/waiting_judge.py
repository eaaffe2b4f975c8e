"""A judge of checkpoints that ends when a test says so, and two that fail; without any model."""

import os
import time
from pathlib import Path

from pipelines.train.config import TrainConfig
from pipelines.train.engine.judgements import Judgement

PATIENCE = 120.0  # seconds


def judge_when_told(folder: str, scores: dict[int, float], config: TrainConfig, step: int, uri: str) -> Judgement:
    """Leave a file `began-<step>` in the folder, wait for `go`, and return the step's score."""
    Path(folder, f"began-{step}").touch()
    deadline = time.monotonic() + PATIENCE
    while not Path(folder, "go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return Judgement(step=step, figures={"score": scores[step]}, seconds={"pictures": 1.0})


def judge_badly(config: TrainConfig, step: int, uri: str) -> Judgement:
    """Raise at step 1, die at others."""
    if step == 1:
        raise KeyError("a bug")
    os._exit(1)
