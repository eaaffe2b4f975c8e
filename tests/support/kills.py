"""Kill a job's driver, actors or raylet at random moments, and start it again until it is done."""

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

Target = Literal["driver", "actor", "raylet"]
NAMES = {"actor": "MapWorker", "raylet": "raylet/raylet"}  # in the command lines of processes
GONE_SECONDS = 30.0  # within which the processes of a killed Ray should be gone


@dataclass(kw_only=True)
class Kills:
    """Counts what was killed of a job, and how often it was started."""

    killed: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    seconds: float = 0.0
    stragglers: list[str] = field(default_factory=list)
    """Command lines of processes of a killed Ray that did not end by themselves."""

    def __iadd__(self, other: "Kills") -> "Kills":
        self.killed += other.killed
        self.starts += other.starts
        self.seconds += other.seconds
        self.stragglers += other.stragglers
        return self


def run_with_kills(
    command: Sequence[str],
    targets: Sequence[Target],
    count_done: Callable[[], int],
    *,
    log: Path,
    seed: int,
    environment: dict[str, str] | None = None,
    timeout: float = 600.0,
) -> Kills:
    """Run a command to its end; on the way kill each of `targets` in turn, and start the command again when that ended it.

    Args:
        count_done: of what the job makes (shards, checkpoints), how many there are.
        log: takes the command's output.
        seed: draws the moments: up to a second after none, one or two more are done.
        timeout: seconds for one start of the command.

    Raises:
        RuntimeError: the command failed though nothing of it was killed, or took too long.
    """
    kills, moments, waiting = Kills(), random.Random(seed), list(targets)
    begin = time.monotonic()
    while True:
        kills.starts += 1
        with log.open("ab") as output:
            job = subprocess.Popen(
                command,
                env={**os.environ, **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        ended_by_us = False
        deadline = time.monotonic() + timeout
        while job.poll() is None and waiting and not ended_by_us:
            goal, pause = count_done() + moments.randint(0, 2), moments.random()
            while job.poll() is None and (count_done() < goal or not _find(job.pid, "actor")):
                _check_deadline(deadline, job, log)
                time.sleep(0.05)
            time.sleep(pause)
            if _kill(job, waiting[0], kills):
                target = waiting.pop(0)
                ended_by_us = target != "actor"
        while job.poll() is None:
            _check_deadline(deadline, job, log)
            time.sleep(0.05)
        if job.returncode == 0 and not ended_by_us:
            kills.seconds = time.monotonic() - begin
            return kills
        if not ended_by_us:
            raise RuntimeError(f"exit code {job.returncode} though only actors were killed: {_tail(log)}")


def _kill(job: subprocess.Popen[bytes], target: Target, kills: Kills) -> bool:
    """Kill the target if it runs; after a driver or raylet, wait until all processes of its Ray are gone."""
    family = _family(job.pid)
    victims = _find(job.pid, target)
    if not victims:
        return False
    try:
        victims[0].kill()
    except psutil.NoSuchProcess:
        return False
    kills.killed[target] += 1
    if target == "actor":
        return True
    try:
        job.wait(GONE_SECONDS)
    except subprocess.TimeoutExpired:
        kills.stragglers.append("driver")
        job.kill()
        job.wait()
    # Ray's agents outlive their raylet for a while. They write nothing.
    agents = [process for process in family[1:] if "Agent" in _command_of(process)]
    _, alive = psutil.wait_procs([process for process in family[1:] if process not in agents], timeout=GONE_SECONDS)
    kills.stragglers += [_command_of(process)[:100] for process in alive]
    for process in [*agents, *alive]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return True


def _family(pid: int) -> list[psutil.Process]:
    try:
        job = psutil.Process(pid)
        return [job, *job.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _find(pid: int, target: Target) -> list[psutil.Process]:
    family = _family(pid)
    return family[:1] if target == "driver" else [process for process in family if NAMES[target] in _command_of(process)]


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _check_deadline(deadline: float, job: subprocess.Popen[bytes], log: Path) -> None:
    if time.monotonic() > deadline:
        for process in _family(job.pid):
            process.kill()
        raise RuntimeError(f"not done in time: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]
