"""The store of torch's workers asks nobody for a token, so it listens on one address of one node."""

import json
import subprocess
import sys

import pytest

JOIN = """
import json, os
import psutil, torch
import torch.distributed as dist
from pipelines.train.loop import rendezvous
from tests.support.sockets import listening

address, port = rendezvous._listen()
rendezvous._join("gloo", 0, 1, address, port, seconds=60)
total = torch.ones(1)
dist.all_reduce(total)
where = [where for where, opened, _ in listening([psutil.Process()]) if opened == port]
told = [os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])]
print(json.dumps({"total": total.item(), "known": told == [address, port], "where": where, "address": address}))
dist.destroy_process_group()
"""


def test_the_store_listens_on_one_address() -> None:
    """In a process of its own: that of the tests may be a member of a group already."""
    run = subprocess.run([sys.executable, "-c", JOIN], capture_output=True, text=True)
    if run.returncode:
        pytest.fail(run.stderr[-2000:])
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["total"] == 1.0 and found["known"]
    assert found["where"] == [found["address"]]
