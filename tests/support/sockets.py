"""Read from the kernel what listens for connections in the network of some processes."""

import re
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

LISTEN = "0A"


def listening(processes: Sequence[psutil.Process]) -> Iterator[tuple[str, int, str | None]]:
    """Yield address, port and owner (a command line; None: none of `processes`) of each socket that waits for connections.

    The sockets are those of the network of the first process.
    """
    owners = {inode: name for process in processes for inode, name in _sockets_of(process)}
    for version, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{processes[0].pid}/net/{version}").read_text().splitlines()[1:]:
            _, local, _, state, _, _, _, _, _, inode, *_ = line.split()
            if state == LISTEN:
                address, port = local.split(":")
                words = struct.pack(f"={len(address) // 8}I", *(int(word, 16) for word in re.findall(".{8}", address)))
                yield socket.inet_ntop(kind, words), int(port, 16), owners.get(inode)


def _sockets_of(process: psutil.Process) -> Iterator[tuple[str, str]]:
    try:
        name = " ".join(process.cmdline()).strip()  # Ray pads the titles of its processes
        for file in Path(f"/proc/{process.pid}/fd").iterdir():
            if found := re.fullmatch(r"socket:\[(\d+)\]", str(file.readlink())):
                yield found[1], name
    except (OSError, psutil.Error):  # it has ended
        return
