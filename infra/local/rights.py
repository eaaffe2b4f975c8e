"""Checks whether hosts can be made on this machine, and says what is missing."""

import os
import shutil
import subprocess
import sys

TOOLS = {"ip": "iproute2", "unshare": "util-linux", "mount": "mount"}
PROBE = "sana-probe"


class MissingRightsError(RuntimeError):
    """Hosts cannot be made on this machine; the message says why, and what to do."""


def check_rights() -> None:
    """Try out, and undo, what a cluster needs. Raises MissingRightsError if something is missing."""
    if sys.platform != "linux":
        raise MissingRightsError(
            f"network namespaces need Linux, and this is {sys.platform}: use a Linux machine, real or virtual"
        )
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise MissingRightsError(f"there is no `{tool}`: install {package}")
    if os.geteuid() != 0:
        raise MissingRightsError(
            "only root may make network namespaces and mounts: run it with sudo, or as root in a virtual machine"
        )
    name = f"{PROBE}{os.getpid()}"[:15]
    advice = "in a container, start it with --privileged (or --cap-add NET_ADMIN --cap-add SYS_ADMIN)"
    try:
        _try(["ip", "link", "add", name, "type", "bridge"], f"a bridge cannot be made: {advice}")
        _try(["ip", "netns", "add", name], f"a network namespace cannot be made: {advice}")
        alone = [
            "unshare",
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            "mount",
            "-t",
            "tmpfs",
            "tmpfs",
            "/tmp",
        ]
        _try(["ip", "netns", "exec", name, *alone], f"a host cannot have mounts and processes of its own: {advice}")
    finally:
        for kind in ("netns", "link"):
            subprocess.run(["ip", kind, "del", name], capture_output=True, check=False)


def _try(command: list[str], problem: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MissingRightsError(f"{problem} (`{' '.join(command)}`: {done.stderr.strip()})")
