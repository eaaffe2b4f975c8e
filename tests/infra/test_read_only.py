"""Ray and a job run where only what the manifests mount can be written: /tmp, which is HOME too, and /dev/shm."""

import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.rights import MissingRightsError, check_rights
from tests.support.http_server import free_port
from tests.support.manifests import ROOT

HOST = """
set -e
mount --bind "$1" /tmp
mount -t tmpfs -o size=1g tmpfs /dev/shm
mount -o remount,bind,ro /
if touch "$2/.written" 2>/dev/null; then echo "$2 can be written"; exit 1; fi
export HOME=/tmp
mkdir /tmp/job
exec "$3" -m tests.support.metrics_probe /tmp/job "$4"
"""


@pytest.mark.slow
def test_a_job_needs_nothing_but_tmp_and_shared_memory(tmp_path: Path) -> None:
    try:
        check_rights()
    except MissingRightsError as error:
        pytest.skip(str(error))
    arguments = [str(tmp_path), str(ROOT), sys.executable, str(free_port())]
    run = subprocess.run(
        ["unshare", "--mount", "bash", "-c", HOST, "bash", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert "EXPORTED" in run.stdout and (tmp_path / "job/data/images/_manifest.json").exists()
