"""A real HTTP S3 for tests (moto's server in a process of its own), and a proxy before it that spoils some of its answers."""

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import boto3

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
    """What a process must find in its environment to reach the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextmanager
def serve_s3() -> Iterator[str]:
    """The endpoint of a server with an empty bucket `BUCKET`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    raise RuntimeError(f"moto's server did not start (exit code {server.poll()})")


class FaultyProxy:
    """Passes requests on to an endpoint, and spoils a share of the answers.

    Args:
        share: of the requests that are spoiled, by a fault drawn from `faults`: an error status, a connection that is reset
            before the answer, an answer that is cut in the middle, or one that comes after `delay` seconds.
        delay: seconds that a slow answer takes.

    `requests` counts methods, `spoiled` faults, `sent` the bytes of answers.
    """

    def __init__(self, endpoint: str, *, share: float = 0.0, faults: Sequence[Fault] = (), delay: float = 3.0, seed: int = 0):
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

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The proxy's endpoint."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.draw(self.command)
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(self.proxy.delay)
        if fault in CODES:
            self.answer(int(fault), {}, ERROR_BODY % CODES[fault])
            return
        connection = http.client.HTTPConnection(self.proxy.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in ("connection", "date", "server")}
        self.answer(response.status, headers, content, cut=fault == "cut")

    def answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if cut:
            content, self.close_connection = content[: len(content) // 2], True
        if self.command != "HEAD":
            self.proxy.sent += len(content)
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: faults are meant."""


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """These variables, for as long as it lasts."""
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
