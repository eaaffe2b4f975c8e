"""Starts, damages, mends and removes a cluster. Its state is a file in its folder, so that any process can do each of these."""

import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.local.hosts import DASHBOARD_PORT, HealthConfig, HostConfig, start_host
from infra.local.network import Network
from infra.local.postgres import Postgres, find_missing
from infra.local.processes import PYTHON, ROOT, Process, wait_until
from infra.local.redis import Redis
from infra.local.redis import find_missing as find_missing_redis
from infra.local.rights import check_rights
from infra.local.servers import BUCKET, Servers, is_open

STATE = "cluster.json"
ALIVE_SECONDS = 240.0  # until all hosts have joined, on a busy machine
BUCKET_URI = f"s3://{BUCKET}"


@dataclass(kw_only=True)
class Cluster:
    """A cluster of hosts and its servers. Get one from `Cluster.up` or `Cluster.load`.

    Args:
        folder: holds the state, the token, the logs and the hosts' disks.
        config: the hosts.
        network: the network that they are on.
        token: Ray's authentication token.
        hosts: the process of each host that is on, by the host's number.
        servers: the processes of S3, MLflow, PostgreSQL and Redis, by name.
        database: PostgreSQL's folder; None if MLflow uses SQLite.
    """

    folder: Path
    config: HostConfig
    network: Network
    token: str
    hosts: dict[int, Process] = field(default_factory=dict)
    servers: dict[str, Process] = field(default_factory=dict)
    database: Path | None = None

    @classmethod
    def up(cls, folder: Path, config: HostConfig) -> "Cluster":
        """Start a cluster and wait until all its hosts have joined. If that fails, everything is removed again.

        Raises:
            MissingRightsError: hosts cannot be made on this machine.
            FileExistsError: the folder holds a cluster already.
            RuntimeError, TimeoutError: something did not start; the message names its log.
        """
        check_rights()
        folder = folder.absolute()
        if (folder / STATE).exists():
            raise FileExistsError(
                f"{folder} holds a cluster: take it away first (python -m infra.local down --folder {folder})"
            )
        folder.mkdir(parents=True, exist_ok=True)
        cluster = cls(folder=folder, config=config, network=Network.create(), token=secrets.token_hex(32))
        cluster._save()
        try:
            cluster._start()
        except BaseException:
            cluster.down()
            raise
        return cluster

    @classmethod
    def load(cls, folder: Path) -> "Cluster":
        """Load the cluster of a folder. Raises FileNotFoundError if there is none."""
        path = folder.absolute() / STATE
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no cluster: python -m infra.local up --folder {folder} makes one")
        values = json.loads(path.read_text())
        config = values.pop("config")
        health = HealthConfig(**config.pop("health"))
        return cls(
            folder=path.parent,
            config=HostConfig(**config | {"health": health, "custom": tuple(config["custom"])}),
            network=Network(**values["network"]),
            token=values["token"],
            hosts={int(index): Process(**process) for index, process in values["hosts"].items()},
            servers={name: Process(**process) for name, process in values["servers"].items()},
            database=Path(values["database"]) if values["database"] else None,
        )

    def down(self) -> None:
        """Remove everything except the folder with its logs. Ends processes by pid, and skips what is gone already."""
        for process in (*self.hosts.values(), *reversed(self.servers.values())):
            process.kill()
        self.network.delete(self.config.num_hosts)
        if self.database is not None:
            Postgres(self.database).delete()
        (self.folder / STATE).unlink(missing_ok=True)

    def power_off(self, host: int) -> None:
        """Switch a host off as if its plug were pulled: its processes end at once, and other hosts get no message."""
        self._check(host)
        self.network.cut(host)  # first, because ending processes close their connections, which other hosts would notice
        process = self.hosts.pop(host, None)
        self._save()
        if process is not None:
            process.kill()

    def cut(self, host: int) -> None:
        """Cut a host's link: the host keeps running, but nothing reaches it and nothing that it sends arrives."""
        self._check(host)
        self.network.cut(host)

    def restore(self, host: int) -> None:
        """Mend a host's link, and switch the host on if it is off."""
        self._check(host)
        self.network.mend(host)
        if host not in self.hosts or not self.hosts[host].is_running():
            self._start_host(host)

    def wait_until_whole(self) -> None:
        """Wait until all hosts that are on have joined. Raises TimeoutError after ALIVE_SECONDS."""

        def joined() -> bool:
            return {self.network.address(host) for host in self.hosts} <= set(self.alive())

        wait_until(joined, f"not all hosts have joined (see {self.folder}/logs): {self.alive()}", seconds=ALIVE_SECONDS)

    def alive(self) -> list[str]:
        """The addresses of the hosts that Ray considers alive; empty while the head does not answer."""
        try:
            nodes = self.ask("/api/v0/nodes?limit=1000")["data"]["result"]["result"]
        except (OSError, KeyError, ValueError):
            return []
        return sorted(node["node_ip"] for node in nodes if node["state"] == "ALIVE")

    def ask(self, path: str) -> Any:
        """Get the JSON answer of a path of the dashboard. Raises OSError, or ValueError if it is not JSON."""
        headers = {"Authorization": f"Bearer {self.token}"}
        with urllib.request.urlopen(urllib.request.Request(self.dashboard + path, headers=headers), timeout=20) as answer:
            return json.loads(answer.read())

    @property
    def dashboard(self) -> str:
        """The URL of the Ray dashboard."""
        return f"http://{self.network.address(0)}:{DASHBOARD_PORT}"

    def environment(self) -> dict[str, str]:
        """The environment variables with which a process on this machine reaches the cluster's S3, MLflow and dashboard."""
        return {
            **self._servers.environment(),
            "RAY_ADDRESS": self.dashboard,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "auth_token"),
        }

    def submit_command(self, entrypoint: Sequence[str], *, submission_id: str | None = None) -> list[str]:
        """The `ray job submit` command for a job with the working tree, to run with `environment`; it exits as the job does."""
        command = [str(PYTHON.parent / "ray"), "job", "submit", "--working-dir", str(ROOT)]
        if submission_id is not None:
            command += ["--submission-id", submission_id]
        return [*command, "--", *entrypoint]

    def submit(self, entrypoint: Sequence[str]) -> int:
        """Submit a job, wait for its end and return its exit code."""
        command = self.submit_command(entrypoint)
        return subprocess.run(command, env={**os.environ, **self.environment()}, check=False).returncode

    @property
    def _servers(self) -> Servers:
        return Servers(self.network.gateway, self.folder / "logs")

    @property
    def outlives_its_head(self) -> bool:
        """Whether a Redis keeps the head's state, so that a head that was lost and comes back finds its hosts and jobs."""
        return "redis" in self.servers

    @property
    def _redis(self) -> Redis:
        password = hashlib.sha256(f"redis {self.token}".encode()).hexdigest()  # not the token: `ray start` shows it to `ps`
        return Redis(self.network.gateway, self.folder / "redis", password)

    def _check(self, host: int) -> None:
        if not 0 <= host < self.config.num_hosts:
            raise ValueError(f"host {host} does not exist: give one from 0 (the head) to {self.config.num_hosts - 1}")

    def _start(self) -> None:
        (self.folder / "logs").mkdir(exist_ok=True)
        token_file = self.folder / "auth_token"
        token_file.touch(mode=0o600)
        token_file.write_text(self.token)
        for host in range(self.config.num_hosts):
            self.network.add_host(host)
        self._start_redis()
        self._start_host(0)
        s3 = self._add_server("s3", self._servers.start_s3())
        self._servers.make_bucket(s3)
        mlflow = self._add_server("mlflow", self._servers.start_mlflow(self._start_database()))
        self._wait_for_head()
        for host in range(1, self.config.num_hosts):
            self._start_host(host)
        self._servers.wait_for_mlflow(mlflow)
        self.wait_until_whole()

    def _start_redis(self) -> None:
        """Start the Redis that keeps the head's state, if it is installed."""
        if (missing := find_missing_redis()) is None:
            self._add_server("redis", self._redis.start(self.folder / "logs" / "redis.log"))
            self._servers.wait_for_redis(self.servers["redis"])
        else:
            print(f"the cluster ends with its head: {missing}, which would keep the head's state", file=sys.stderr)

    def _start_database(self) -> str:
        """Start MLflow's database and return its URI: PostgreSQL if it is installed, otherwise a SQLite file."""
        missing = find_missing()
        if missing is not None:
            print(f"MLflow keeps its runs in SQLite: {missing}", file=sys.stderr)
            return f"sqlite:///{self.folder}/mlflow.db"
        postgres = Postgres.create()
        self.database = postgres.folder
        self._save()
        self._add_server("postgres", postgres.start(self.folder / "logs" / "postgres.log"))
        postgres.make_database()
        return postgres.uri

    def _wait_for_head(self) -> None:
        address = self.network.address(0)
        problem = f"the head does not answer: see {self.folder}/logs/host-0.log"
        wait_until(lambda: is_open(address, DASHBOARD_PORT) and self.alive(), problem, seconds=ALIVE_SECONDS)

    def _start_host(self, host: int) -> None:
        environment = self._servers.environment()
        if self.outlives_its_head:
            environment |= self._redis.environment(host)
        self.hosts[host] = start_host(
            host, self.network, self.config, folder=self.folder, token=self.token, environment=environment
        )
        self._save()

    def _add_server(self, name: str, process: Process) -> Process:
        self.servers[name] = process
        self._save()
        return process

    def _save(self) -> None:
        values = asdict(self) | {"folder": None, "database": str(self.database) if self.database else None}
        path = self.folder / STATE
        path.touch(mode=0o600)
        path.write_text(json.dumps(values, indent=2))


def cut_for(cluster: Cluster, host: int, seconds: float) -> None:
    """Cut a host's link and mend it after `seconds`, or at once if this is interrupted."""
    cluster.cut(host)
    try:
        time.sleep(seconds)
    finally:
        cluster.restore(host)
