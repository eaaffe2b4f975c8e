"""The commands that make the cluster, look at it, and submit to it from outside."""

import os
import subprocess
import sys

import pytest

from infra.local.cluster import ROOT, Cluster

pytestmark = pytest.mark.cluster


def run(cluster: Cluster, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "infra.local", command, "--folder", str(cluster.folder), *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_status_tells_what_runs(cluster: Cluster) -> None:
    told = run(cluster, "status").stdout
    assert told.count(" in the cluster\n") == cluster.config.num_hosts
    assert all(name in told for name in ("s3 ", "mlflow ", cluster.dashboard)) and " off" not in told


def test_up_does_not_touch_what_is_there(cluster: Cluster) -> None:
    done = run(cluster, "up")
    assert done.returncode == 1 and "holds a cluster: take it away first" in done.stderr


def test_a_job_runs_on_the_head_with_the_code_that_was_uploaded(cluster: Cluster) -> None:
    done = run(cluster, "submit", "--", "python", "-c", "import os, jobs; print(os.uname().nodename, jobs.__file__)")
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = (line for line in done.stdout.splitlines() if line.startswith("host-0 "))
    assert "/runtime_resources/working_dir_files/" in told


def test_without_the_token_nothing_is_submitted(cluster: Cluster) -> None:
    without = {name: value for name, value in cluster.environment().items() if not name.startswith("RAY_AUTH")}
    command = cluster.submit_command(["python", "-c", "print('it ran')"])
    reach = os.environ | without | {"HOME": str(cluster.folder)}  # where no token lies
    done = subprocess.run(command, env=reach, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "it ran" not in done.stdout
    assert "Missing authentication token" in done.stdout + done.stderr
