"""Which network addresses the URLs of a list may lead to.

Whoever writes a list is not whoever runs the job: without this check a list could ask the services of the job's own network,
such as the metadata service of a cloud, and read their answers in the reasons of its rejects.
"""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

SPECIAL = tuple(
    ip_network(network)
    for network in (
        "192.0.0.0/24",  # of protocols; one is the metadata service of Oracle's cloud
        "192.88.99.0/24",  # once relays of 6to4
        "168.63.129.16/32",  # services of Azure's hosts: a public number, but not a public address
        "3fff::/20",  # for documentation
    )
)
"""Addresses that `ipaddress` takes for public ones."""
GLOBAL_UNICAST = ip_network("2000::/3")
NAT64 = ip_network("64:ff9b::/96")  # the last 32 bits are the IPv4 address that is meant


class PrivateAddressError(OSError):
    """A connection to an address that is not a public one. The text is always the same: aiohttp then passes it on as it is."""

    def __init__(self) -> None:
        super().__init__("a loopback, link-local, private or other special address")


def is_public(address: str) -> bool:
    """Whether an IP address, as a socket takes it, is one of the public internet."""
    found = ip_address(address.partition("%")[0])  # a scope may follow
    if isinstance(found, IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (IPv4Address(int(found) & 0xFFFFFFFF) if found in NAT64 else None)
        if inner is None and found not in GLOBAL_UNICAST:
            return False
        found = inner or found
    return found.is_global and not found.is_multicast and not any(found in network for network in SPECIAL)


def public_socket(address: tuple[Any, ...]) -> socket.socket:
    """Make the socket for one result of `getaddrinfo`. The address is the one that will be connected to, so whatever a name or
    a redirect leads to, and whenever it changes, is checked. Raises PrivateAddressError."""
    family, kind, protocol, _, place = address
    if not is_public(place[0]):
        raise PrivateAddressError
    return socket.socket(family, kind, protocol)


def is_spelled_private(host: str) -> bool:
    """Whether a host is an IPv4 address in any spelling (127.1, 2130706433, 0177.0.0.1), and not a public one."""
    try:
        return not is_public(socket.inet_ntoa(socket.inet_aton(host.rstrip("."))))
    except (OSError, ValueError):
        return False
