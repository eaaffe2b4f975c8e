"""Configuration that every training shares, whatever it trains."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.train.engine.config import EmaConfig, EngineConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """Resources that Ray reserves for each training worker.

    Args:
        num_cpus: CPUs of a worker.
        num_gpus: GPUs of a worker; without one it trains on the CPU.
        custom: custom Ray resources of a worker, such as {"trainer": 1}.
        num_threads: torch's threads in a worker; None: num_cpus, rounded up.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    custom: dict[str, float] = field(default_factory=dict)
    num_threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class BadStepConfig:
    """Policy for bad steps, whose gradients are not finite or whose loss is many times the usual loss.

    Args:
        policy: "stop" ends the training with a message; "skip" leaves weights, optimizer and average as they are and continues
            with the next samples; "roll_back" returns to those of the last checkpoint and continues with the next samples.
        spike_factor: a step is bad if its loss is more than this many times the median of the last 50 steps; None: only steps
            whose gradients are not finite are bad.
        max_in_a_row: the training ends, whatever the policy, after this many bad steps in a row.
    """

    policy: Literal["stop", "skip", "roll_back"] = "stop"
    spike_factor: float | None = None
    max_in_a_row: int = 10

    def __post_init__(self) -> None:
        if self.spike_factor is not None and self.spike_factor <= 1:
            raise ValueError(f"spike_factor={self.spike_factor} must be above 1")
        if self.max_in_a_row < 1:
            raise ValueError(f"max_in_a_row={self.max_in_a_row} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The loop of a training: its steps, its workers, its checkpoints.

    Args:
        num_steps: optimizer steps.
        micro_batch_size: samples of one worker's forward pass.
        global_batch_size: samples of one step; a multiple of micro_batch_size * num_workers.
        num_workers: workers that train together, each on its own shards.
        optim: optimizer and learning rate.
        ema: the moving average of the weights.
        engine: how DeepSpeed distributes and computes the training.
        bad_steps: what to do if gradients are not finite or the loss leaps.
        resources: resources of each worker.
        checkpoint_every: steps between two checkpoints; the last step makes one too.
        keep_checkpoints: how many of the newest checkpoints are kept.
        keep_every: checkpoints whose step is a multiple of this are kept too.
        keep_best: the checkpoint with the lowest value of this metric is kept too.
        resume_from: URI of another training's checkpoint to continue exactly, as long as this training has none of its own.
        record_samples: write down which samples each step used, in `drawn/` of the output folder.
        log_every: steps between two reports of losses and speed.
        max_failures: how often lost workers are replaced, from the last checkpoint, before the training fails.
        seed: seed of everything that is drawn by chance: the order of samples and all else that the training says.
    """

    # May change while a training goes on: no weight changes beyond rounding.
    NO_VALUE: ClassVar[tuple[str, ...]] = (
        *("num_workers", "micro_batch_size", "resources", "max_failures", "log_every", "record_samples"),
        *("checkpoint_every", "keep_checkpoints", "keep_every", "keep_best"),
    )

    num_steps: int
    micro_batch_size: int
    global_batch_size: int
    num_workers: int = 1
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    bad_steps: BadStepConfig = field(default_factory=BadStepConfig)
    resources: WorkerResources = field(default_factory=WorkerResources)
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int | None = None
    keep_best: Literal["loss", "validation_loss"] | None = None
    resume_from: str | None = None
    record_samples: bool = False
    log_every: int = 10
    max_failures: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        self.optim.check_sharding(self.engine.zero_stage)
        for name in ("num_steps", "micro_batch_size", "num_workers", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every={self.keep_every} must be at least 1")
        together = self.micro_batch_size * self.num_workers
        if self.global_batch_size < 1 or self.global_batch_size % together:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} must be a multiple of micro_batch_size * num_workers = {together}"
            )

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of each worker in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_workers)
