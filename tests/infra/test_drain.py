"""A worker pod that is deleted: its preStop hook tells Ray, and a training saves a checkpoint before the node is gone."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.manifests import ROOT

SCRIPT = ROOT / "infra/kuberay/base/drain.sh"
POD = """
set -euo pipefail
ray start --head --port 0 --node-ip-address 127.0.0.1 --include-dashboard false --num-cpus 1 --disable-usage-stats > start.log
export RAY_ADDRESS="$(sed -n "s/.*--address='\\([^']*\\)'.*/\\1/p" start.log | head -1)"
(exec -a ray::RayTrainWorker.run sleep 4) &
start=$SECONDS
bash "$1" 60
echo "waited $((SECONDS - start))"
"""


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """For a Ray of the test's own: with a short name, as sockets need it, and found by no other test."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.mark.slow
def test_a_training_saves_before_its_node_is_gone_and_goes_on_elsewhere(tmp_path: Path, ray_folder: str) -> None:
    command = [sys.executable, "-m", "tests.support.preemption", str(tmp_path)]
    environment = os.environ | {"RAY_TMPDIR": ray_folder}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    outcome = json.loads(run.stdout.splitlines()[-1])
    assert outcome["workers"] == 1  # under the name that drain.sh looks for
    (saved,) = outcome["checkpoints"]
    step = int(saved.removeprefix("step-"))
    assert 10 <= step < 600 and step % 5 == 0  # long before checkpoint_every=600
    assert outcome["steps"] == list(range(5, 601, 5))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare for a pod of its own")
def test_the_hook_waits_for_the_training_and_no_longer(tmp_path: Path, ray_folder: str) -> None:
    """In a process namespace of its own, as in a pod: the hook looks at every process that it sees."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_TMPDIR": ray_folder,
        "RAY_AUTH_MODE": "disabled",
    }
    pod = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c", POD, "pod", str(SCRIPT)]
    run = subprocess.run(pod, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    waited = int(run.stdout.split()[-1])
    assert 4 <= waited < 60
