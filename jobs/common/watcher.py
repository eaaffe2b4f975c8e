"""Waits until a process has ended, then kills every process of the Ray that it had started, until none is left.

Ray ends most of its processes when their driver is killed, but not its agents, nor those that a worker has started.
Runs as a program of its own, without any other module of the project: `python watcher.py PID MARK`; Ray's folder comes on
stdin, when it is known. Linux only.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "SANA_LOCAL_RAY"
"""Environment variable that holds the mark; children inherit it, whoever their parent is later."""
GRACE = 0.5  # seconds in which Ray may end its processes by itself
PAUSE = 0.2
GIVE_UP = 60.0  # seconds


def watch(pid: int, mark: str) -> None:
    """Wait for the end of this process's parent `pid`, then kill what belongs to its Ray."""
    try:
        ended = select.poll()
        ended.register(os.pidfd_open(pid), select.POLLIN)
        if os.getppid() == pid:  # else it has ended before, and the number may be another's by now
            ended.poll()
    except ProcessLookupError:
        pass
    os.set_blocking(0, False)
    folder = (sys.stdin.buffer.read() or b"").decode().strip()
    time.sleep(GRACE)
    deadline = time.monotonic() + GIVE_UP
    while (kill_all(mark, folder) or kill_all(mark, folder)) and time.monotonic() < deadline:  # one may be starting another
        time.sleep(PAUSE)


def kill_all(mark: str, folder: str) -> int:
    """Kill what belongs to a Ray. Returns how many processes there were."""
    found = list(find_processes(mark, folder))
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(found)


def find_processes(mark: str, folder: str) -> Iterator[int]:
    """Processes other than this one with the mark in their environment, or a file in Ray's folder ("": not known) open.

    One that sets its own title, as Ray's agents do, writes it over its environment.
    """
    wanted = f"{MARK}={mark}".encode()
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0") or (folder and _has_open(process, f"{folder}/")):
                yield int(process.name)
        except OSError:  # it has ended, or is another user's
            continue


def _has_open(process: Path, prefix: str) -> bool:
    for file in (process / "fd").iterdir():
        try:
            if os.readlink(file).startswith(prefix):
                return True
        except FileNotFoundError:  # closed meanwhile
            continue
    return False


if __name__ == "__main__":
    watch(int(sys.argv[1]), sys.argv[2])
