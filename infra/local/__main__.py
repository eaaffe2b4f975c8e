"""`python -m infra.local up --folder /tmp/cluster`: a Ray cluster of several hosts on this machine, also to be broken."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.local.cluster import BUCKET_URI, Cluster, cut_for
from infra.local.hosts import HealthConfig, HostConfig
from infra.local.rights import MissingRightsError, check_rights

EXPECTED = (MissingRightsError, FileExistsError, FileNotFoundError, RuntimeError, TimeoutError, ValueError)


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    try:
        return int(options.run(options) or 0)
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infra.local", description="A Ray cluster of several hosts on this machine."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, run: object, told: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=told, description=told)
        command.set_defaults(run=run)
        if name != "check":
            command.add_argument("--folder", type=Path, required=True, help="of the cluster: its state, logs and hosts' disks")
        return command

    add("check", lambda options: check_rights(), "say whether this machine lets us make hosts, and what to do if not")
    up = add("up", _up, "make hosts, S3, MLflow and a Ray on them")
    up.add_argument("--hosts", type=int, default=4, help="with the head (default: 4)")
    up.add_argument("--cpus", type=int, default=4, help="logical CPUs of every host but the head (default: 4)")
    health = HealthConfig()
    up.add_argument(
        "--health_timeout_ms", type=int, default=health.timeout_ms, help="of one health check (default: %(default)s)"
    )
    up.add_argument(
        "--health_threshold", type=int, default=health.threshold, help="failures until a host is dead (default: %(default)s)"
    )
    add("down", _down, "take everything away but the logs")
    add("status", _status, "say what runs, and where")
    add("environment", _environment, "print exports with which commands on this machine reach the cluster")
    submit = add("submit", _submit, "ray job submit, from this machine, with the working tree")
    submit.add_argument("entrypoint", nargs="+", metavar="-- command", help="such as -- python -m jobs.ingest ...")
    for name, run, told in (
        ("power_off", lambda options: _load(options).power_off(options.host), "pull a host's plug"),
        ("cut", _cut, "cut a host's link"),
        ("restore", lambda options: _load(options).restore(options.host), "mend a host's link, and switch it on"),
    ):
        command = add(name, run, told)
        command.add_argument("host", type=int, help="0 is the head")
        if name == "cut":
            command.add_argument("--seconds", type=float, help="after which it is mended; else it stays cut")
    return parser


def _load(options: argparse.Namespace) -> Cluster:
    return Cluster.load(options.folder)


def _up(options: argparse.Namespace) -> None:
    health = HealthConfig(timeout_ms=options.health_timeout_ms, threshold=options.health_threshold)
    cluster = Cluster.up(options.folder, HostConfig(num_hosts=options.hosts, num_cpus=options.cpus, health=health))
    print(f"{len(cluster.hosts)} hosts; datasets go to {BUCKET_URI}/...\n")
    _status(options)


def _down(options: argparse.Namespace) -> None:
    _load(options).down()


def _status(options: argparse.Namespace) -> None:
    cluster = _load(options)
    alive = cluster.alive()
    for host in range(cluster.config.num_hosts):
        address, process = cluster.network.address(host), cluster.hosts.get(host)
        state = f"process {process.pid}" if process and process.is_running() else "off"
        print(f"host {host:<10} {address:<14} {state:<16} {'in the cluster' if address in alive else 'not in the cluster'}")
    for name, process in cluster.servers.items():
        print(f"{name:<15} {cluster.network.gateway:<14} {f'process {process.pid}' if process.is_running() else 'off'}")
    print(f"{'dashboard':<15} {cluster.dashboard}, token in {cluster.folder}/auth_token")
    print(f"{'logs':<15} {cluster.folder}/logs")


def _environment(options: argparse.Namespace) -> None:
    for name, value in _load(options).environment().items():
        print(f"export {name}={shlex.quote(value)}")


def _submit(options: argparse.Namespace) -> int:
    return _load(options).submit(options.entrypoint)


def _cut(options: argparse.Namespace) -> None:
    cluster = _load(options)
    if options.seconds is None:
        cluster.cut(options.host)
    else:
        cut_for(cluster, options.host, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
