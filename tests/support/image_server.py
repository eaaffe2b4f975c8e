"""A real HTTP server that misbehaves as web servers do, for the tests of downloads."""

import threading
import time
from collections import Counter, defaultdict

from tests.support.http_server import Handler, Server

Reply = tuple[int, list[tuple[str, str]], bytes]
"""Status, headers and content."""


class ImageServer(Server):
    """Serves `images` by path. Other paths misbehave as their first part says. `answers` counts requests by path.

    `replies` holds whole answers by path.
    """

    def __init__(self, images: dict[str, bytes]):
        super().__init__(ImageHandler)
        self.images = images
        self.replies: dict[str, Reply] = {}
        self.answers: Counter[str] = Counter()
        self.cookies: defaultdict[str, set[str | None]] = defaultdict(set)
        self.agents: set[str | None] = set()
        self.fails_before = 1  # of /flaky/: answers of 500 before the good one
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0


class ImageHandler(Handler):
    server: ImageServer

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.answers[self.path] += 1
            self.server.agents.add(self.headers["User-Agent"])
            self.server.cookies[self.path].add(self.headers["Cookie"])
        if self.path in self.server.replies:
            status, headers, content = self.server.replies[self.path]
            return self.reply(status, content, headers)
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
        """Wait, and count how many requests wait at once. It counts before the answer, after which the client may ask again."""
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
        time.sleep(seconds)
        with self.server.lock:
            self.server.at_once -= 1
