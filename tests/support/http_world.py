"""Start a real OpenAI-compatible server, and a proxy in front of it that answers wrongly when told to."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.http_server import Handler, Server, free_port


@contextmanager
def serving(command: list[str], port: int, log: Path, *, env: dict[str, str] | None = None) -> Iterator[str]:
    """Start a server by `command`, wait until it answers at /health, yield its base URL, and stop it at the end."""
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | (env or {}))
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not serve:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def transformers_server(model: str, log: Path) -> Iterator[str]:
    """Run `transformers serve` with one model."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model, "--device", "cpu", "--dtype", "float32"]
    with serving([*command, "--host", "127.0.0.1", "--port", str(port)], port, log) as url:
        yield url


class FaultyProxy(Server):
    """Passes requests on to `target`, but for the next ones that `faults` names (None: not), or all of them if `always` does.

    A request in which `poison` stands is answered with 500, always.

    Faults: a status ("429", "503" ...), "garbage" (200, no JSON), "error" (200, with an error inside), "too_long" (400),
    "not_gzip" (200, in an encoding that it is not in), "drop" (the connection ends), "slow" (no answer for a second).
    """

    def __init__(self, target: str):
        super().__init__(ProxyHandler)
        self.target, self.client = target, httpx.Client(timeout=60)
        self.faults: deque[str | None] = deque()
        self.always: str | None = None
        self.poison: bytes | None = None
        self.retry_after = "0"
        self.seen: list[tuple[float, dict[str, str]]] = []
        self.inside = self.most_inside = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"{super().url}/v1"

    def enter(self, headers: dict[str, str]) -> str | None:
        """Return the fault of this request."""
        with self.lock:
            self.seen.append((time.monotonic(), headers))
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            return self.always or (self.faults.popleft() if self.faults else None)


class ProxyHandler(Handler):
    server: FaultyProxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.server.enter(dict(self.headers.items()))
        if self.server.poison is not None and self.server.poison in body:
            fault = "500"
        try:
            if fault is None:
                answer = self.server.client.post(
                    self.server.target + self.path.removeprefix("/v1"),
                    content=body,
                    headers={"Content-Type": "application/json"},
                )
                self.reply(answer.status_code, answer.content)
            elif fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
            elif fault == "slow":
                time.sleep(1.0)
            elif fault == "garbage":
                self.reply(200, b"<html>welcome to the hotel's network</html>")
            elif fault == "not_gzip":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\ngzip")
            elif fault == "error":
                self.reply(200, json.dumps({"error": {"message": "the engine is busy", "code": 500}}).encode())
            elif fault == "too_long":
                message = "This model's maximum context length is 256 tokens. However, you requested 371 tokens."
                self.reply(400, json.dumps({"error": {"message": message, "code": 400}}).encode())
            else:
                retry = {"Retry-After": self.server.retry_after} if fault in ("429", "503") else None
                self.reply(int(fault), json.dumps({"error": {"message": f"fault {fault}"}}).encode(), retry)
        finally:
            with self.server.lock:
                self.server.inside -= 1
