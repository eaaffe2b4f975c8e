"""Processes that go on when this program has ended, known by pid and by when they began: a pid may be given again."""

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
PYTHON = Path(sys.executable).absolute()  # it is relative where PATH names .venv/bin, and what we start starts in /


@dataclass(frozen=True)
class Process:
    """A process that we started. `began`: seconds since 1970."""

    pid: int
    began: float

    @classmethod
    def start(
        cls, command: Sequence[str], *, log: Path, environment: Mapping[str, str], user: struct_passwd | None = None
    ) -> "Process":
        """In a session of its own, so that no Ctrl-C reaches it; what it says is added to `log`."""
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
        """It and what it started, as far as they run."""
        try:
            process = psutil.Process(self.pid)
            if process.create_time() != self.began or process.status() == psutil.STATUS_ZOMBIE:
                return []
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def is_running(self) -> bool:
        return bool(self.family())

    def kill(self) -> None:
        """kill -9, it and what it started, and wait until they are gone."""
        family = self.family()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, alive = psutil.wait_procs(family, timeout=KILL_SECONDS)
        alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        if alive:
            raise RuntimeError(f"processes {[process.pid for process in alive]} do not die")


def as_user(user: struct_passwd | None) -> dict[str, Any]:
    """For `subprocess`; None: as who we are."""
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}


def wait_until(condition: Callable[[], object], problem: str, *, seconds: float) -> None:
    """Raises TimeoutError with the problem."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{problem} after {seconds:.0f} s")
        time.sleep(0.2)
