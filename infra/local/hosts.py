"""A host runs one Ray node, which is started again when it ends, as a Kubernetes operator or an init system would do."""

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from infra.local.network import INTERFACE, Network
from infra.local.processes import PYTHON, Process

GCS_PORT, DASHBOARD_PORT = 6379, 8265
OBJECT_STORE_BYTES = 200 * 2**20
SHM_BYTES = 320 * 2**20
TOKEN_FILE = "/tmp/auth_token"  # on a host, which has its own /tmp
ALONE = ("unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child")

NO_PORT = "65536"
NO_METRICS = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": NO_PORT, "DASHBOARD_METRIC_PORT": NO_PORT}
"""Turns Ray's metrics off: they would be served on all interfaces without a token. An invalid port is the only way to close
two of the three ports."""

INIT = """
set -eu
if [ -n "$KEEP" ]; then mkdir -p "$DISK${{KEEP#/tmp}}"; mount --bind "$KEEP" "$DISK${{KEEP#/tmp}}"; fi
mount --rbind "$DISK" /tmp
mount -t tmpfs -o size={shm} tmpfs /dev/shm
hostname "$NAME"
while true; do
    {ray_start} ${{REDIS_PASSWORD:+--redis-password="$REDIS_PASSWORD"}} || true
    echo "the Ray node of $NAME has ended"
    sleep 1
done
"""
"""Script of a host's first process. KEEP is the folder of Python if that is below /tmp, which the host's own /tmp hides."""


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """How soon a silent host counts as dead. Only then are the tasks that ran on it started again.

    The head gives it up after about threshold * (period + timeout), and a process that waits for its answer after about
    keepalive + keepalive_timeout.

    Args:
        period_ms: from one health check by the head to the next.
        timeout_ms: until a health check without an answer has failed.
        threshold: failed health checks in a row.
        keepalive_ms: from one keepalive ping on a connection to the next; Ray's own default is 5 minutes.
        keepalive_timeout_ms: until a connection whose ping is not answered is closed; Ray's own default is 2 minutes.
    """

    period_ms: int = 1000
    timeout_ms: int = 4000
    threshold: int = 3
    keepalive_ms: int = 10_000
    keepalive_timeout_ms: int = 15_000

    def environment(self) -> dict[str, str]:
        """The environment variables by which Ray takes these settings; all nodes need the same."""
        return {
            "RAY_health_check_initial_delay_ms": "5000",
            "RAY_health_check_period_ms": str(self.period_ms),
            "RAY_health_check_timeout_ms": str(self.timeout_ms),
            "RAY_health_check_failure_threshold": str(self.threshold),
            "RAY_grpc_client_keepalive_time_ms": str(self.keepalive_ms),
            "RAY_grpc_client_keepalive_timeout_ms": str(self.keepalive_timeout_ms),
        }


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """The hosts of a cluster. The first is the head: it runs the jobs' drivers, the others do the work.

    Args:
        num_hosts: hosts, including the head.
        num_cpus: logical CPUs of every host except the head.
        custom: custom resources, one of each on every host but the head: actors that ask for the same run on different hosts.
        health: how soon a silent host counts as dead.
    """

    num_hosts: int = 4
    num_cpus: int = 4
    custom: tuple[str, ...] = ("captioning", "encoding", "training")
    health: HealthConfig = field(default_factory=HealthConfig)

    def __post_init__(self) -> None:
        if not 2 <= self.num_hosts <= 100:
            raise ValueError(f"num_hosts={self.num_hosts} must be from 2 (a head and a worker) to 100")


def start_host(
    index: int, network: Network, config: HostConfig, *, folder: Path, token: str, environment: dict[str, str]
) -> Process:
    """Switch a host on and return its first process. Its disk is `folder`/hosts/host-<index>, its log is in `folder`/logs.

    Args:
        index: the host's number; 0 is the head.
        token: Ray's authentication token.
        environment: variables of all its processes, besides those that Ray needs.
    """
    name = f"host-{index}"
    disk = folder / "hosts" / name
    disk.mkdir(parents=True, exist_ok=True)
    token_file = disk / Path(TOKEN_FILE).name
    token_file.touch(mode=0o600)
    token_file.write_text(token)
    script = INIT.format(shm=SHM_BYTES, ray_start=shlex.join(_ray_start(index, network, config)))
    return Process.start(
        ["ip", "netns", "exec", network.namespace(index), *ALONE, "bash", "-c", script],
        log=folder / "logs" / f"{name}.log",
        environment={
            "PATH": f"{PYTHON.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "NAME": name,
            "DISK": str(disk),
            "KEEP": sys.prefix if sys.prefix.startswith("/tmp/") else "",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": TOKEN_FILE,
            "RAY_prestart_worker_first_driver": "0",
            **NO_METRICS,
            **config.health.environment(),
            **environment,
        },
    )


def _ray_start(index: int, network: Network, config: HostConfig) -> list[str]:
    """The command that runs a host's Ray node until it ends."""
    address, head = network.address(index), network.address(0)
    command = ["ray", "start", "--block", "--disable-usage-stats", f"--node-ip-address={address}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-log-monitor=false"]
    if index == 0:
        command += [
            "--head",
            f"--port={GCS_PORT}",
            f"--dashboard-host={address}",
            f"--dashboard-port={DASHBOARD_PORT}",
            "--num-cpus=0",
        ]
        return command
    resources = json.dumps(dict.fromkeys(config.custom, 1))
    return [*command, f"--address={head}:{GCS_PORT}", f"--num-cpus={config.num_cpus}", f"--resources={resources}"]
