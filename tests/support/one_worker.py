"""Make this process a process group of one, for tests of DeepSpeed."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def one_worker() -> Iterator[None]:
    """Set up a world of one, over gloo. It stays until the process ends, since DeepSpeed remembers its first world."""
    with socket.socket() as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
        for name, value in place.items():
            patch.setenv(name, str(value))
        patch.delenv("DS_ACCELERATOR", raising=False)
        free.close()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        yield
