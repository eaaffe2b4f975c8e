"""Find what listens on a host, and whether it demands the cluster's token."""

import http.client
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import grpc
import psutil

from infra.local.cluster import Cluster
from tests.support.sockets import listening

READY_SECONDS = 5.0  # until a gRPC server greets
WILDCARDS = ("0.0.0.0", "::")
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.ReporterService/HealthCheck",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.RayletDriver/ClusterInfo",
)
"""One method of each gRPC service of Ray that needs nothing from the caller but a token."""


@dataclass(frozen=True)
class Listener:
    """A socket that waits for connections. `owner`: the command line of its process; "" if that is gone."""

    host: int
    address: str
    port: int
    owner: str


def listeners(cluster: Cluster, host: int) -> Iterator[Listener]:
    """Read a host's listening sockets from the kernel."""
    for address, port, owner in listening(cluster.hosts[host].family()):
        yield Listener(host, address, port, owner or "")


def server_listeners(cluster: Cluster) -> dict[str, list[str]]:
    """Find the addresses on which each server other than Ray listens."""
    found = {
        name: [
            connection.laddr.ip
            for one in process.family()
            for connection in one.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        for name, process in cluster.servers.items()
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def grpc_answers(address: str, port: int, token: str | None) -> dict[str, grpc.StatusCode]:
    """Return each method's answer to an empty message, for the methods that the server has; {} if it speaks no gRPC."""
    metadata = (("authorization", f"Bearer {token}"),) if token else None
    answers = {}
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=READY_SECONDS)
        except grpc.FutureTimeoutError:
            return {}
        for method in METHODS:
            call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
            try:
                call(b"", timeout=20, metadata=metadata)
                answers[method] = grpc.StatusCode.OK
            except grpc.RpcError as error:
                answers[method] = error.code()
    return {method: code for method, code in answers.items() if code != grpc.StatusCode.UNIMPLEMENTED}


def unguarded(cluster: Cluster, found: Iterable[Listener]) -> list[tuple[Listener, dict[str, grpc.StatusCode]]]:
    """Find what listens on all interfaces and accepts callers with no token or a wrong one; return it with its answers.

    All of Ray's doors on all interfaces are gRPC. That the token opens them is what every job on the cluster shows. Those
    who do not refuse are asked once more: who was about to end, or too busy to answer, is let off.
    """
    suspects = [one for one in found if one.address in WILDCARDS and _let_in(cluster, one) is not None]
    open_now = {one for host in {one.host for one in suspects} for one in listeners(cluster, host)}
    return [(one, answers) for one in suspects if one in open_now and (answers := _let_in(cluster, one)) is not None]


def _let_in(cluster: Cluster, one: Listener) -> dict[str, grpc.StatusCode] | None:
    """Return the answer to a caller that must be refused; None if the server refuses it."""
    for token in (None, "0" * 64):
        answers = grpc_answers(cluster.network.address(one.host), one.port, token)
        if set(answers.values()) != {grpc.StatusCode.UNAUTHENTICATED}:
            return answers
    return None


def http_status(address: str, port: int) -> int | None:
    """Return the answer to a GET without a token; None where nobody speaks HTTP."""
    connection = http.client.HTTPConnection(address, port, timeout=20)
    try:
        connection.request("GET", "/api/v0/nodes")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
