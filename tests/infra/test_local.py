"""Where the machine does not let us make hosts, the local cluster says so, and what to do."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str, path: str = os.environ["PATH"], before: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-m", "infra.local", *arguments],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the message is another")
def test_missing_tools_are_told(tmp_path: Path) -> None:
    assert run("check", path=str(tmp_path)).stderr == "error: there is no `ip`: install iproute2\n"


@pytest.mark.skipif(any(shutil.which(tool) is None for tool in ("ip", "unshare", "setpriv")), reason="iproute2 or util-linux")
def test_missing_rights_are_told(tmp_path: Path) -> None:
    """As another user than root, or as a root that may not touch the network."""
    is_root = os.geteuid() == 0
    done = run("up", "--folder", str(tmp_path / "cluster"), before=["setpriv", "--bounding-set=-net_admin"] if is_root else [])
    assert done.returncode == 1 and not (tmp_path / "cluster").exists()
    told = "a bridge cannot be made: in a container, start it with --privileged" if is_root else "only root may make network"
    assert done.stderr.startswith(f"error: {told}")


def test_a_folder_without_a_cluster_is_told(tmp_path: Path) -> None:
    done = run("status", "--folder", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} holds no cluster: python -m infra.local up --folder {tmp_path} makes one\n"
