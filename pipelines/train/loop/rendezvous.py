"""Torch's process group for the workers of Ray Train, whose store listens on one address of rank 0's node.

Ray Train's own, as torch makes it from an address, listens on all of them, and asks nobody for a token.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import BackendConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

_listener: socket.socket | None = None
"""Of rank 0, between `_listen` and `_join`."""


@dataclass
class OneAddressConfig(TorchConfig):
    """TorchConfig whose store listens on the address that Ray knows rank 0's node by."""

    @property
    def backend_cls(self) -> type["OneAddress"]:
        return OneAddress


class OneAddress(_TorchBackend):
    """Ray Train's torch backend, but for the store."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        """Join all workers into torch's default process group: nccl if they have GPUs, gloo otherwise."""
        assert isinstance(backend_config, TorchConfig)
        has_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        backend = backend_config.backend or ("nccl" if has_gpus else "gloo")
        address, port = worker_group.execute_single(0, _listen)
        worker_group.execute(_set_torch_distributed_env_vars)
        size, seconds = len(worker_group), backend_config.timeout_s
        joins: list[Any] = [
            worker_group.execute_single_async(rank, _join, backend, rank, size, address, port, seconds) for rank in range(size)
        ]
        ray.get(joins)


def _listen() -> tuple[str, int]:
    """Open the port of the store on rank 0."""
    global _listener
    address = ray.util.get_node_ip_address()
    _listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=2048)
    return address, _listener.getsockname()[1]


def _join(backend: str, rank: int, size: int, address: str, port: int, seconds: int) -> None:
    """Make this worker a member of the process group."""
    global _listener
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    file = _listener.detach() if rank == 0 and _listener is not None else None
    _listener = None
    timeout = timedelta(seconds=seconds)
    store = dist.TCPStore(
        address, port, size, rank == 0, timeout, wait_for_workers=False, multi_tenant=True, master_listen_fd=file
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
