"""`python -m infra.local up --folder /tmp/cluster`: a Ray cluster of several hosts on this machine, whose hosts can fail."""

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
    """Run one command; return its exit code: 1 for an expected error, that of the job for `submit`."""
    options = make_parser().parse_args(argv)
    try:
        return int(options.run(options) or 0)
    except EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser; each command sets `run`, the function that carries it out."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.local", description="A Ray cluster of several hosts on this machine."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, run: object, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        if name != "check":
            command.add_argument(
                "--folder", type=Path, required=True, help="the cluster's folder: its state, logs and hosts' disks"
            )
        return command

    add("check", lambda options: check_rights(), "say whether hosts can be made on this machine, and what to do if not")
    _add_up_options(add("up", _up, "make the hosts, an S3, an MLflow server, and a Ray cluster on the hosts"))
    add("down", _down, "remove everything except the logs")
    add("status", _status, "say which hosts and servers run, and where")
    add("environment", _environment, "print the exports that commands on this machine need to reach the cluster")
    submit = add("submit", _submit, "submit a job from this machine by ray job submit, with the working tree")
    submit.add_argument(
        "entrypoint", nargs="+", metavar="-- command", help="the command to run, such as -- python -m jobs.ingest ..."
    )
    for name, run, summary in (
        ("power_off", _power_off, "switch a host off without warning, as if its plug were pulled"),
        ("cut", _cut, "cut a host's network link"),
        ("restore", _restore, "mend a host's link, and switch the host on if it is off"),
    ):
        command = add(name, run, summary)
        command.add_argument("host", type=int, help="the host's number; 0 is the head")
        if name == "cut":
            command.add_argument("--seconds", type=float, help="time until the link is mended; without it, the link stays cut")
    return parser


def _add_up_options(up: argparse.ArgumentParser) -> None:
    health = HealthConfig()
    up.add_argument("--hosts", type=int, default=4, help="number of hosts, including the head (default: 4)")
    up.add_argument("--cpus", type=int, default=4, help="logical CPUs of every host but the head (default: 4)")
    up.add_argument(
        "--health_timeout_ms", type=int, default=health.timeout_ms, help="timeout of one health check (default: %(default)s)"
    )
    up.add_argument(
        "--health_threshold",
        type=int,
        default=health.threshold,
        help="failed checks in a row until a host counts as dead (default: %(default)s)",
    )


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


def _power_off(options: argparse.Namespace) -> None:
    _load(options).power_off(options.host)


def _cut(options: argparse.Namespace) -> None:
    cluster = _load(options)
    if options.seconds is None:
        cluster.cut(options.host)
    else:
        cut_for(cluster, options.host, options.seconds)


def _restore(options: argparse.Namespace) -> None:
    _load(options).restore(options.host)


if __name__ == "__main__":
    sys.exit(main())
