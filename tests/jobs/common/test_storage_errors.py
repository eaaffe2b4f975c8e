"""A job on a disk that is full says so in one line and ends with the code of a fault; nothing half-written stays."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.common.exit_codes import ExitCode
from pipelines.shapes.drawing import write_folder


def test_a_full_disk_ends_a_job_with_one_message(tmp_path: Path) -> None:
    write_folder(tmp_path / "raw", 0, 400)  # several times what the disk has left
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        (disk / "ballast").write_bytes(bytes(180_000))
        options = ["--ingest.source", str(tmp_path / "raw"), "--ray.num_cpus", "3"]
        command = [sys.executable, "-m", "jobs.ingest", "--dataset_uri", str(disk / "data"), *options]
        run = subprocess.run(
            [*command, "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"], capture_output=True, text=True, timeout=300
        )
        files = {str(path.relative_to(disk)) for path in disk.rglob("*") if path.is_file()}
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert run.returncode == ExitCode.FAULT
    errors = [line for line in run.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in run.stderr
    assert f"cannot write {disk}/data/" in errors[0] and "the disk is full: free space there and start again" in errors[0]
    assert not any(name.endswith(".tmp") for name in files) and "data/images/00000.parquet" not in files
