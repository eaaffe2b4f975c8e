"""A real HTTP server that behaves as the web does, for the tests of downloads."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ImageServer(ThreadingHTTPServer):
    """`images`: by path. Other paths misbehave as their first part says; `answers` counts requests by path."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, images: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.images = images
        self.answers: Counter[str] = Counter()
        self.agents: set[str | None] = set()
        self.fails_before = 1  # of /flaky/: answers of 500 before the good one
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: ImageServer

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.answers[self.path] += 1
            self.server.agents.add(self.headers["User-Agent"])
        with suppress(BrokenPipeError, ConnectionResetError):  # the client has had enough
            self.answer()

    def answer(self) -> None:
        behaviour, content = self.path.split("/")[1], self.server.images.get(self.path.rsplit("/", 1)[-1], b"")
        if behaviour == "flaky" and self.server.answers[self.path] <= self.server.fails_before:
            return self.reply(500, b"sorry")
        if behaviour == "busy" and self.server.answers[self.path] == 1:
            return self.reply(429, b"later", {"Retry-After": "1"})
        if behaviour == "loop":
            return self.reply(302, b"", {"Location": self.path + "x"})
        if behaviour == "moved":
            return self.reply(301, b"", {"Location": self.path.replace("/moved/", "/good/")})
        if behaviour == "slow":
            time.sleep(3)
        if behaviour == "paused":
            self.pause(0.1)
        if behaviour == "endless":
            self.send_response(200)
            self.end_headers()
            while True:
                self.wfile.write(bytes(2**16))
        if behaviour == "cut":
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 1000))
            self.end_headers()
            self.wfile.write(content)
            return None
        if behaviour == "large":
            return self.reply(200, bytes(200_000))
        if behaviour == "page":
            return self.reply(200, b"<html>This image has moved.</html>", {"Content-Type": "text/html"})
        if behaviour == "noai":
            return self.reply(200, content, {"X-Robots-Tag": "noai, noimageai"})
        if not content:
            return self.reply(404, b"no such image")
        return self.reply(200, content)

    def pause(self, seconds: float) -> None:
        """Counts how many do so at once; before the answer, after which the client may ask again."""
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        time.sleep(seconds)
        with self.server.lock:
            self.server.at_once -= 1

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Not onto the tests' output."""


@contextmanager
def serve(images: dict[str, bytes]) -> Iterator[ImageServer]:
    server = ImageServer(images)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
