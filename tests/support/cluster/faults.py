"""Run jobs on the cluster, and disturb its hosts meanwhile."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from infra.local.cluster import Cluster, cut_for
from sana_model.files.filesystems import open_filesystem
from tests.support.cluster.stages import Stage

PATIENCE = 420.0  # seconds for one job, with a fault in it
CUT_SECONDS = 60.0


@dataclass(kw_only=True)
class Fault:
    """One disturbance of a stage, as a line of the closing table.

    done: parts (shards, steps) of `num_parts` that were there when it came. undisturbed, seconds: what the job takes without
    it, and took with it: on a machine with other work the difference says little. pause: seconds in which no part came.
    """

    stage: str
    what: str
    host: int
    done: int
    num_parts: int
    undisturbed: float
    seconds: float
    pause: float

    def line(self) -> str:
        lost = self.seconds - self.undisturbed
        return (
            f"{self.stage:<20} {self.what:<14} host {self.host} after {self.done:>3} of {self.num_parts:<3}   "
            f"{self.undisturbed:>4.0f} s undisturbed, {self.seconds:>4.0f} s with it: {lost:>4.0f} s lost, "
            f"longest pause {self.pause:>3.0f} s"
        )


def longest_pause(folder_uri: str) -> float:
    """Return the longest pause, in seconds, between two files written to a folder of the S3."""
    filesystem, root = open_filesystem(folder_uri)
    files = filesystem.find(root, detail=True).items()
    times = sorted(info["LastModified"].timestamp() for path, info in files if path.endswith((".parquet", ".jsonl")))
    return max(after - before for before, after in pairwise(times))


@dataclass(kw_only=True)
class Jobs:
    """Submits jobs to a cluster; their output goes to files in `log_dir`."""

    cluster: Cluster
    log_dir: Path

    def start(self, name: str, command: Sequence[str], *, submission_id: str | None = None) -> subprocess.Popen[bytes]:
        with self.log(name).open("wb") as output:
            return subprocess.Popen(
                self.cluster.submit_command(command, submission_id=submission_id),
                env=os.environ | self.cluster.environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, name: str, command: Sequence[str]) -> float:
        """Run a job to its end, which must be a success; return the seconds that it took."""
        begin = time.monotonic()
        self.finish(name, self.start(name, command))
        return time.monotonic() - begin

    def finish(self, name: str, job: subprocess.Popen[bytes]) -> None:
        try:
            code = job.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            job.kill()
            raise AssertionError(f"{name} does not end: {self.tail(name)}") from None
        assert code == 0, f"{name} ended with {code}: {self.tail(name)}"

    def stop(self, submission_id: str) -> None:
        command = [str(Path(sys.executable).parent / "ray"), "job", "stop", submission_id]
        subprocess.run(command, env=os.environ | self.cluster.environment(), check=True, capture_output=True)

    def log(self, name: str) -> Path:
        return self.log_dir / f"{name.replace(' ', '-')}.log"

    def tail(self, name: str) -> str:
        return self.log(name).read_text(errors="replace")[-4000:]


def working_hosts(cluster: Cluster, process_name: str) -> list[int]:
    """Find the hosts on which a process of this name runs."""
    return [
        host for host, process in cluster.hosts.items() if any(process_name in _command_of(one) for one in process.family())
    ]


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for_middle(stage: Stage, dataset_uri: str, job: subprocess.Popen[bytes], cluster: Cluster) -> tuple[int, int]:
    """Wait until the stage has made some parts and works on two hosts; return the number of parts, and the last host."""
    deadline = time.monotonic() + PATIENCE
    while True:
        assert job.poll() is None, f"{stage.name} ended before a fault could come"
        assert time.monotonic() < deadline, f"{stage.name} makes nothing"
        hosts, done = working_hosts(cluster, stage.process), stage.count_done(dataset_uri)
        if done >= stage.parts_before_fault and len(hosts) >= 2:
            return done, hosts[-1]
        time.sleep(0.2)


@contextmanager
def powered_off(cluster: Cluster, host: int) -> Iterator[None]:
    """Switch the host off inside the `with` block."""
    cluster.power_off(host)
    try:
        yield
    finally:
        cluster.restore(host)
        cluster.wait_until_whole()


@contextmanager
def cut_for_a_minute(cluster: Cluster, host: int) -> Iterator[None]:
    thread = threading.Thread(target=cut_for, args=(cluster, host, CUT_SECONDS))
    thread.start()
    try:
        yield
    finally:
        thread.join()
        cluster.wait_until_whole()


FAULTS = {"power off": powered_off, f"cut for {CUT_SECONDS:.0f} s": cut_for_a_minute}
