"""Run the training's own workers in plain processes over gloo, without Ray: many trainings in seconds."""

import multiprocessing
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from pipelines.tables.errors import TrainingError
from pipelines.tracking.config import TrackingConfig
from pipelines.tracking.runs import RunRequest
from pipelines.train.config import TrainConfig
from pipelines.train.engine.config import EngineConfig, OptimConfig
from pipelines.train.loop.config import LoopConfig
from pipelines.train.loop.task import TrainTask
from pipelines.train.worker import TrainWorker
from pipelines.train_autoencoder.config import TrainAutoencoderConfig
from pipelines.train_autoencoder.worker import AutoencoderWorker
from tests.support.training_world import PATH, STREAM

BUCKETS = ("64x64", "64x64", "32x128")


def tiny_config(init: str) -> TrainConfig:
    """Configure one worker with steps of 4 samples, each of which is reported."""
    return TrainConfig(
        latents=PATH,
        init=init,
        num_steps=10,
        micro_batch_size=2,
        global_batch_size=4,
        data=STREAM,
        engine=EngineConfig(zero_stage=1, dtype="fp32"),
        optim=OptimConfig(lr=1e-3),
        log_every=1,
    )


@dataclass(frozen=True)
class Trained:
    """The result of a training on rank 0: losses by step, error, last metrics, and share of time spent waiting for data."""

    losses: dict[int, float]
    error: str | None
    metrics: dict[str, float]
    num_bad: int
    wait_share: float


def train_on_ranks(
    folder: Path,
    dataset: Path,
    configs: Sequence[tuple[str, LoopConfig]],
    *,
    output_root: str | None = None,
    tracking: TrackingConfig | None = None,
) -> dict[str, Trained]:
    """Train each (name, config) in `output_root/name`, one after another; all have the same number of workers.

    Args:
        output_root: the folder itself unless given.
        tracking: where each has an MLflow run of its name and with it as its key; None: nowhere.
    """
    (num_workers,) = {config.num_workers for _, config in configs}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(num_workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **place, "DS_ACCELERATOR": "cpu"}
    multiprocessing.set_forkserver_preload([__name__, "deepspeed"])  # imported once, for all trainings of a test run
    arguments = (environment, folder, dataset, configs, output_root or str(folder), tracking)
    torch.multiprocessing.start_processes(_run_rank, arguments, nprocs=num_workers, start_method="forkserver")
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name, _ in configs}


def _run_rank(
    rank: int,
    environment: dict[str, str],
    folder: Path,
    dataset: Path,
    configs: Sequence[tuple[str, LoopConfig]],
    output_root: str,
    tracking: TrackingConfig | None,
) -> None:
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.distributed.init_process_group("gloo")
    for name, config in configs:
        run_request = (
            RunRequest.make(name, {}, tracking=tracking, output_dir=folder, key=name) if tracking is not None else None
        )
        task = TrainTask(
            config=config, dataset_uri=str(dataset), inputs={}, output_uri=f"{output_root}/{name}", run_request=run_request
        )
        trained = _train(task)
        if rank == 0:
            torch.save(trained, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


def _train(task: TrainTask[Any]) -> Trained:
    worker_class: Any = AutoencoderWorker if isinstance(task.config, TrainAutoencoderConfig) else TrainWorker
    try:
        worker = worker_class(task, device=torch.device("cpu"))
        worker.restore()
    except TrainingError as raised:
        return Trained({}, str(raised), {}, 0, 0.0)
    error = None
    try:
        worker.train()
        worker.finish()
    except TrainingError as raised:
        error = str(raised)
    worker.outputs.close()
    wait_share = worker.stream.wait_seconds / max(worker.meter.seconds, 1e-9)
    return Trained(dict(worker.history.points), error, worker.metrics, worker.guard.num_bad, wait_share)
