"""The store of torch's workers asks nobody for a token, so it listens on one address of one node."""

import os

import psutil
import pytest
import torch
import torch.distributed as dist

from pipelines.train.loop import rendezvous
from tests.support.sockets import listening


def test_the_store_listens_on_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that they are put back
    address, port = rendezvous._listen()
    try:
        rendezvous._join("gloo", 0, 1, address, port, seconds=60)
        assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (address, str(port))
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == 1.0
        assert [where for where, opened, _ in listening([psutil.Process()]) if opened == port] == [address]
    finally:
        dist.destroy_process_group()
