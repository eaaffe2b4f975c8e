"""Base classes of the tests' HTTP servers: they run in a thread, answer with a length, and log nothing."""

import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Handler(BaseHTTPRequestHandler):
    def reply(self, status: int, content: bytes, headers: Mapping[str, str] | Iterable[tuple[str, str]] | None = None) -> None:
        """Answer with a length, unless the headers have one; a header may come several times if they are pairs."""
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers or ())
        if not {"Content-Length", "Transfer-Encoding"} & dict(pairs).keys():
            pairs.insert(0, ("Content-Length", str(len(content))))
        self.send_response(status)
        for name, value in pairs:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: people read the tests' output."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, handler: type[Handler]):
        super().__init__(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Self]:
        thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            self.server_close()
            thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that went away or were killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
