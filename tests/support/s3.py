"""Start a real HTTP S3 (the local cluster's, in its own process), and a proxy in front of it that spoils some answers."""

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal
from urllib.parse import urlsplit

import boto3
import pytest

from infra.local.processes import ROOT
from sana_model.files import filesystems, retry
from sana_model.files.retry import Backoff
from tests.support.http_server import Handler, Server, free_port

Fault = Literal["403", "409", "500", "503", "reset", "cut", "slow"]
CODES: dict[str, bytes] = {
    "403": b"AccessDenied",
    "409": b"ConditionalRequestConflict",
    "500": b"InternalError",
    "503": b"SlowDown",
}
ERROR_BODY = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected by the test</Message></Error>"
BUCKET = "bucket"


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return the environment variables by which a process reaches the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def serve_s3() -> Iterator[str]:
    """Start a server with an empty bucket `BUCKET`, and yield its endpoint."""
    port = free_port()
    command = [sys.executable, "-m", "infra.local.s3", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        _wait_for(port, server)
        options = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=endpoint, **options).create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start (exit code {server.poll()})")


class FaultyProxy(Server):
    """Passes requests on to an endpoint, and spoils a share of the answers.

    Args:
        share: of the requests that are spoiled, by a fault drawn from `faults`: an error status, a connection that is reset
            before the answer, an answer that is cut in the middle, or one that comes after `delay` seconds.
        delay: seconds that a slow answer takes.

    `requests` counts methods, `spoiled` faults, `sent` the bytes of answers.
    """

    def __init__(self, endpoint: str, *, share: float = 0.0, faults: Sequence[Fault] = (), delay: float = 3.0, seed: int = 0):
        super().__init__(ProxyHandler)
        self.target = urlsplit(endpoint).netloc
        self.share, self.faults, self.delay = share, faults, delay
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()
        self.spoiled: Counter[str] = Counter()
        self.sent = 0

    def draw(self, method: str) -> Fault | None:
        with self.lock:
            self.requests[method] += 1
            if not self.faults or self.random.random() >= self.share:
                return None
            fault = self.random.choice(self.faults)
            self.spoiled[fault] += 1
            return fault


class ProxyHandler(Handler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.draw(self.command)
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(self.server.delay)
        if fault in CODES:
            self.answer(int(fault), ERROR_BODY % CODES[fault])
            return
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in ("connection", "date", "server")}
        if fault == "cut":
            headers, content = {"Content-Length": str(len(content))} | headers, content[: len(content) // 2]
            self.close_connection = True
        self.answer(response.status, content, headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        if self.command == "HEAD":
            content, headers = b"", {"Content-Length": str(len(content))} | (headers or {})
        self.server.sent += len(content)
        self.reply(status, content, headers)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables inside the `with` block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@contextmanager
def faulty_s3(endpoint: str) -> Iterator[FaultyProxy]:
    """A proxy between this process and an S3 server, and short waits; it spoils nothing until it is told to."""
    with (
        pytest.MonkeyPatch.context() as patch,
        FaultyProxy(endpoint, delay=3.0).running() as proxy,
        environment(s3_environment(proxy.url)),
    ):
        patch.setattr(retry, "STORAGE_BACKOFF", Backoff(first=0.01, longest=0.5))
        # s3fs keeps one client for equal options: one of its own for each proxy.
        options = {**filesystems.S3_OPTIONS, "endpoint_url": proxy.url}
        config = {**options["config_kwargs"], "read_timeout": 2, "retries": {"mode": "standard", "total_max_attempts": 2}}
        patch.setattr(filesystems, "S3_OPTIONS", {**options, "config_kwargs": config})
        yield proxy
