"""The local cluster's S3 keeps a promise that leases stand on: of two writers with one condition, one succeeds."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from wsgiref.types import StartResponse, WSGIEnvironment

import pytest

from infra.local.s3 import one_conditional_write_at_a_time


class SlowStore:
    """An application that looks, waits until a second request is at the same place, if one comes, and then writes."""

    def __init__(self) -> None:
        self.both = threading.Barrier(2)
        self.bodies: list[bytes] = []
        self.met = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        try:
            self.both.wait(timeout=2)
            self.met = True
        except threading.BrokenBarrierError:
            self.both.reset()
        self.bodies.append(environ["wsgi.input"].read(4))
        return []


@pytest.mark.parametrize(
    ("method", "header", "alone"),
    [
        ("PUT", "HTTP_IF_MATCH", True),
        ("DELETE", "HTTP_IF_NONE_MATCH", True),
        ("GET", "HTTP_IF_MATCH", False),
        ("PUT", "HTTP_HOST", False),
    ],
)
def test_only_conditional_writes_wait_for_each_other(method: str, header: str, alone: bool) -> None:
    store = SlowStore()
    application = one_conditional_write_at_a_time(store)

    def request(body: bytes) -> None:
        list(application({"REQUEST_METHOD": method, header: "x", "CONTENT_LENGTH": "4", "wsgi.input": BytesIO(body)}, print))

    with ThreadPoolExecutor() as pool:
        list(pool.map(request, [b"one.", b"two."]))
    assert store.met is not alone
    assert sorted(store.bodies) == [b"one.", b"two."]
