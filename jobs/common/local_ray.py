"""A Ray on this machine for one job: it listens on loopback alone, asks for a token of its own, and ends with the job."""

import os
import secrets
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from jobs.common import watcher

CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": this node's address is 127.0.0.1, as it always is on a Mac
LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"


@contextmanager
def isolated() -> Iterator[Callable[[], None]]:
    """Within, a Ray that this process starts is for this process alone.

    It listens on loopback, with a token that only this user can read. If this process is killed, a watcher kills all that
    belongs to that Ray within seconds; at the end, what is left of it is killed.

    Yields a function that is to be called when Ray has started.
    """
    mark = uuid.uuid4().hex
    # GLOO_...: torch's workers of a training would listen on the address that the host's name has.
    variables = {CLUSTERS: "0", watcher.MARK: mark, "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK)}
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        # In the environment only this user can read it. The file that Ray makes otherwise is readable to all.
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with _environment(variables), _on_loopback(), _watched(mark) as tell_started:
        yield tell_started


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray heed what it has read already: the variable CLUSTERS when it was imported, and the first token of a process."""
    from ray._private import ray_constants

    core: Any = import_module("ray._raylet")

    def forget() -> None:
        core.Config.initialize("")
        core.AuthenticationTokenLoader.instance().reset_cache()

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    forget()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        forget()


@contextmanager
def _watched(mark: str) -> Iterator[Callable[[], None]]:
    """Within, a watcher waits for the end of this process. At the end, what is left of Ray's processes is killed."""
    folder = ""

    def tell_started() -> None:
        """Tell the watcher which folder Ray has."""
        nonlocal folder
        node: Any = import_module("ray._private.worker")._global_node
        folder = node.get_session_dir_path()
        if waiting is not None and waiting.stdin is not None:
            waiting.stdin.write(folder.encode())
            waiting.stdin.flush()

    waiting = _start_watcher(mark) if sys.platform.startswith("linux") else None
    try:
        yield tell_started
    finally:
        if waiting is not None:
            watcher.kill_all(mark, folder)
            waiting.kill()
            waiting.communicate()


def _start_watcher(mark: str) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != watcher.MARK}
    command = [sys.executable, "-I", "-S", watcher.__file__, str(os.getpid()), mark]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True)
