"""Configuration of judging the checkpoints of a training by their pictures, beside the training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.draw.config import DrawConfig
from pipelines.evaluate.config import MetricsConfig
from pipelines.evaluate.registry import METRICS
from pipelines.stages.contract import Resources
from pipelines.train.engine.judgements import BestConfig
from pipelines.train.loop.config import WorkerResources


@dataclass(frozen=True, kw_only=True)
class CheckpointMetricsConfig(MetricsConfig):
    """How good a training's pictures are, every n steps: a Ray task beside it draws prompts with a checkpoint and judges them.

    The steps never wait for it: while one runs, the next checkpoint is skipped, and told. A metric that fails is told and stops
    neither the others nor the training.

    Args:
        metrics: names of the metrics, as of `jobs.evaluate`; each has its settings in the section of its name. All run in the
            one task, whatever the `resources` of `jobs.evaluate` are for.
        every: steps between two checkpoints that are judged; the last step's is judged too. Each makes a checkpoint, whatever
            train.checkpoint_every says.
        prompts: as of `jobs.sample`: a list, a file, or a published set such as geneval.
        num_prompts: that are drawn, spread evenly over `prompts`; None: all.
        images_per_prompt: pictures of each prompt, always from the same seeds.
        draw: how the average weights draw.
        resources: what Ray reserves for the task, beside the training's workers.
        best: which checkpoint counts as the best: it is kept, addressed as checkpoints/best, and its pipeline is written to
            best/ at the end. None: none is chosen.
        wait_seconds: when the training has ended, the longest wait for judgements that still run.
    """

    metrics: tuple[str, ...] = ("clip_score",)
    every: int = 1000
    prompts: list[str] | str
    num_prompts: int | None = 64
    images_per_prompt: int = 1
    draw: DrawConfig = field(default_factory=DrawConfig)
    resources: WorkerResources = field(default_factory=WorkerResources)
    best: BestConfig | None = None
    wait_seconds: float = 3600.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics:
            raise ValueError(f"metrics=[] names none: give some of {', '.join(METRICS)}, or leave `validation` out")
        for name in ("every", "images_per_prompt", "num_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not (self.wait_seconds >= 0 and math.isfinite(self.wait_seconds)):
            raise ValueError(f"wait_seconds={self.wait_seconds} must be a number from 0")
        given = {"draw": self.draw.resources, **{name: metric.resources for name, metric in self.chosen.items()}}
        for name, resources in given.items():
            if resources != Resources():
                raise ValueError(f"{name}.resources: one task draws and judges everything: give validation.resources instead")

    @property
    def not_reserved(self) -> Sequence[str]:
        """Sections whose resources are never reserved: all run in the one task."""
        return ["draw", *METRICS]
