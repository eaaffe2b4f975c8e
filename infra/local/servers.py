"""What a cluster has beside Ray: an S3, an MLflow server and its database, on this machine, on the bridge's address."""

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import boto3

from infra.local.processes import Process, wait_until

S3_PORT, MLFLOW_PORT = 9000, 5000
BUCKET = "bucket"
START_SECONDS = 120.0
POSTGRES_TOOLS = ("postgres", "initdb", "createdb")


@dataclass(frozen=True)
class Servers:
    """Where the servers of a cluster are: `address` is that of the bridge, `log_dir` takes what they say."""

    address: str
    log_dir: Path

    @property
    def s3_endpoint(self) -> str:
        return f"http://{self.address}:{S3_PORT}"

    @property
    def mlflow_uri(self) -> str:
        return f"http://{self.address}:{MLFLOW_PORT}"

    def environment(self) -> dict[str, str]:
        """What a process needs to reach them. The S3 takes any credentials: none but the cluster's hosts reach it."""
        return {
            "AWS_ENDPOINT_URL": self.s3_endpoint,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
        }

    def start_s3(self) -> Process:
        """moto's server, which keeps everything in memory, with an empty bucket."""
        command = [sys.executable, "-m", "moto.server", "-H", self.address, "-p", str(S3_PORT)]
        process = self._start("s3", command, os.environ)
        self._wait_for_port(S3_PORT, process, "s3")
        keys = self.environment()
        client = boto3.client(
            "s3",
            endpoint_url=self.s3_endpoint,
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            region_name=keys["AWS_DEFAULT_REGION"],
        )
        client.create_bucket(Bucket=BUCKET)
        return process

    def start_mlflow(self, database_uri: str) -> Process:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database_uri]
        command += ["--artifacts-destination", f"s3://{BUCKET}/mlflow", "--serve-artifacts", "--workers", "1"]
        command += ["--host", self.address, "--port", str(MLFLOW_PORT), "--allowed-hosts", f"{self.address}:{MLFLOW_PORT}"]
        environment = dict(os.environ) | self.environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        del environment["MLFLOW_TRACKING_URI"]
        return self._start("mlflow", command, environment)

    def wait_for_mlflow(self, process: Process) -> None:
        self._wait_for_port(MLFLOW_PORT, process, "mlflow")

    def _start(self, name: str, command: list[str], environment: Mapping[str, str]) -> Process:
        return Process.start(command, log=self.log_dir / f"{name}.log", environment=environment)

    def _wait_for_port(self, port: int, process: Process, name: str) -> None:
        def answers() -> bool:
            if not process.is_running():
                raise RuntimeError(f"{name} did not start: see {self.log_dir / name}.log")
            return is_open(self.address, port)

        wait_until(answers, f"{name} does not answer: see {self.log_dir / name}.log", seconds=START_SECONDS)


def is_open(address: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((address, port), 1).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL whose only door is a socket file in its folder, which is closed to other users than root and its own."""

    folder: Path

    @property
    def uri(self) -> str:
        """Of its database, for SQLAlchemy."""
        return f"postgresql+psycopg2://{self._user.pw_name}@/mlflow?host={self.folder}"

    @property
    def _user(self) -> pwd.struct_passwd:
        return postgres_user()

    @classmethod
    def find_missing(cls) -> str | None:
        """What keeps us from using it; None: nothing."""
        for tool in POSTGRES_TOOLS:
            if shutil.which(tool) is None:
                return f"there is no `{tool}`"
        return None if importlib.util.find_spec("psycopg2") else "there is no psycopg2"

    @classmethod
    def create(cls) -> "Postgres":
        """An empty one; its folder is not in the cluster's, which its user may not be allowed to enter."""
        postgres = cls(Path(tempfile.mkdtemp(prefix="sana-postgres-")))
        os.chown(postgres.folder, postgres._user.pw_uid, postgres._user.pw_gid)
        postgres._run(
            "initdb",
            "--pgdata",
            f"{postgres.folder}/data",
            "--auth",
            "trust",
            "--no-sync",
            "--username",
            postgres._user.pw_name,
        )
        return postgres

    def start(self, log: Path) -> Process:
        command = [
            _path("postgres"),
            "-D",
            f"{self.folder}/data",
            "-c",
            "listen_addresses=",
            "-c",
            f"unix_socket_directories={self.folder}",
        ]
        process = Process.start(command, log=log, environment=os.environ, user=self._user)
        socket_file = self.folder / ".s.PGSQL.5432"
        wait_until(socket_file.exists, f"postgres does not start: see {log}", seconds=START_SECONDS)
        wait_until(lambda: self._create_database(), f"postgres makes no database: see {log}", seconds=START_SECONDS)
        return process

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _create_database(self) -> bool:
        command = [_path("createdb"), "--host", str(self.folder), "--username", self._user.pw_name, "mlflow"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _run(self, tool: str, *arguments: str) -> None:
        user = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []}
        done = subprocess.run([_path(tool), *arguments], capture_output=True, text=True, check=False, cwd="/", **user)  # type: ignore[call-overload]
        if done.returncode != 0:
            raise RuntimeError(f"`{tool}` failed: {done.stderr.strip()}")


def postgres_user() -> pwd.struct_passwd:
    """PostgreSQL refuses to run as root."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _path(tool: str) -> str:
    found = shutil.which(tool)
    assert found is not None
    return found
