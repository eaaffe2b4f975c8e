"""The training's own workers in plain processes over gloo, without Ray: many trainings in seconds."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing

from pipelines.schema import LATENTS
from pipelines.tables import Table
from pipelines.train_config import TrainConfig, TrainingError, TrainTask
from pipelines.train_worker import TrainWorker


@dataclass(frozen=True)
class Trained:
    """What a training gave on rank 0: its losses by step, its error, and its last metrics."""

    losses: dict[int, float]
    error: str | None
    metrics: dict[str, float]
    num_bad: int


def train_on_ranks(folder: Path, dataset: Path, configs: Sequence[tuple[str, TrainConfig]]) -> dict[str, Trained]:
    """Train each (name, config) in `folder/name`, one after the other; all of one number of workers."""
    (num_workers,) = {config.num_workers for _, config in configs}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_run_rank, (num_workers, port, folder, dataset, configs), nprocs=num_workers)
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name, _ in configs}


def _run_rank(
    rank: int, world_size: int, port: int, folder: Path, dataset: Path, configs: Sequence[tuple[str, TrainConfig]]
) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.distributed.init_process_group("gloo")
    for name, config in configs:
        table = Table(str(dataset), config.latents, LATENTS)
        task = TrainTask(config=config, table=table, inputs={}, output_uri=str(folder / name))
        worker, error = TrainWorker(task, device=torch.device("cpu")), None
        try:
            worker.restore()
            worker.train()
            worker.finish()
        except TrainingError as raised:
            error = str(raised)
        if rank == 0:
            trained = Trained(dict(worker.history.points), error, worker.metrics, worker.guard.num_bad)
            torch.save(trained, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()
