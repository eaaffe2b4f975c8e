"""A cluster's network: a bridge on this machine, and a namespace for each host, joined to it by a virtual cable."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

MAX_NETWORKS = 100
INTERFACE = "eth0"
"""The network interface of every host."""


@dataclass(frozen=True)
class Network:
    """The network 10.77.<number>.0/24 with a bridge of the same number; this machine has its first address."""

    number: int

    @property
    def bridge(self) -> str:
        """The name of the bridge."""
        return f"sana{self.number}"

    @property
    def gateway(self) -> str:
        """This machine's address in the network; servers that all hosts use listen there."""
        return self._address(1)

    def namespace(self, host: int) -> str:
        """The name of a host's namespace, and of its cable's end on this machine."""
        return f"sana{self.number}-{host}"

    def address(self, host: int) -> str:
        """The address of the host with this number, from 0."""
        return self._address(10 + host)

    def _address(self, last: int) -> str:
        return f"10.77.{self.number}.{last}"

    @classmethod
    def create(cls) -> "Network":
        """Make a bridge with the first free number. Raises RuntimeError if there is none, or if `ip` fails."""
        for number in range(MAX_NETWORKS):
            network = cls(number)
            if not Path("/sys/class/net", network.bridge).exists():
                ip("link", "add", network.bridge, "type", "bridge")
                ip("address", "add", f"{network.gateway}/24", "dev", network.bridge)
                ip("link", "set", network.bridge, "up")
                return network
        raise RuntimeError(f"{MAX_NETWORKS} networks exist already: remove some (python -m infra.local down --folder ...)")

    def add_host(self, host: int) -> None:
        """Make a host's namespace and join it to the bridge. Raises RuntimeError if `ip` fails."""
        cable, inside = self.namespace(host), ["-n", self.namespace(host)]
        ip("netns", "add", cable)
        ip("link", "add", cable, "type", "veth", "peer", "name", INTERFACE, "netns", cable)
        ip("link", "set", cable, "master", self.bridge, "up")
        ip(*inside, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        ip(*inside, "link", "set", INTERFACE, "up")
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "route", "add", "default", "via", self.gateway)

    def cut(self, host: int) -> None:
        """Cut a host's cable: packets are lost in both directions, and no connection is closed."""
        ip("link", "set", self.namespace(host), "down")

    def mend(self, host: int) -> None:
        """Join a host's cable again."""
        ip("link", "set", self.namespace(host), "up")

    def delete(self, num_hosts: int) -> None:
        """Remove the namespaces of hosts 0 to `num_hosts` - 1, and the bridge, as far as they exist."""
        for host in range(num_hosts):
            ip("netns", "del", self.namespace(host), missing_ok=True)
            ip("link", "del", self.namespace(host), missing_ok=True)
        ip("link", "del", self.bridge, missing_ok=True)


def ip(*arguments: str, missing_ok: bool = False) -> None:
    """Run iproute2's `ip`. Raises RuntimeError if it fails, unless `missing_ok`."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0 and not missing_ok:
        raise RuntimeError(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
