"""Processes that keep running after this program ends. Pid and start time together identify one: pids are used again."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pwd import struct_passwd
from typing import Any

import psutil

KILL_SECONDS = 30.0
ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable).absolute()  # sys.executable may be relative, and the processes start in /


@dataclass(frozen=True)
class Process:
    """A process that we started. `began` is its start time in seconds since 1970."""

    pid: int
    began: float

    @classmethod
    def start(
        cls, command: Sequence[str], *, log: Path, environment: Mapping[str, str], user: struct_passwd | None = None
    ) -> "Process":
        """Start a command in a session of its own, so that no Ctrl-C reaches it; its output is appended to `log`.

        Args:
            environment: all its variables.
            user: whom it runs as; the present user unless given.
        """
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,
                **as_user(user),
            )
        return cls(process.pid, psutil.Process(process.pid).create_time())

    def family(self) -> list[psutil.Process]:
        """The process and its descendants that are running; empty if it has ended."""
        try:
            process = psutil.Process(self.pid)
            if process.create_time() != self.began or process.status() == psutil.STATUS_ZOMBIE:
                return []
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def is_running(self) -> bool:
        """Whether the process itself runs."""
        return bool(self.family())

    def kill(self) -> None:
        """Kill (SIGKILL) the process and its descendants, and wait until they are gone.

        Raises RuntimeError if some are left after KILL_SECONDS.
        """
        family = self.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(family, timeout=KILL_SECONDS)
        alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        if alive:
            raise RuntimeError(f"processes {[process.pid for process in alive]} still run {KILL_SECONDS:.0f} s after kill -9")


def as_user(user: struct_passwd | None) -> dict[str, Any]:
    """The arguments with which `subprocess` runs a command as a user; none for the present user."""
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}


def wait_until(condition: Callable[[], object], problem: str, *, seconds: float) -> None:
    """Wait until a condition holds. Raises TimeoutError with `problem` in its message after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{problem} after {seconds:.0f} s")
        time.sleep(0.2)
