"""The servers of a cluster besides Ray: an S3 and an MLflow server. They run on this machine, at the bridge's address."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import boto3

from infra.local.processes import PYTHON, ROOT, Process, wait_until
from infra.local.redis import PORT as REDIS_PORT

S3_PORT, MLFLOW_PORT = 9000, 5000
BUCKET = "bucket"
START_SECONDS = 180.0


@dataclass(frozen=True)
class Servers:
    """The servers of a cluster. They listen on `address`, the bridge's, and write their logs to `log_dir`."""

    address: str
    log_dir: Path

    @property
    def s3_endpoint(self) -> str:
        """The URL of the S3."""
        return f"http://{self.address}:{S3_PORT}"

    @property
    def mlflow_uri(self) -> str:
        """The URL of the MLflow server."""
        return f"http://{self.address}:{MLFLOW_PORT}"

    def environment(self) -> dict[str, str]:
        """The environment variables with which a process reaches them.

        The S3 takes any credentials: only the cluster's hosts and this machine reach it.
        """
        return {
            "AWS_ENDPOINT_URL": self.s3_endpoint,
            "AWS_ACCESS_KEY_ID": "local",
            "AWS_SECRET_ACCESS_KEY": "local",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
        }

    def start_s3(self) -> Process:
        """Start the S3, which keeps everything in memory."""
        options = ["--host", self.address, "--port", str(S3_PORT)]
        return self._start("s3", ["infra.local.s3", *options], dict(os.environ) | {"PYTHONPATH": str(ROOT)})

    def start_mlflow(self, database_uri: str) -> Process:
        """Start the MLflow server, with runs in this database and artifacts in the bucket."""
        options = ["--backend-store-uri", database_uri, "--artifacts-destination", f"s3://{BUCKET}/mlflow", "--serve-artifacts"]
        options += ["--host", self.address, "--port", str(MLFLOW_PORT), "--allowed-hosts", f"{self.address}:{MLFLOW_PORT}"]
        environment = dict(os.environ) | self.environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        del environment["MLFLOW_TRACKING_URI"]
        return self._start("mlflow", ["mlflow", "server", "--workers", "1", *options], environment)

    def make_bucket(self, s3: Process) -> None:
        """Make the bucket once the S3 answers. Raises RuntimeError if it has ended, TimeoutError if it does not answer."""
        self._wait_for_port(S3_PORT, s3, "s3")
        keys = self.environment()
        client = boto3.client(
            "s3",
            endpoint_url=self.s3_endpoint,
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            region_name=keys["AWS_DEFAULT_REGION"],
        )
        client.create_bucket(Bucket=BUCKET)

    def wait_for_mlflow(self, mlflow: Process) -> None:
        """Wait until MLflow answers. Raises RuntimeError if it has ended, TimeoutError if it does not answer."""
        self._wait_for_port(MLFLOW_PORT, mlflow, "mlflow")

    def wait_for_redis(self, redis: Process) -> None:
        """Wait until Redis answers. Raises RuntimeError if it has ended, TimeoutError if it does not answer."""
        self._wait_for_port(REDIS_PORT, redis, "redis")

    def _start(self, name: str, module: list[str], environment: Mapping[str, str]) -> Process:
        return Process.start([str(PYTHON), "-m", *module], log=self.log_dir / f"{name}.log", environment=environment)

    def _wait_for_port(self, port: int, process: Process, name: str) -> None:
        def answers() -> bool:
            if not process.is_running():
                raise RuntimeError(f"{name} did not start: see {self.log_dir / name}.log")
            return is_open(self.address, port)

        wait_until(answers, f"{name} does not answer: see {self.log_dir / name}.log", seconds=START_SECONDS)


def is_open(address: str, port: int) -> bool:
    """Whether something listens on a port."""
    try:
        socket.create_connection((address, port), 1).close()
    except OSError:
        return False
    return True
